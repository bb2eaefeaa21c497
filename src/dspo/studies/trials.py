"""Adapters trained by recipe and judged at once; every result is a small JSON file, made once."""

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dspo.data.prompts import Prompt
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import sample
from dspo.environment import device
from dspo.evaluation.judges import Judges
from dspo.evaluation.paired import evaluation_requests
from dspo.params import Params, TrainParams
from dspo.preference.dataset import Pairs, held_out_draws, make_batch, rows_of
from dspo.preference.dora import Adapter, add_dora, add_lora
from dspo.preference.losses import Needs
from dspo.preference.method import predict
from dspo.preference.schedule import NoiseSchedule
from dspo.preference.trainer import RanAway, train
from dspo.studies.common import cached

HELD_OUT_PAIRS = 10  # watched while training; nothing is chosen by them
PREDICTIONS = Needs(loser="none", reference=True, omega=False)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an adapter, beside the base model."""

    pairs: str  # name of the set of pairs
    train: TrainParams
    seed: int
    permute_k: bool = False
    lora: bool = False  # in DoRA's place

    def as_json(self) -> dict[str, Any]:
        train = self.train.model_dump(mode="json")
        how = {"permute_k": self.permute_k, "lora": self.lora}
        return {"pairs": self.pairs, "train": train, "seed": self.seed, **how}


@dataclass(frozen=True)
class PromptSet:
    """Prompts that images are judged on, always from the same noise."""

    name: str
    prompts: list[Prompt]
    images_per_prompt: int
    noise_seed: int


@dataclass(frozen=True)
class Result:
    """An adapter's images as judged."""

    scores: dict[str, Array]  # columns of Judges.score, [n_prompts * images_per_prompt], prompt by prompt
    drift: float  # mean ||e - r||^2 / D on fixed noise
    seconds: float  # of training

    def mean(self, column: str) -> float:
        return float(self.scores[column].mean())


class Trials:
    """Trains and judges what has no result in ``folder`` yet."""

    def __init__(self, params: Params, judges: Judges, pairs: Mapping[str, tuple[Pairs, Pairs]], folder: Path) -> None:
        self.params, self.judges, self.pairs, self.folder = params, judges, pairs, folder
        self.pipe = load_pipeline(params.active.base, device())
        self.reference = self.pipe.unet
        self.schedule = NoiseSchedule.of(self.pipe.scheduler, device())

    def base(self, on: PromptSet) -> Result:
        def make() -> dict[str, Any]:
            self.pipe.unet = self.reference
            return {"scores": self._judged(on), "drift": 0.0, "seconds": 0.0}

        return _result(cached(self.folder / f"base-{on.name}.json", make))

    def run(self, recipe: Recipe, on: PromptSet) -> Result | None:
        """Train by ``recipe``, keep the last epoch's parameters and judge; ``None`` if the training ran away."""
        text = json.dumps([recipe.as_json(), on.name], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        result = cached(self.folder / f"{key}.json", lambda: self._make(recipe, on, self.folder / key))
        shutil.rmtree(self.folder / key, ignore_errors=True)
        return None if "error" in result else _result(result)

    def _make(self, recipe: Recipe, on: PromptSet, folder: Path) -> dict[str, Any]:
        self.pipe.unet = copy.deepcopy(self.reference)
        add = add_lora if recipe.lora else add_dora
        adapter = add(self.pipe.unet, recipe.train, recipe.seed)
        pairs, held_out = self.pairs[recipe.pairs]
        start = time.monotonic()
        try:
            train(
                adapter,
                self.schedule,
                pairs,
                first_pairs(held_out, HELD_OUT_PAIRS),
                recipe.train,
                recipe.seed,
                folder,
                permute_k=recipe.permute_k,
            )
        except RanAway as error:
            return {"recipe": recipe.as_json(), "error": str(error)}
        seconds = time.monotonic() - start
        drift = self._drift(adapter, recipe.train.batch_size)
        if not math.isfinite(drift):
            return {"recipe": recipe.as_json(), "error": "the adapter's predictions are no numbers"}
        return {
            "recipe": recipe.as_json(),
            "scores": self._judged(on),
            "drift": drift,
            "seconds": seconds,
        }

    def _judged(self, on: PromptSet) -> dict[str, list[float]]:
        world = self.params.active
        size = world.evaluate.batch_size
        requests = evaluation_requests(on.prompts, on.images_per_prompt, 0, on.images_per_prompt)
        samples = sample(self.pipe, requests, world.evaluate.sampler, world.base.resolution, on.noise_seed, size)
        images = [one.image for one in samples]
        scores = self.judges.score(images, [request.prompt.text for request in requests])
        return {name: column.tolist() for name, column in scores.items()}

    @torch.no_grad()
    def _drift(self, adapter: Adapter, batch_size: int) -> float:
        """On the held-out pairs' winners of the set "reward", whatever the adapter was trained on."""
        pairs = self.pairs["reward"][1]
        draws = held_out_draws(pairs, 0, self.schedule.n_timesteps)
        distances = []
        for start in range(0, len(draws), batch_size):
            unet = adapter.unet
            batch = make_batch(pairs, draws[start : start + batch_size], self.schedule, unet.dtype, unet.device)
            p = predict(adapter, batch, PREDICTIONS)
            assert p.r_w is not None
            distances.append((p.e_w - p.r_w).square().flatten(1).mean(1))
        return torch.cat(distances).mean().item()


def equal_steps(epochs: int, of_pairs: int, pairs: int) -> int:
    """Epochs over ``pairs`` pairs that take about as many steps as ``epochs`` over ``of_pairs``."""
    return max(1, round(epochs * of_pairs / pairs))


def first_pairs(pairs: Pairs, count: int) -> Pairs:
    return rows_of(pairs, list(range(min(count, len(pairs)))))


def _result(value: Mapping[str, Any]) -> Result:
    scores = {name: np.array(column) for name, column in value["scores"].items()}
    return Result(scores, value["drift"], value["seconds"])
