"""Images from elsewhere as latents of the base model."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dspo.data.images import Pixels


def fit(image: Pixels, resolution: int) -> Pixels:
    """[h, w, 3] -> [resolution, resolution, 3]: the middle square, scaled."""
    size = (resolution, resolution)
    return np.asarray(ImageOps.fit(Image.fromarray(image), size, Image.Resampling.LANCZOS))


def encode_images(vae: AutoencoderKL, images: Sequence[Pixels]) -> NDArray[np.float16]:
    """Images [h, w, 3] of one size -> latents [n, 4, h / 8, w / 8] in the UNet's scaled space.

    The latent is the mean of the VAE's posterior, which is narrow; a sample of it would add noise that no draw of the
    trainer accounts for.
    """
    pixels = torch.from_numpy(np.stack(images)).to(vae.device).permute(0, 3, 1, 2)
    with torch.inference_mode():
        latents = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
    result: NDArray[np.float16] = latents.to("cpu", torch.float16).numpy()
    return result
