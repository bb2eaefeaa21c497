"""Stage: train the DoRA adapter on the scored pairs.

python -m dspo.stages.train --params params.yaml --pairs data/pairs --reward models/reward
    --validation-prompts data/prompts/validation.csv --output models/adapter --log models/training
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from dspo import distributed
from dspo.data.csv_rows import write_csv
from dspo.data.files import write_json
from dspo.data.prompts import Prompt, read_split
from dspo.diffusion.base import load_pipeline, local_files
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.environment import device
from dspo.errors import UserError
from dspo.params import Params, load_params
from dspo.preference.dataset import load_pairs
from dspo.preference.dora import add_dora
from dspo.preference.schedule import NoiseSchedule
from dspo.preference.trainer import WATCHED, Trained, train
from dspo.reward.checkpoint import RewardScorer, load_reward
from dspo.stages.runner import arguments, run
from dspo.stages.shared import SharedScratch


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "pairs", "reward", "validation-prompts", "output", "log")
    params = load_params(paths.params)
    world = params.active
    pairs, held_out = load_pairs(paths.pairs)
    prompts = read_split(paths.validation_prompts)[: world.train.validation_prompts]
    if not prompts:
        raise UserError(f"{paths.validation_prompts}: no prompts for the reward check; raise prompts.validation_share")
    settings = {
        "seed": params.seed,
        "base": world.base.model_dump(mode="json"),
        "train": world.train.model_dump(mode="json"),
        "sampler": world.evaluate.sampler.model_dump(mode="json"),
        "batch_size": world.evaluate.batch_size,
    }
    inputs = [paths.pairs, paths.reward, paths.validation_prompts, *local_files(world.base)]
    scratch = SharedScratch("train", settings, inputs)

    pipe = load_pipeline(world.base, device())
    adapter = add_dora(pipe.unet, world.train, params.seed)
    schedule = NoiseSchedule.of(pipe.scheduler, device())
    check = RewardCheck(pipe, load_reward(paths.reward, device()), prompts, params)
    trained = train(adapter, schedule, pairs, held_out, world.train, params.seed, scratch.path, check)

    if distributed.first():
        adapter.save(scratch.path / "adapter", world.base.model)
        write_logs(trained, scratch.path / "training")
        write_json(metrics(trained, len(pairs), len(held_out)), scratch.path / "training" / "metrics.json")
    scratch.publish({"adapter": paths.output, "training": paths.log})


class RewardCheck:
    """Mean overall reward of one image per validation prompt, always from the same noise; every process gets it.

    What training does not need, all but the UNet, waits in host memory between the checks.
    """

    def __init__(
        self, pipe: StableDiffusionXLPipeline, scorer: RewardScorer, prompts: list[Prompt], params: Params
    ) -> None:
        self.pipe, self.scorer, self.params = pipe, scorer, params
        self.requests = [SampleRequest(prompt, sample_index=0, noise_index=0) for prompt in prompts]
        self._waiting: list[nn.Module] = [pipe.vae, pipe.text_encoder, pipe.text_encoder_2, scorer.model]
        self._move(torch.device("cpu"))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """VAE, text encoders and reward model on the device, for images to be made and scored."""
        self._move(device())
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, place: torch.device) -> None:
        for part in self._waiting:
            part.to(place)

    def __call__(self, _unet: UNet2DConditionModel) -> float:
        with self.on_device():
            return self._score()

    def _score(self) -> float:
        world, size = self.params.active, self.params.active.evaluate.batch_size
        seed = self.params.seed
        requests = distributed.share(self.requests, size)
        samples = list(sample(self.pipe, requests, world.evaluate.sampler, world.base.resolution, seed, size))
        captions = [request.prompt.text for request in requests]
        scores = self.scorer.score([s.image for s in samples], captions, size)
        overall = scores[:, self.scorer.heads.index("overall")]
        return float(np.mean(distributed.merged(list(overall), size)))


def metrics(trained: Trained, n_pairs: int, n_held_out: int) -> dict[str, float | None]:
    """The best epoch's figures, and the untrained adapter's reward beside them."""
    start, best = trained.epochs[0], trained.epochs[trained.best_epoch]
    last = [row["loss"] for row in trained.log if row["epoch"] == trained.epochs[-1]["epoch"]]
    return {
        "pairs": n_pairs,
        "held_out_pairs": min(n_held_out, WATCHED),
        "steps": trained.steps,
        "best_epoch": trained.best_epoch,
        "train_loss": sum(loss for loss in last if loss is not None) / len(last),
        "held_out_loss": best["loss"],
        "implicit_accuracy": best["implicit_accuracy"],
        "margin": best["margin"],
        "u_std": best["u_std"],
        "reward_base": start["reward"],
        "reward": best["reward"],
    }


def write_logs(trained: Trained, folder: Path) -> None:
    """``log.csv``, a row per step, and ``epochs.csv``; a figure that was not measured is an empty cell."""
    for name, rows in (("log", trained.log), ("epochs", trained.epochs)):
        write_csv(rows, list(rows[0]), folder / f"{name}.csv")


if __name__ == "__main__":
    run(main, "dspo.stages.train")
