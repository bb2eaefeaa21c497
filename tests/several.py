"""Stages in one and in several processes, for test_distributed.py: `python several.py FOLDER` fills FOLDER.

The processes are forks of this one, which imports everything once; each gets what a launcher would tell it. As a
launcher does, it ends the others when one dies.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from pathlib import Path

import numpy as np
import torch
import yaml
from tiny import RESOLUTION, save_tiny_pipeline

from dspo import distributed
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt, write_split
from dspo.data.records import HEADS
from dspo.diffusion import candidates
from dspo.diffusion.base import load_pipeline
from dspo.evaluation.judges import Judges
from dspo.evaluation.paired import evaluation_requests, load_shards, sample_to_shards
from dspo.params import load_params
from dspo.stages import evaluate, generate_pairs, score, train

ROOT = Path(__file__).parents[1]
TEXTS = ["a red circle", "a blue square on green", 'a "quoted", odd <b>prompt</b>', "a small star", "a grey cross"]
PARAMS, TRAIN, VALIDATION = Path("params.yaml"), Path("train.csv"), Path("validation.csv")
KILLED_AT = 3  # call of the clipping in rank 1: after the checkpoint of step 2


class Redness:
    """Stands in for the reward model; exact, so that the shape of a batch does not show."""

    heads, untrained, temperature = HEADS[:2], (), 0.1
    model = torch.nn.Identity()

    def score(self, images: Sequence[np.ndarray], captions: Sequence[str], batch_size: int) -> np.ndarray:
        red = [image[..., 0].mean(dtype=np.float64) / 255 for image in images]
        return np.array([[value, len(caption)] for value, caption in zip(red, captions, strict=True)]).reshape(-1, 2)


def project() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    world = raw["worlds"]["shapes"]
    sampler = {"scheduler": "ddim", "steps": 2, "guidance_scale": 3.0}
    world["base"] |= {"model": str(save_tiny_pipeline(Path("base").absolute())), "resolution": RESOLUTION}
    world["generate"] |= {"num_prompts": 5, "candidates_per_sampler": 4, "batch_size": 2, "shard_size": 4}
    world["generate"]["samplers"] = [sampler]
    world["score"] |= {"margin": 0.0, "max_pairs_per_prompt": 2, "validation_share": 0.25, "batch_size": 2}
    world["train"] |= {"rank": 2, "alpha": 2, "epochs": 2, "batch_size": 1, "gradient_accumulation_steps": 4}
    world["train"] |= {"checkpoint_every_steps": 1, "validation_prompts": 2, "warmup_steps": 0, "ema_decay": None}
    # An untrained model's errors are some fifty times those of `shapes`, and the margin has to be of the same size.
    world["train"] |= {"beta": world["train"]["beta"] / 50, "dropout": 0.1}
    world["evaluate"] |= {"sampler": sampler, "batch_size": 2}
    PARAMS.write_text(yaml.safe_dump(raw))
    for path in (TRAIN, VALIDATION):
        write_split([Prompt(prompt_id(text), text, 0.5 + i) for i, text in enumerate(TEXTS)], path)
    Path("reward").mkdir()
    score.load_reward = train.load_reward = lambda _folder, _device: Redness()


def generate(output: str, params: Path = PARAMS) -> None:
    generate_pairs.main(["--params", str(params), "--prompts", str(TRAIN), "--output", f"{output}/candidates"])


def make_pairs(output: str) -> None:
    places = {"candidates": "one/candidates", "reward": "reward", "output": f"{output}/pairs"}
    score.main(["--params", str(PARAMS), *(part for key, place in places.items() for part in (f"--{key}", place))])


def tune(output: str) -> None:
    places = {"pairs": "one/pairs", "reward": "reward", "validation-prompts": str(VALIDATION)}
    places |= {"output": f"{output}/adapter", "log": f"{output}/training"}
    train.main(["--params", str(PARAMS), *(part for key, place in places.items() for part in (f"--{key}", place))])


def judge(output: str) -> None:
    """Sampling and judging as `evaluate` does them; 7 images in batches of 2."""
    distributed.start()
    params = load_params(PARAMS)
    settings, folder = params.active.evaluate, Path(output) / "images"
    requests = evaluation_requests([Prompt(prompt_id(text), text) for text in TEXTS], 1, 2, 2)
    pipe = load_pipeline(params.active.base, torch.device("cpu"))
    sample_to_shards(pipe, requests, settings.sampler, RESOLUTION, 0, settings.batch_size, folder)
    images = load_shards(folder)
    judges = Judges(Redness(), False, None, settings.batch_size, 1)  # has what is called of a scorer
    groups = {"base": images, "few": images.take(np.array([4]))}
    judged = evaluate.judged(judges, groups)
    if distributed.first():
        scores = {name: {c: s.tolist() for c, s in group.scores.items()} for name, group in judged.items()}
        (Path(output) / "scores.json").write_text(json.dumps(scores))
    distributed.wait()
    distributed.stop()


def die(rank: int, call: int, holder: object, name: str) -> None:
    """Make the given call of a function the end of the process that has this rank."""
    real, calls = getattr(holder, name), 0

    def dying(*args: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if distributed.rank() == rank and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keywords)

    setattr(holder, name, dying)


def generate_and_die(output: str) -> None:
    die(1, 2, candidates, "write_table")
    generate(output)


def tune_and_die(output: str) -> None:
    die(1, KILLED_AT, torch.nn.utils, "clip_grad_norm_")
    tune(output)


def launch(n: int, scratch: str, task: Callable[..., None], *args: object) -> bool:
    """Whether all of ``n`` processes ended well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def inside(rank: int) -> None:
        os.environ |= {"DSPO_SCRATCH": f"scratch-{scratch}", "DSPO_DEVICE": "cpu"}
        if n > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        task(*args)

    started = [get_context("fork").Process(target=inside, args=(rank,)) for rank in range(n)]
    for process in started:
        process.start()
    running = {process.sentinel: process for process in started}
    while running:
        for sentinel in connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode:
                for other in running.values():
                    other.terminate()
    return all(process.exitcode == 0 for process in started)


def main() -> None:
    os.chdir(sys.argv[1])
    project()
    for n, name in ((1, "one"), (2, "two")):
        for task in (generate, make_pairs, tune, judge):
            assert launch(n, name, task, name), (name, task)

    assert not launch(2, "killed", generate_and_die, "killed")
    left = sorted(path.name for path in Path("scratch-killed").rglob("*.parquet"))
    Path("left.json").write_text(json.dumps(left))
    assert launch(3, "killed", generate, "killed")

    assert not launch(2, "killed", tune_and_die, "killed")
    (checkpoint,) = Path("scratch-killed").rglob("checkpoint.pt")
    Path("step.json").write_text(str(torch.load(checkpoint, weights_only=True)["step"]))
    assert launch(1, "killed", tune, "killed")

    raw = yaml.safe_load(PARAMS.read_text())
    raw["worlds"]["shapes"]["generate"]["batch_size"] = 3
    Path("batch.yaml").write_text(yaml.safe_dump(raw))
    assert launch(1, "batch", generate, "batch", Path("batch.yaml"))


if __name__ == "__main__":
    main()
