"""The adapter inside the weights: the UNet, or the whole pipeline, in diffusers' layout and float16."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from dspo.errors import UserError
from dspo.export.residual import relative_error
from dspo.export.tuned import Tuned


def write_merged_unet(tuned: Tuned, folder: Path) -> float:
    """Returns the relative error that rounding to float16 makes."""
    unet, error = _merge(tuned)
    unet.save_pretrained(folder)
    return error


def read_merged_unet(tuned: Tuned, folder: Path) -> nn.Module:
    unet: nn.Module = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32).to(tuned.output.device)
    return unet


def write_pipeline(tuned: Tuned, folder: Path) -> float:
    """As :func:`write_merged_unet`, with all parts of the pipeline."""
    pipe, base = tuned.pipe, tuned.pipe.unet
    pipe.unet, error = _merge(tuned)
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        _check_range(part.half().state_dict())
    pipe.save_pretrained(folder)
    pipe.unet = base
    return error


def read_pipeline(tuned: Tuned, folder: Path) -> nn.Module:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    unet: nn.Module = pipe.unet.to(tuned.output.device)
    return unet


def _merge(tuned: Tuned) -> tuple[UNet2DConditionModel, float]:
    """W' is computed in float32 and rounded once: in half precision, rounding W' at each step is as large as W' - W."""
    state = {name: tensor.half() for name, tensor in tuned.pipe.unet.state_dict().items()}
    for name, layer in tuned.layers.items():
        state[f"{name}.weight"] = layer.merged(tuned.base_weight(name)).half()
    _check_range(state)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(tuned.pipe.unet.config)
    unet.load_state_dict(state, assign=True)
    return unet.eval(), relative_error(tuned, lambda name: state[f"{name}.weight"])


def _check_range(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: has weights beyond float16's range. Export the adapter alone: --format diffusers")
