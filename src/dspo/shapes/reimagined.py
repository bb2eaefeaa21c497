"""Pictures that the base drew over: a web picture, noised part of the way and sampled back by the prompt (SDEdit, Meng
et al. 2022, arXiv 2108.01073).

They have the faults of generated pictures, and yet it is known what they show.
"""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from numpy.typing import NDArray

from dspo.data.keys import keyed_rng

STEPS = 12
STRENGTHS = (0.35, 0.85)  # share of the noise schedule; from 0.9 on the layout is a new one
GUIDANCE_SCALES = (1.0, 2.5)
BATCH = 64


def reimagine(
    pipe: StableDiffusionXLPipeline, pictures: NDArray[np.uint8], prompts: list[str], seed: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures, uint8 [64, 64, 3], drawn over; strength and guidance are drawn for each batch."""
    image_to_image = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    image_to_image.set_progress_bar_config(disable=True)
    for number, start in enumerate(range(0, len(pictures), BATCH)):
        rng = keyed_rng(seed, "reimagine", number)
        part = pictures[start : start + BATCH]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            images = image_to_image(
                prompt=prompts[start : start + BATCH],
                image=torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255,
                strength=float(rng.uniform(*STRENGTHS)),
                guidance_scale=float(rng.uniform(*GUIDANCE_SCALES)),
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
                output_type="np",
            ).images
        yield from np.round(images * 255).astype(np.uint8)
