"""Images from elsewhere as latents of the base model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dspo.data.images import Pixels


@dataclass(frozen=True)
class Fitted:
    """An image that was scaled and cropped to its middle."""

    pixels: Pixels  # [height, width, 3]
    time_ids: tuple[int, ...]  # SDXL's: original height and width, top and left of the crop, height and width

    @property
    def enlarged(self) -> bool:
        h, w, _, _, height, width = self.time_ids
        return h < height or w < width


def bucket(aspect: float, resolution: int) -> tuple[int, int]:
    """Height and width, pixels, of the SDXL bucket nearest to ``aspect`` = width / height.

    SDXL was trained on sizes of about 1024^2 pixels whose sides are multiples of 64, up to 1 : 4. Of these each short
    side has its longest long side here: 17 sizes. At another ``resolution`` they are as many, as far as the VAE's 8 go.
    """
    step = max(8, resolution // 16 // 8 * 8)
    shorts = range(resolution, resolution // 2 - 1, -step)
    buckets = [(short, max(short, resolution**2 // (short * step) * step)) for short in shorts]
    ratio = max(aspect, 1 / aspect)
    short, long = min(buckets, key=lambda sides: abs(math.log(sides[1] / sides[0] / ratio)))
    return (short, long) if aspect > 1 else (long, short)


def fit(image: Pixels, height: int, width: int) -> Fitted:
    """Scale ``image`` [h, w, 3] until it fills ``height`` x ``width``, and cut off what stands over on both sides."""
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    top, left = (round((side * scale - kept) / 2) for side, kept in ((h, height), (w, width)))
    pixels = np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))
    return Fitted(pixels, (h, w, top, left, height, width))


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
