"""Sets of pairs that the studies train on, made from the same candidates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dspo.data.images import Pixels
from dspo.data.keys import keyed_uniform
from dspo.data.records import HEADS
from dspo.environment import device
from dspo.params import Params, ScoreParams
from dspo.preference.dataset import Pairs, load_pairs
from dspo.preference.scoring import Scorer, write_pairs
from dspo.shapes.judging import judge_all


@dataclass(frozen=True)
class GoldScorer:
    """The gold judge in the reward model's place: the oracle arm.

    Its scores are gold's over the raters' temperature: differences are log-odds of the raters' votes, as those of a
    reward model nearly are, so that ``score.margin`` suits both.
    """

    raters_temperature: float
    processes: int
    temperature: float = 1.0
    heads: Sequence[str] = HEADS
    untrained: Sequence[str] = ()

    def score(self, images: Sequence[Pixels], captions: Sequence[str], batch_size: int) -> NDArray[np.float64]:
        judged = judge_all(images, captions, [f"candidate of {caption!r}" for caption in captions], self.processes)
        return np.array([[getattr(one, head) for head in HEADS] for one in judged]) / self.raters_temperature


@dataclass(frozen=True)
class NoScorer:
    """Scores that know nothing, different for every image: no selection."""

    seed: int
    temperature: float = 1.0
    heads: Sequence[str] = ("overall",)
    untrained: Sequence[str] = ()

    def score(self, images: Sequence[Pixels], captions: Sequence[str], batch_size: int) -> NDArray[np.float64]:
        return np.array(
            [[keyed_uniform(self.seed, "no score", sha256(image.tobytes()).hexdigest())] for image in images]
        )


def oracle_pairs(candidates: Path, params: Params, processes: int, folder: Path) -> tuple[Pairs, Pairs]:
    """Pairs as the reward model's, but by gold's overall score. Kept in ``folder``."""
    scorer = GoldScorer(params.active.ratings.temperature, processes)
    score = params.active.score.model_copy(update={"weights": {"overall": 1.0}})
    return _pairs(candidates, scorer, params, score, folder)


def unselected_pairs(candidates: Path, params: Params, folder: Path) -> tuple[Pairs, Pairs]:
    """Every candidate is a "winner" once: what SFT learns without any selection. Kept in ``folder``."""
    per_prompt = params.active.generate.candidates_per_sampler * len(params.active.generate.samplers) // 2
    score = params.active.score.model_copy(
        update={"select": "overall", "weights": {"overall": 1.0}, "margin": 0.0, "max_pairs_per_prompt": per_prompt}
    )
    pairs, held_out = _pairs(candidates, NoScorer(params.seed), params, score, folder)
    return both_ways(pairs), held_out


def both_ways(pairs: Pairs) -> Pairs:
    """Each pair, and each pair with winner and loser exchanged."""
    return replace(
        pairs,
        ids=[*pairs.ids, *(f"{pair}-exchanged" for pair in pairs.ids)],
        latents_w=torch.cat([pairs.latents_w, pairs.latents_l]),
        latents_l=torch.cat([pairs.latents_l, pairs.latents_w]),
        delta=torch.cat([pairs.delta, -pairs.delta]),
        weight=pairs.weight.repeat(2),
        size=pairs.size.repeat(2, 1),
        text_row=pairs.text_row.repeat(2),
        latent_sizes=None if pairs.latent_sizes is None else pairs.latent_sizes.repeat(2, 1),
    )


def _pairs(candidates: Path, scorer: Scorer, params: Params, score: ScoreParams, folder: Path) -> tuple[Pairs, Pairs]:
    if not (folder / "summary.json").exists():  # the last file that write_pairs writes
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(candidates, scorer, params.active.base, score, params.seed, device(), folder)
    return load_pairs(folder)
