"""Train the second judge on renders: right and clean against one attribute wrong or the picture spoiled.

``python -m dspo.shapes.train_second --work DIR --output models/shapes-judge`` continues where it stopped.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dspo.data.keys import keyed_rng
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.defects import KINDS, spoil
from dspo.shapes.grammar import COLOURS, PATTERNS, POSITIONS, RELATIONS, SHAPES, SIZES, Request, random_request
from dspo.shapes.render import random_scene, render_float
from dspo.shapes.second import WEIGHTS, SecondJudge, encode_request

log = logging.getLogger(__name__)

SLIGHT = 0.1  # every picture is blurred and noised up to this strength: a decoded sample is never as clean as a render


def wrong_request(request: Request, rng: np.random.Generator) -> Request:
    """The request with one requested attribute changed to another value."""
    options: list[tuple[str, int]] = [("shape", 0)]
    for i, wanted in enumerate(request.objects):
        options += [(name, i) for name in ("shape", "colour", "size", "pattern") if getattr(wanted, name)]
    options += [(name, -1) for name in ("position", "relation", "background") if getattr(request, name)]
    name, i = options[int(rng.integers(len(options)))]
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "pattern": PATTERNS, "background": COLOURS}
    values |= {"position": POSITIONS, "relation": RELATIONS}
    old = getattr(request if i < 0 else request.objects[i], name)
    new = str(rng.choice([value for value in values[name] if value != old]))
    change: dict[str, Any] = {name: new}
    if i < 0:
        return replace(request, **change)
    objects = tuple(replace(o, **change) if k == i else o for k, o in enumerate(request.objects))
    return replace(request, objects=objects)


def draw_example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Pixels [64, 64, 3], encoded request, and 1 for right and clean or 0."""
    request = random_request(rng)
    picture = render_float(random_scene(request, rng))
    for slight in ("blur", "noise"):
        picture = spoil(picture, slight, float(rng.uniform(0, SLIGHT)), rng)
    case = rng.random()
    if case < 0.35:
        return picture, encode_request(wrong_request(request, rng)), 0.0
    if case < 0.5:
        return spoil(picture, str(rng.choice(KINDS)), float(rng.uniform(0.35, 1)), rng), encode_request(request), 0.0
    return picture, encode_request(request), 1.0


def batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = keyed_rng(seed, "second-batch", step)
    pictures, requests, labels = zip(*(draw_example(rng) for _ in range(size)), strict=True)
    pixels = torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.stack(requests)), torch.tensor(labels, dtype=torch.float32)


def train(work: Path, output: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    judge = SecondJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = load_checkpoint(work / "second.pt", model=judge, optimizer=optimizer, schedule=schedule)
    for step in progress(range(start, steps), steps - start, "second judge"):
        pixels, requests, labels = batch(seed, step, batch_size)
        logits = judge(pixels, requests)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = ((logits > 0) == (labels > 0.5)).float().mean().item()
            log.info("step %d loss %.4f right %.3f", step, loss.item(), right)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(work / "second.pt", step + 1, model=judge, optimizer=optimizer, schedule=schedule)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, output / WEIGHTS)


if __name__ == "__main__":
    run_trainer(__doc__, train, steps=2000, batch_size=96, lr=2e-3)
