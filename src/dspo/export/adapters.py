"""The adapter itself, without loss: PEFT's folder, and one file in the names that diffusers reads.

diffusers' own conversion of names (``convert_state_dict_to_diffusers``) loses the matrices of attention beside those of
other layers, and its kohya writer gives DoRA keys that nothing reads; PEFT's names under ``unet.`` load as they are.
"""

import json
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from dspo.export.tuned import Tuned
from dspo.preference.dora import CONFIG, WEIGHTS


def write_peft(tuned: Tuned, folder: Path) -> float:
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(tuned.adapter / name, folder / name)
    return 0.0


def read_peft(tuned: Tuned, folder: Path) -> nn.Module:
    unet: nn.Module = PeftModel.from_pretrained(tuned.pipe.unet, folder).eval().get_base_model()
    return unet


def write_diffusers(tuned: Tuned, path: Path) -> float:
    """B carries s: a reader that knows no alpha takes it to be the rank, which is then right."""
    tensors = {}
    for name, layer in tuned.layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = layer.A
        tensors[f"unet.{name}.lora_B.weight"] = layer.s * layer.B
        if layer.m is not None:
            tensors[f"unet.{name}.lora_magnitude_vector"] = layer.m
    config = {
        "r": tuned.config.r,
        "lora_alpha": tuned.config.r,
        "rank_pattern": tuned.config.rank_pattern,
        "alpha_pattern": tuned.config.rank_pattern,
        "target_modules": sorted(tuned.layers),
        "use_dora": tuned.config.use_dora,
    }
    # safetensors writes two keys or more in random order.
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": config[key] for key in sorted(config)})}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return 0.0


def read_diffusers(tuned: Tuned, path: Path) -> nn.Module:
    """What ``load_lora_weights`` does for a UNet; it tells diffusers' names and kohya's apart."""
    pipe = tuned.pipe
    state, alphas, metadata = pipe.lora_state_dict(
        path.parent, weight_name=path.name, unet_config=pipe.unet.config, return_lora_metadata=True
    )
    pipe.load_lora_into_unet(state, network_alphas=alphas, unet=pipe.unet, metadata=metadata)
    unet: nn.Module = pipe.unet
    return unet
