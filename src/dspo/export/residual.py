"""How far a model is from the tuned one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspo.export.probe import probe_inputs, unet_output
from dspo.export.tuned import Tuned, effective_weight


@dataclass(frozen=True)
class Residual:
    weights: float  # ||W'' - W'|| / ||W' - W||, Frobenius norms over all adapted layers; W'' is the model's weight
    output: float  # largest difference of the UNet's output from the tuned UNet's
    effect: float  # largest difference of the tuned UNet's output from the base's


def measure(tuned: Tuned, unet: nn.Module) -> Residual:
    """``unet``: the UNet as another program loaded it, its adapter inside."""
    output = unet_output(unet, probe_inputs(tuned.pipe.unet))
    return Residual(
        relative_error(tuned, lambda name: effective_weight(unet.get_submodule(name))),
        float((output - tuned.output).abs().max()),
        float((tuned.output - tuned.base_output).abs().max()),
    )


@torch.no_grad()
def relative_error(tuned: Tuned, weight: Callable[[str], Tensor]) -> float:
    """:attr:`Residual.weights` of the weights [out, in] that ``weight`` gives by the module's name."""
    error = change = 0.0
    for name, layer in tuned.layers.items():
        W = tuned.base_weight(name)
        merged = layer.merged(W)
        error += float((weight(name).float() - merged).square().sum(dtype=torch.float64))
        change += float((merged - W).square().sum(dtype=torch.float64))
    return float((error / change) ** 0.5) if change else 0.0
