"""Train the second judge on renders, right or wrong in some attributes, clean or spoiled.

``python -m dspo.shapes.train_second --work DIR --output models/shapes-judge`` continues where it stopped. Beside the
weights it leaves ``report.json``: how many answers are right on pictures that it was not trained on.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dspo.data.files import write_json
from dspo.data.keys import keyed_rng
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.defects import KINDS, spoil
from dspo.shapes.grammar import asked_attributes, changed, random_request
from dspo.shapes.probes import PatchProbe, patch_contents
from dspo.shapes.render import random_scene, render_float
from dspo.shapes.second import CHANNELS, QUESTIONS, WEIGHTS, SecondJudge, asked, encode_request

log = logging.getLogger(__name__)

SLIGHT = 0.1  # every picture is blurred and noised up to this strength: a decoded sample is never as clean as a render
WRONG_SHARE = 0.35  # of the attributes: the answers of a picture tell the more the less they are always "yes"
SPOILED_SHARE = 0.3
PROBE_WEIGHT = 0.3
HELD_OUT = "held out"  # stands in for the number of a step: other draws than any step's


def draw_example(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Pixels [64, 64, 3], encoded request, which questions it poses, the answers (1 or 0), and what patches show."""
    true = random_request(rng)
    scene = random_scene(true, rng)
    picture = render_float(scene)
    for slight in ("blur", "noise"):
        picture = spoil(picture, slight, float(rng.uniform(0, SLIGHT)), rng)
    answers = np.ones(len(QUESTIONS), np.float32)
    if rng.random() < SPOILED_SHARE:
        picture = spoil(picture, str(rng.choice(KINDS)), float(rng.uniform(0.3, 1)), rng)
        answers[QUESTIONS.index("clean")] = 0
    shown = true
    for name in asked_attributes(true):
        if rng.random() < WRONG_SHARE:
            shown = changed(shown, name, rng)
            answers[QUESTIONS.index(name)] = 0
    return picture.astype(np.float32), encode_request(shown), asked(shown), answers, *patch_contents(scene)


def batch(seed: int, step: int | str, size: int) -> list[Tensor]:
    rng = keyed_rng(seed, "second-batch", step)
    parts = zip(*(draw_example(rng) for _ in range(size)), strict=True)
    return [torch.from_numpy(np.stack(part)) for part in parts]


@torch.inference_mode()
def held_out(judge: SecondJudge, seed: int, pictures: int = 2000) -> dict[str, float | int]:
    """Share of right answers on fresh pictures, drawn as in training, beside the share of those that are "yes"."""
    pixels, requests, posed, answers, *_ = batch(seed, HELD_OUT, pictures)
    yes, said = answers[posed] > 0.5, judge(pixels.permute(0, 3, 1, 2), requests)[posed] > 0
    right, always_yes = ((given == yes).float().mean().item() for given in (said, torch.ones_like(yes)))
    return {"pictures": pictures, "answers": len(yes), "right": right, "always_yes": always_yes}


def train(work: Path, output: Path, steps: int = 3000, batch_size: int = 96, lr: float = 2e-3, seed: int = 0) -> None:
    torch.manual_seed(seed)
    judge = SecondJudge()
    probe = PatchProbe(CHANNELS)
    optimizer = torch.optim.AdamW([*judge.parameters(), *probe.parameters()], lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = load_checkpoint(work / "second.pt", model=judge, probe=probe, optimizer=optimizer, schedule=schedule)
    for step in progress(range(start, steps), steps - start, "second judge"):
        pixels, requests, posed, answers, classes, places = batch(seed, step, batch_size)
        seen = judge.see(pixels.permute(0, 3, 1, 2))
        logits = judge.answer(seen, requests)
        loss = F.binary_cross_entropy_with_logits(logits[posed], answers[posed])
        loss = loss + PROBE_WEIGHT * probe.loss(seen.flatten(2).transpose(1, 2), classes, places)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = ((logits > 0) == (answers > 0.5))[posed].float().mean().item()
            log.info("step %d loss %.4f right %.3f", step, loss.item(), right)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(
                work / "second.pt", step + 1, model=judge, probe=probe, optimizer=optimizer, schedule=schedule
            )
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, output / WEIGHTS)
    write_json(held_out(SecondJudge.load(output), seed), output / "report.json")


if __name__ == "__main__":
    run_trainer(__doc__, train)
