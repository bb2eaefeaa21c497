"""Train the small CLIP that the reward model of `shapes` starts from, and save it in open_clip's layout.

``python -m dspo.shapes.train_clip --work DIR --output models/shapes-clip`` continues where it stopped when run again.
Contrastive learning on rendered scenes and their prompts. A prompt that leaves much free may fit other scenes of its
batch too; those count as negatives, as they do in CLIP.
"""

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dspo.data.keys import keyed_rng
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.grammar import random_request
from dspo.shapes.render import SIDE, random_scene, render
from dspo.shapes.tokenizer import CONTEXT_LENGTH, new_tokenizer

log = logging.getLogger(__name__)

MEAN, STD = [0.55, 0.45, 0.45], [0.28, 0.24, 0.24]
SCENES = 60_000
NOISE = 0.03  # standard deviation of the pixel noise in training, so that decoded samples look familiar


def model_config(vocabulary: int) -> dict[str, object]:
    """open_clip's configuration of the model."""
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 2}
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 96, "layers": 4, "head_width": 24},
        "text_cfg": {**text, "hf_tokenizer_name": "local"},
    }


def training_set(number: int, seed: int) -> tuple[Tensor, list[str]]:
    """Rendered scenes, uint8 [number, 3, 64, 64], and their prompts."""
    images: list[NDArray[np.uint8]] = []
    prompts = []
    for i in progress(range(number), number, "render"):
        rng = keyed_rng(seed, "clip-scene", i)
        request = random_request(rng)
        prompts.append(request.prompt())
        images.append(render(random_scene(request, rng)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), prompts


def train(work: Path, output: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = open_clip.model.CLIP(**model_config(len(tokenizer)))
    images, prompts = training_set(SCENES, seed)
    tokens = tokenizer(prompts, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = load_checkpoint(work / "clip.pt", model=model, optimizer=optimizer, schedule=schedule)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for step in progress(range(start, steps), steps - start, "clip"):
        picked = keyed_rng(seed, "clip-batch", step).integers(0, SCENES, batch_size)
        generator = torch.Generator().manual_seed(step)
        pixels = images[picked].float() / 255
        pixels = pixels + NOISE * torch.rand(len(picked), 1, 1, 1, generator=generator) * torch.randn(
            pixels.shape, generator=generator
        )
        with torch.autocast("cpu", torch.bfloat16):
            image_features, text_features, scale = model((pixels - mean) / std, tokens[picked])
        logits = scale.float() * image_features.float() @ text_features.float().T
        same = torch.arange(len(picked))
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 50 == 0:
            correct = (logits.argmax(dim=1) == same).float().mean().item()
            log.info("step %d loss %.4f top-1 %.3f", step, loss.item(), correct)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(work / "clip.pt", step + 1, model=model, optimizer=optimizer, schedule=schedule)
    save(model, output)


def save(model: torch.nn.Module, output: Path) -> None:
    """Write open_clip's folder: config, 16-bit weights, tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(output)
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, output / "open_clip_model.safetensors")


if __name__ == "__main__":
    run_trainer(__doc__, train, steps=1800, batch_size=192, lr=2e-3)
