"""From judged images to figures: base against tuned, and the rows that say what the figures are worth.

Every function takes :class:`Images` whose rows correspond and returns JSON values; what a world's judges cannot say is
``None``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspo.data.keys import keyed_seed
from dspo.data.records import GOLD, PROXY
from dspo.evaluation.diversity import spread_ratios
from dspo.evaluation.drift import DRIFT
from dspo.evaluation.judges import FOREIGN_COLUMNS, FREE_ATTRIBUTES, FULLY_RIGHT, GOLD_COLUMNS, SECOND
from dspo.evaluation.paired import Images
from dspo.evaluation.statistics import WinRate, mean, share_given, win_rate

Array = npt.NDArray[np.float64]
Figures = dict[str, Any]
LEAST_DECIDED = 30  # with fewer, a percentile bootstrap is too sure: one win in one decided image gives [1, 1]


@dataclass(frozen=True)
class Comparison:
    """How images are compared: the gold judge's tie band and the bootstrap."""

    tie_band: float
    resamples: int
    seed: int

    def tau(self, column: str) -> float:
        """The tie band of a score column: that of gold on gold's scale; 0 elsewhere, where only equal scores tie."""
        return self.tie_band if column in GOLD_COLUMNS else 0.0

    def key(self, *parts: object) -> int:
        return keyed_seed(self.seed, "bootstrap", *parts)

    def win_rates(self, first: Images, second: Images) -> dict[str, WinRate]:
        """Decided win rate of ``first`` over ``second`` by every score column that both have."""
        return {
            column: win_rate(
                first.scores[column] - second.scores[column],
                first.prompt_ids,
                self.tau(column),
                self.resamples,
                self.key(column),
            )
            for column in judge_columns(first)
        }

    def win_rate_figures(self, first: Images, second: Images) -> Figures:
        return {column: asdict(rate) for column, rate in self.win_rates(first, second).items()}

    def change(self, column: str, base: Images, tuned: Images) -> Figures:
        """Means of a column and their paired difference."""
        before, after = base.scores[column], tuned.scores[column]
        ids = base.prompt_ids
        return {
            "base": asdict(mean(before, ids, self.resamples, self.key(column))),
            "tuned": asdict(mean(after, ids, self.resamples, self.key(column))),
            "difference": asdict(mean(after - before, ids, self.resamples, self.key(column))),
        }


def judge_columns(images: Images) -> list[str]:
    """The columns that judge an image, as against those that describe it."""
    rewards = [name for name in images.scores if name.startswith("reward_")]
    wanted = [*rewards, *GOLD_COLUMNS, SECOND, *FOREIGN_COLUMNS]
    return [name for name in wanted if name in images.scores]


def tuned_against_base(base: Images, tuned: Images, how: Comparison) -> Figures:
    """The main table: win rates, mean scores, rightness, diversity and drift."""
    return {
        "win_rates": how.win_rate_figures(tuned, base),
        "scores": {column: how.change(column, base, tuned) for column in judge_columns(base)},
        "fully_right": _fully_right(base, tuned, how),
        "diversity": _diversity(base, tuned, how),
        "drift": {name: how.change(f"drift_{name}", base, tuned) for name in DRIFT},
    }


def _fully_right(base: Images, tuned: Images, how: Comparison) -> Figures | None:
    """Share of fully right images, and of the wrong ones that became right (fixed) and the right ones that broke."""
    if FULLY_RIGHT not in base.scores:
        return None
    before, after, ids = base.scores[FULLY_RIGHT] > 0.5, tuned.scores[FULLY_RIGHT] > 0.5, base.prompt_ids
    return how.change(FULLY_RIGHT, base, tuned) | {
        "fixed": asdict(share_given(after, ~before, ids, how.resamples, how.key("fixed"))),
        "broken": asdict(share_given(~after, before, ids, how.resamples, how.key("broken"))),
    }


def _diversity(base: Images, tuned: Images, how: Comparison) -> Figures:
    """Spread within a prompt, tuned / base: among fully right images (where gold can say), and among all."""

    def ratios(kept: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]) -> Figures:
        estimates = spread_ratios(
            base.prompt_ids,
            kept,
            (base.images, tuned.images),
            (_attributes(base), _attributes(tuned)),
            how.resamples,
            how.key("diversity"),
        )
        return {name: asdict(estimate) for name, estimate in estimates.items()}

    everything = np.ones(len(base.images), dtype=bool)
    among_right = None
    if FULLY_RIGHT in base.scores:
        among_right = ratios((base.scores[FULLY_RIGHT] > 0.5, tuned.scores[FULLY_RIGHT] > 0.5))
    return {"among_fully_right": among_right, "among_all": ratios((everything, everything))}


