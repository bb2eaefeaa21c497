"""The tuned model, taken apart: the base's pipeline, and the adapter's matrices by the module that they change."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dspo.diffusion.base import load_pipeline
from dspo.errors import UserError
from dspo.export.probe import probe_inputs, unet_output
from dspo.params import BaseModelParams
from dspo.preference.dora import load_adapter


@dataclass(frozen=True)
class Layer:
    """The adapter of one Linear module, float32."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    s: float
    m: Tensor | None  # [out]; None for plain LoRA

    def merged(self, W: Tensor) -> Tensor:
        """W' = m * V / ||V||, V = W + s B A, norms of rows (Liu et al., ICML 2024); V itself for plain LoRA."""
        V = W + self.s * (self.B @ self.A)
        return V if self.m is None else V * (self.m / V.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Tuned:
    """A base model without its adapter, the adapter, and what both say to :func:`probe_inputs`."""

    pipe: StableDiffusionXLPipeline  # float32
    adapter: Path
    config: LoraConfig
    layers: dict[str, Layer]  # by the module's name in the UNet
    base_output: Tensor  # [n, c, h, w]
    output: Tensor  # [n, c, h, w]

    def base_weight(self, name: str) -> Tensor:
        """W [out, in] of a module, whether or not an adapter is in the pipeline's UNet."""
        return _base_weight(self.pipe.unet.get_submodule(name))


@torch.no_grad()
def load_tuned(base: BaseModelParams, adapter: Path, device: torch.device) -> Tuned:
    """Load base and adapter in float32, whatever the base's own type: each format rounds once, at its end.

    Raises :class:`UserError` if one of them cannot be loaded, they do not belong together, or a tuned weight is not
    finite (a row of zeros has no direction).
    """
    pipe = load_pipeline(base.model_copy(update={"dtype": "float32"}), device)
    inputs = probe_inputs(pipe.unet)
    base_output = unet_output(pipe.unet, inputs)
    model = load_adapter(pipe.unet, adapter).eval()
    output = unet_output(model, inputs)
    layers = {
        name: layer_of(module)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLinear)
    }
    pipe.unet = model.unload()
    tuned = Tuned(pipe, adapter, model.peft_config[model.active_adapter], layers, base_output, output)
    for name, layer in layers.items():
        if not layer.merged(tuned.base_weight(name)).isfinite().all():
            raise UserError(
                f"{adapter}: the tuned weight of {name} is not finite. Give an adapter whose training ended well."
            )
    return tuned


def layer_of(module: LoraLinear) -> Layer:
    """The active adapter of a module, copied."""
    (name,) = module.active_adapters
    m = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    A, B = (half[name].weight.detach().clone() for half in (module.lora_A, module.lora_B))
    return Layer(A, B, module.scaling[name], None if m is None else m.detach().clone())


def effective_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] that a module multiplies by, its adapter included."""
    W = _base_weight(module)
    return layer_of(module).merged(W) if isinstance(module, LoraLinear) else W


def _base_weight(module: nn.Module) -> Tensor:
    linear = module.get_base_layer() if isinstance(module, LoraLinear) else module
    assert isinstance(linear, nn.Linear)
    return linear.weight
