"""The table of losses, from judged trials."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from dspo.data.keys import keyed_seed
from dspo.data.records import GOLD, PROXY
from dspo.evaluation.judges import FULLY_RIGHT
from dspo.evaluation.statistics import HeadToHead, head_to_head, holm, mean
from dspo.params import Params, TrainParams
from dspo.studies.arms import Outcome, best
from dspo.studies.trials import Result

Array = npt.NDArray[np.float64]

RESAMPLES = 20_000  # with m contests Holm's correction can find one separable only if 0.05 / m > 2 / RESAMPLES

# What a claim about DSPO needs beside sft and dpo, and what it costs to keep the reference of fixed draws.
OURS = ("dspo, hinge", "dspo_hinge", "dspo, two-sided", "dspo_two_sided")  # in the table of losses, and in the matrix
CLAIMS = (
    ("dspo", "dspo, beta = 0"),
    ("dspo", "dspo, k permuted"),
    ("dspo", "dspo, random labels"),
    ("dspo, two-sided", "dspo, two-sided, random labels"),
    *((name, rival) for name in OURS for rival in ("dspo", "ipo", "capo", "mapo")),
    ("dspo, hinge", "dspo, two-sided"),
    ("dspo_hinge", "dspo_two_sided"),
    ("dspo, two-sided, 1 fixed draw", "dspo, two-sided"),
    ("dspo, two-sided, 4 fixed draws", "dspo, two-sided"),
    ("fixed_draw", "dspo_hinge"),
)


def table(finals: Mapping[str, list[Result | None]], base: Result, n_prompts: int, params: Params) -> dict[str, Any]:
    """Each arm against base, sft and dpo, and DSPO against controls and rivals; p-values corrected over all but base.

    ``finals``: one result per training seed, the same seeds in every arm. An arm of which a training ran away has no
    figures but how many did.
    """
    evaluate = params.active.evaluate
    whole = {name: [r for r in results if r is not None] for name, results in finals.items() if None not in results}
    gold = {name: np.stack([_per_prompt(r, n_prompts) for r in results]) for name, results in whole.items()}

    def compare(first: str, other: Array, label: str) -> HeadToHead:
        key = keyed_seed(params.seed, "losses", first, label)
        return head_to_head(gold[first] - other, evaluate.tie_band, RESAMPLES, key)

    planned = [(arm, other) for other in ("sft", "dpo") for arm in finals if arm not in ("sft", other)]
    planned += CLAIMS
    contests = [(a, b, compare(a, gold[b], b)) for a, b in planned if a in gold and b in gold]
    adjusted = holm([contest.p_value for _, _, contest in contests])
    base_gold = _per_prompt(base, n_prompts)[None]
    return {
        "arms": {
            name: {
                "ran_away": results.count(None),
                "against_base": asdict(compare(name, base_gold, "base")) if name in gold else None,
                **_means(whole.get(name, [])),
            }
            for name, results in finals.items()
        },
        "base": _means([base]),
        "head_to_head": [
            {"first": a, "second": b, **asdict(contest), "p_holm": p, "separable": p < 0.05}
            for (a, b, contest), p in zip(contests, adjusted, strict=True)
        ],
    }


def _per_prompt(result: Result, n_prompts: int) -> Array:
    """Gold scores [n_prompts, images_per_prompt]."""
    return result.scores[GOLD].reshape(n_prompts, -1)


def _means(results: list[Result]) -> dict[str, float | None]:
    """Over trainings and images; None where there is no training to speak of."""
    columns = {
        "gold": [r.mean(GOLD) for r in results],
        "proxy": [r.mean(PROXY) for r in results],
        "fully_right": [r.mean(FULLY_RIGHT) for r in results],
        "drift": [r.drift for r in results],
        "training_seconds": [r.seconds for r in results],
    }
    return {name: float(np.mean(column)) if column else None for name, column in columns.items()}


def matched_drift(tuning: Mapping[str, list[Outcome]], prompt_ids: list[str], params: Params) -> dict[str, Any]:
    """Of each arm the trial whose drift is nearest to that of sft's best: its gold score less sft's, same noise.

    One training seed, and the prompts that chose sft's setting: an indication, no test.
    """
    sft = best(tuning["sft"])[1]
    if sft is None:
        return {}
    rows: dict[str, Any] = {}
    for arm, outcomes in tuning.items():
        whole = [(train, result) for train, result in outcomes if result is not None]
        if not whole:
            continue
        train, nearest = min(whole, key=lambda outcome: abs(outcome[1].drift - sft.drift))
        key = keyed_seed(params.seed, "matched drift", arm)
        delta = nearest.scores[GOLD] - sft.scores[GOLD]
        estimate = mean(delta, prompt_ids, params.active.evaluate.bootstrap_resamples, key)
        rows[arm] = told(train) | {"drift": nearest.drift, "gold_less_sft": asdict(estimate)}
    return rows


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    rate = row["against_base"] or dict.fromkeys(("win_rate", "low", "high"))
    return {f"{key}_over_base": rate[key] for key in ("win_rate", "low", "high")} | {
        key: value for key, value in row.items() if key != "against_base"
    }


def told(train: TrainParams) -> dict[str, Any]:
    return train.model_dump(mode="json", include={"loss", "lr", "beta", "lam", "mapo_scale", "epochs"})


def fared(outcome: Outcome) -> dict[str, Any]:
    train, result = outcome
    if result is None:
        return told(train) | {"ran_away": True}
    return told(train) | {"gold": result.mean(GOLD), "proxy": result.mean(PROXY), "drift": result.drift}
