"""The single-file layout of SDXL: one .safetensors under the names of Stability's own code, from diffusers' parts.

Written from the layout that the published checkpoint has, as the way back of what diffusers converts.
"""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_single_file(pipe: StableDiffusionXLPipeline, path: Path) -> None:
    layers = pipe.unet.config.layers_per_block
    state = {f"model.diffusion_model.{unet_name(n, layers)}": v for n, v in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.up_block_types)
    for name, value in pipe.vae.state_dict().items():
        convolution = "attentions" in name and value.ndim == 2  # attention is a 1x1 convolution there
        state[f"first_stage_model.{vae_name(name, blocks)}"] = value[:, :, None, None] if convolution else value
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    second = open_clip_state(pipe.text_encoder_2.state_dict())
    state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def renamed(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    return f"{names.get(module, module)}.{kind}"


def unet_name(name: str, layers: int) -> str:
    """Down and up blocks are counted through; a block has its resnet first, then attention, then the resampling."""
    found = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if found is None:
        return renamed(name, UNET_ENDS)
    side, block, kind, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = renamed(rest, RESNET)
    if side == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    place = int(kind != "resnets")
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + block * (layers + 1) + layer}.{place}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.2.{rest}"
    return f"output_blocks.{block * (layers + 1) + layer}.{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda f: f"up.{blocks - 1 - int(f[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda f: f"up.{blocks - 1 - int(f[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda f: f"mid.block_{int(f[1]) + 1}.", name)
    attention = re.match(r"(.*)mid_block\.attentions\.0\.(.*)", name)
    if attention is not None:
        return f"{attention[1]}mid.attn_1.{renamed(attention[2], VAE_ATTENTION)}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def open_clip_state(state: State) -> State:
    """The second text encoder in open_clip's names: q, k and v in one matrix, the projection transposed."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for name, value in state.items():
        found = re.match(r"encoder\.layers\.(\d+)\.(.*)", name)
        if found is None:
            continue
        block, rest = f"transformer.resblocks.{found[1]}.", found[2]
        if rest.startswith("self_attn.q_proj."):
            qkv = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[f"{block}attn.in_proj_{rest.rpartition('.')[2]}"] = torch.cat(qkv)
        elif "k_proj" not in rest and "v_proj" not in rest:
            out[block + renamed(rest, OPEN_CLIP)] = value
    return out
