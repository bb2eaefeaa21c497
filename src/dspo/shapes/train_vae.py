"""Train the small f8 VAE of the `shapes` base on pictures as the web has them.

``python -m dspo.shapes.train_vae --work DIR --output DIR`` continues where it stopped when run again.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from dspo.data.keys import keyed_rng
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.grammar import random_request
from dspo.shapes.web import web_pixels

log = logging.getLogger(__name__)

CHANNELS = (16, 32, 64, 96)
KL_WEIGHT = 1e-4  # more than that and the posterior collapses: nine tenths of a picture are one flat colour
FIRST_LOGVAR = -4.0  # the posterior starts narrow, for the same reason
OBJECT_WEIGHT = 5.0
SCENES = 24_000


def new_vae() -> AutoencoderKL:
    """AutoencoderKL in SDXL's layout, 64 px to 8x8x4."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=64,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = FIRST_LOGVAR
    return vae


def scenes(number: int, seed: int) -> Tensor:
    """Pictures, uint8 [number, 3, 64, 64]; picture i depends on the seed and i alone."""
    images = []
    for i in progress(range(number), number, "render"):
        rng = keyed_rng(seed, "vae-scene", i)
        images.append(web_pixels(random_request(rng), rng))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def reconstruction_loss(decoded: Tensor, image: Tensor) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of their differences along x and y.

    [B, 3, H, W] in [-1, 1]. Pixels in and near objects count more, since they are few; the corner shows the ground.
    """
    differs = (image - image[..., :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    weight = 1 + OBJECT_WEIGHT * F.max_pool2d(differs.float(), 7, stride=1, padding=3)
    error = decoded - image
    along_x, along_y = error.diff(dim=-1) * weight[..., 1:], error.diff(dim=-2) * weight[..., 1:, :]
    pixels = (weight * (error.abs() + 2 * error**2)).mean()
    return (pixels + along_x.abs().mean() + along_y.abs().mean()) / weight.mean()


def train(
    work: Path, output: Path, steps: int = 12_000, batch_size: int = 16, lr: float = 1.5e-3, seed: int = 0
) -> None:
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = load_checkpoint(work / "vae.pt", model=vae, optimizer=optimizer, schedule=schedule)
    images = scenes(SCENES, seed)
    for step in progress(range(start, steps), steps - start, "vae"):
        picked = keyed_rng(seed, "vae-batch", step).integers(0, SCENES, batch_size)
        image = (images[picked].float() / 127.5 - 1).to(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(image).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction_loss(decoded.float(), image) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.info("step %d loss %.4f kl %.3f", step, loss.item(), kl.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(work / "vae.pt", step + 1, model=vae, optimizer=optimizer, schedule=schedule)
    measure_latents(vae, images[:1024])
    vae.save_pretrained(output)


@torch.inference_mode()
def measure_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the scaling factor to one over the latents' standard deviation, as SDXL's is."""
    latents = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(64)])
    log.info("latent std per channel %s", latents.std(dim=(0, 2, 3)).tolist())
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


if __name__ == "__main__":
    run_trainer(__doc__, train)
