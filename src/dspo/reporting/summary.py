"""One file of figures: the same numbers for people, programs and gates."""

from typing import Any

from dspo.reporting.tables import Json
from dspo.reward.judged import judged_part

SAME_RATINGS = ("n_pairs", "ceiling_macro_f1")


def summarise(
    results: Json, reward_report: Json, backbone: str, training: Json, ablation: Json | None
) -> dict[str, Any]:
    """What ``reports/summary.json`` holds. ``None`` where the world has no gold judge or the study was not run.

    ``results``: of the stage evaluate; ``reward_report``: of train_reward; ``backbone``: sha256 of the reward model's;
    ``training``: metrics.json of train; ``ablation``: the committed reports/studies/ablation.json; its plain head
    counts where it stood on the same backbone and saw the same ratings.
    """
    tuned = results["tuned_against_base"]
    reward = judged_part(reward_report)
    return {
        "evaluation": {
            "gold": win_rate(tuned["win_rates"], "gold_overall"),
            "reward": win_rate(tuned["win_rates"], "reward_overall"),
            "fully_right": fully_right(tuned),
            "diversity_ratio": diversity_ratio(tuned),
            "hacks": {
                name: {"gold": win_rate(rates, "gold_overall"), "reward": win_rate(rates, "reward_overall")}
                for name, rates in results["hacks"].items()
            },
        },
        "reward_model": {
            "macro_f1": reward["macro_f1"],
            "ci95": [reward["macro_f1_low"], reward["macro_f1_high"]],
            "ceiling": reward["ceiling_macro_f1"],
            "constant_f1": reward["constant_f1"],
            "n_pairs": reward["n_pairs"],
            "n_prompts": reward["n_prompts"],
            "plain_head_macro_f1": plain_head(reward, backbone, ablation),
        },
        "train": {"loss": training["train_loss"], "steps": training["steps"], "pairs": training["pairs"]},
    }


def plain_head(reward: Json, backbone: str, ablation: Json | None) -> float | None:
    """Macro-F1 of the ablation's plain head; None where the ablation is missing, of another backbone or ratings."""
    if ablation is None or ablation["backbone_sha256"] != backbone:
        return None
    if any(ablation[name] != reward[name] for name in SAME_RATINGS):
        return None
    figure: float = ablation["plain_head_macro_f1"]
    return figure


def win_rate(rows: Json, judge: str) -> dict[str, Any] | None:
    row = rows.get(judge)
    if row is None:
        return None
    names = ("win_rate", "n_prompts", "n_images", "n_decided", "tie_share", "win_rate_ties_half")
    return {name: row[name] for name in names} | {"ci95": [row["low"], row["high"]]}


def fully_right(tuned: Json) -> dict[str, Any] | None:
    row = tuned["fully_right"]
    if row is None:
        return None
    difference = row["difference"]
    return {
        "base": row["base"]["value"],
        "tuned": row["tuned"]["value"],
        "ci95": [difference["low"], difference["high"]],
    }


def diversity_ratio(tuned: Json) -> float | None:
    """Among fully right images of a prompt, tuned over base: the lower of free attributes and pixel distance."""
    spread = tuned["diversity"]["among_fully_right"] or {}
    values = [spread[name]["value"] for name in ("attributes", "pixels") if name in spread]
    known = [value for value in values if value is not None]
    return min(known) if known else None