def _attributes(images: Images) -> dict[str, Array]:
    return {
        name: np.stack([images.scores[column] for column in columns], axis=1)
        for name, columns in FREE_ATTRIBUTES.items()
        if columns[0] in images.scores
    }


def base_against_base(base: Images, how: Comparison) -> Figures:
    """The null: the base model's second seed against its first, by every judge. Nothing should win."""
    return how.win_rate_figures(*_second_and_first_seed(base))


def agreement_with_gold(base: Images, how: Comparison) -> Figures | None:
    """How often each other judge orders a prompt's first two base images as gold does, where gold tells them apart."""
    if GOLD not in base.scores:
        return None
    second, first = _second_and_first_seed(base)
    delta = {column: second.scores[column] - first.scores[column] for column in judge_columns(base)}
    decided = np.abs(delta[GOLD]) > how.tie_band
    return {
        column: asdict(
            share_given(
                delta[column] * delta[GOLD] > 0, decided, first.prompt_ids, how.resamples, how.key("agreement", column)
            )
        )
        for column in delta
        if column not in GOLD_COLUMNS
    }


def _second_and_first_seed(base: Images) -> tuple[Images, Images]:
    """Of the prompts that have both, row by row."""
    second = base.where(base.sample_index == 1)
    with_second = set(second.prompt_ids)
    has_second = np.array([pid in with_second for pid in base.prompt_ids], dtype=bool)
    return second, base.where((base.sample_index == 0) & has_second)


def best_of_n(base: Images, tuned: Images, n: int, how: Comparison) -> Figures:
    """The best of a prompt's ``n`` base images by the training reward, against each of the ``n``, and against tuned.

    ``base`` and ``tuned`` hold exactly ``n`` images of each prompt, prompt by prompt. Costs ``n`` images per answer
    where the adapter costs one.
    """
    best_of_prompt = base.scores[PROXY].reshape(-1, n).argmax(axis=1) + n * np.arange(len(base.images) // n)
    best = base.take(np.repeat(best_of_prompt, n))
    return {
        "n": n,
        "images_per_answer": n,
        "best_against_base": how.win_rate_figures(best, base),
        "tuned_against_best": how.win_rate_figures(tuned, best),
        "tuned_against_base": how.win_rate_figures(tuned, base),
        "fully_right": how.change(FULLY_RIGHT, base, best) if FULLY_RIGHT in base.scores else None,
    }


def combinations(
    base: Images,
    tuned: Images,
    combination: Callable[[str], object],
    train_prompts: Sequence[str],
    how: Comparison,
) -> Figures:
    """Win rates for test prompts whose combination of attributes was in training, and for those where it was not."""
    known = {combination(prompt) for prompt in train_prompts}
    seen = np.array([combination(prompt) in known for prompt in base.captions], dtype=bool)
    return {
        name: how.win_rate_figures(tuned.where(mask), base.where(mask))
        for name, mask in (("seen", seen), ("unseen", ~seen))
    }


def improved(rate: WinRate) -> bool:
    """The interval lies above one half, and there are enough decided images for it to mean anything."""
    return rate.low is not None and rate.low > 0.5 and rate.n_decided >= LEAST_DECIDED


def worse(rate: WinRate) -> bool:
    """The interval lies below one half, and there are enough decided images for it to mean anything."""
    return rate.high is not None and rate.high < 0.5 and rate.n_decided >= LEAST_DECIDED


def over_optimised(rates: dict[str, WinRate]) -> bool | None:
    """Proxy up, gold not: gold's whole interval lies below the proxy's, and reaches down to one half or farther.

    What the proxy gains where gold gains nothing is the proxy's error, whether gold has fallen yet or not (Gao et al.
    2022, arXiv 2210.10760). False where gold decided too few; ``None`` where there is no gold judge.
    """
    if GOLD not in rates:
        return None
    proxy, gold = rates[PROXY], rates[GOLD]
    if gold.high is None or proxy.low is None or gold.n_decided < LEAST_DECIDED:
        return False
    return improved(proxy) and not improved(gold) and gold.high < proxy.low


def verdict(rates: dict[str, WinRate]) -> Figures:
    """What may be said of each judge's win rate, and by which rule."""
    return {
        "improved": {column: improved(rate) for column, rate in rates.items()},
        "worse": {column: worse(rate) for column, rate in rates.items()},
        "over_optimised": over_optimised(rates),
        "rule": (
            f"improved: low > 0.5; worse: high < 0.5; both with n_decided >= {LEAST_DECIDED}; "
            f"over_optimised: improved by {PROXY}, not by {GOLD}, whose high is below the other's low"
        ),
    }
