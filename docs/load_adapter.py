"""Load the adapter with diffusers and peft alone, make the evaluated images again, and compare every pixel.

    python docs/load_adapter.py --base models/shapes-sdxl --adapter models/adapter --evaluation data/evaluation

Nothing of this project is imported: this is what anyone who was given the adapter does. The images come out equal to
the bit on the machine that made the evaluation, with the same number of threads and the same packages. That takes the
same initial noise (keyed by prompt and number, see ``initial_noise``) and the same batches, each prompt encoded once
per batch: the last bits of a matrix product depend on its shape. Without that wish ``pipe(prompt)`` is all it takes.
"""

import argparse
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from peft import PeftModel
from PIL import Image

SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
}


def load(base: str, adapter: str, scheduler: str, device: str) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(base, use_safetensors=True, add_watermarker=False).to(device)
    scheduler_class, options = SCHEDULERS[scheduler]
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, adapter).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def initial_noise(seed: int, prompt_id: str, noise_index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise whose generator's seed is a hash of what the noise belongs to."""
    key = json.dumps([seed, "noise", prompt_id, str(noise_index)])
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def make(pipe: StableDiffusionXLPipeline, rows: list[dict], seed: int) -> np.ndarray:
    """uint8 images [n, height, width, 3] of one batch."""
    width, height = rows[0]["width"], rows[0]["height"]
    shape = (pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = torch.stack([initial_noise(seed, row["prompt_id"], row["noise_index"], shape) for row in rows])
    prompts = list(dict.fromkeys(row["caption"] for row in rows))
    which = [prompts.index(row["caption"]) for row in rows]
    with torch.inference_mode():
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        _, no_embeds, _, no_pooled = pipe.encode_prompt("", do_classifier_free_guidance=True)
        images = pipe(
            prompt_embeds=embeds[which],
            pooled_prompt_embeds=pooled[which],
            negative_prompt_embeds=no_embeds.expand(len(rows), -1, -1),
            negative_pooled_prompt_embeds=no_pooled.expand(len(rows), -1),
            latents=noise.to(pipe.device),
            height=height,
            width=width,
            num_inference_steps=rows[0]["steps"],
            guidance_scale=rows[0]["guidance_scale"],
            output_type="np",
        ).images
    return (images * 255).round().astype(np.uint8)


def main(argv: list[str]) -> int:
    """Print how many images differ, and return that number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="folder with tuned.parquet and results.json")
    parser.add_argument("--limit", type=int, help="only so many batches")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    results = json.loads((args.evaluation / "results.json").read_text(encoding="utf-8"))
    batch_size = results["settings"]["batch_size"]
    rows = pq.read_table(args.evaluation / "tuned.parquet").to_pylist()
    starts = range(0, len(rows), batch_size)[: args.limit]
    pipe = load(args.base, args.adapter, rows[0]["scheduler"], args.device)
    compared = different = 0
    for start in starts:
        batch = rows[start : start + batch_size]
        for row, image in zip(batch, make(pipe, batch, results["seed"]), strict=True):
            stored = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
            compared += 1
            different += int((stored != image).any())
    print(f"{compared} images compared, {different} differ")
    return different


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
