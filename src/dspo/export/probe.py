"""One fixed question to a UNet, so that two of them can be compared by their answers."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dspo.data.keys import keyed_seed

LARGEST = 32  # latent pixels; a larger image says no more about the weights, and costs minutes without a GPU
TIMESTEPS = (10, 500, 990)
TOKENS = 16


def probe_inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Keyed standard normal latents and conditions of SDXL's shapes, one row per timestep."""
    config, n = unet.config, len(TIMESTEPS)
    size = min(config.sample_size, LARGEST)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def draw(what: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(keyed_seed(0, "export", what))
        return torch.randn(shape, generator=generator).to(unet.device)

    pixels = 8.0 * size
    conditions = {
        "text_embeds": draw("pooled", n, pooled_width),
        "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=unet.device).repeat(n, 1),
    }
    return {
        "sample": draw("latents", n, config.in_channels, size, size),
        "timestep": torch.tensor(TIMESTEPS, device=unet.device),
        "encoder_hidden_states": draw("text", n, TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": conditions,
    }


@torch.no_grad()
def unet_output(unet: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The prediction [n, c, h, w]."""
    prediction: Tensor = unet(**inputs, return_dict=False)[0]
    return prediction
