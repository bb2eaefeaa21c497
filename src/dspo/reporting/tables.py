"""The report's tables: figures from the stages' JSON files as texts in rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Names = tuple[str, str]  # of the two sides whose figures stand under "base" and "tuned"
BASE_AND_TUNED: Names = ("base", "tuned")
NONE = "–"
PUBLISHED = {
    "pickscore": "PickScore",
    "hpsv2.1": "HPSv2.1",
    "imagereward": "ImageReward",
    "clip_score": "CLIP score",
    "aesthetics": "LAION aesthetics",
}
JUDGES = {"gold_overall": "gold", "second": "second judge", "reward_overall": "training reward", **PUBLISHED}


@dataclass(frozen=True)
class Table:
    """Texts, ready to be escaped and shown; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""
    figure: str = ""  # name of the drawing that shows the same


def markdown(table: Table) -> str:
    """Title, rows and note of a table, in Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    rows = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return "\n\n".join(part for part in (table.title and f"**{table.title}**", rows, table.note) if part)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:z.{digits}f}"  # z: no "-0.000"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return NONE if low is None or high is None else f"{low:z.{digits}f} to {high:z.{digits}f}"


def main_first(rows: Json) -> dict[str, Any]:
    """The judges that a verdict is read from, in the order of ``JUDGES``, before the single heads."""
    judges = [name for name in JUDGES if name in rows]
    return {name: rows[name] for name in (*judges, *sorted(rows.keys() - JUDGES.keys()))}


def rate(row: Json | None) -> str:
    """A win rate with its interval; a star where it is separable after correction."""
    if row is None or row["win_rate"] is None:
        return NONE
    star = "*" if row.get("separable") else ""
    return f"{row['win_rate']:.2f}{star} ({interval(row['low'], row['high'], 2)})"


def words(name: str) -> str:
    if name in PUBLISHED or name == "second":
        return JUDGES[name]
    return name.removeprefix("drift_").replace("_", " ")


def estimate(row: Json, digits: int = 3) -> list[str]:
    return [number(row["value"], digits), interval(row["low"], row["high"], digits)]


def win_rates(rows: Json) -> Table:
    columns = ("judge", "win rate", "95 % interval", "decided", "images", "prompts", "ties", "ties count half")
    lines = [
        [
            words(name),
            number(row["win_rate"]),
            interval(row["low"], row["high"]),
            *(str(row[key]) for key in ("n_decided", "n_images", "n_prompts")),
            number(row["tie_share"]),
            number(row["win_rate_ties_half"]),
        ]
        for name, row in main_first(rows).items()
    ]
    return Table("Win rates by judge", columns, lines)


def changes(title: str, rows: Json, names: Names = BASE_AND_TUNED) -> Table:
    """Means of both sides, and their paired difference."""
    lines = [
        [
            words(name),
            number(row["base"]["value"], 4),
            number(row["tuned"]["value"], 4),
            *estimate(row["difference"], 4),
        ]
        for name, row in main_first(rows).items()
    ]
    return Table(title, ("", *names, "difference", "95 % interval"), lines)


def fully_right(row: Json, names: Names = BASE_AND_TUNED) -> Table:
    first, second = names
    texts = {
        "base": first,
        "tuned": second,
        "difference": "difference",
        "fixed": f"fixed: wrong in {first}, right in {second}",
        "broken": f"broken: right in {first}, wrong in {second}",
    }
    lines = [[text, *estimate(row[name]), str(row[name]["n"])] for name, text in texts.items()]
    return Table("Fully right images", ("fully right", "share", "95 % interval", "of images"), lines)


def comparisons(results: Json) -> Table:
    """Everything that was compared, by the judges that the world has."""
    best, n = results["best_of_n"], results["best_of_n"]["n"]
    compared: dict[str, Json] = {
        "tuned against base": results["tuned_against_base"]["win_rates"],
        f"best of {n} base images by the reward, against base": best["best_against_base"],
        f"tuned against the best of {n} base images": best["tuned_against_best"],
        "base against base, another seed": results["base_against_base"],
        "base at its best sampler, against the default": results["best_sampler_against_default"],
    }
    compared |= {f"hack of base images: {name}": rates for name, rates in results["hacks"].items()}
    for name, rates in (results["combinations"] or {}).items():
        compared[f"tuned against base, {name} combinations"] = rates
    judges = [name for name in JUDGES if name in compared["tuned against base"]]
    lines = [
        [text, *(cell for judge in judges for cell in (rate(rates[judge]), str(rates[judge]["n_decided"])))]
        for text, rates in compared.items()
    ]
    columns = ("first against second", *(text for judge in judges for text in (JUDGES[judge], "decided")))
    return Table("Comparisons", columns, lines)


def gamed(results: Json) -> list[str]:
    """A sentence for each judge that prefers base images after a trivial change: the interval lies above one half."""
    sentences = []
    for judge, title in JUDGES.items():
        won = [
            f"{name} {rate(rates[judge])}"
            for name, rates in results["hacks"].items()
            if judge in rates and (rates[judge]["low"] or 0) > 0.5
        ]
        if won:
            sentences.append(f"By the {title}, base images win after a trivial change: {', '.join(won)}.")
    return sentences


def agreement(rows: Json) -> Table:
    lines = [
        [words(name), *estimate(row), str(row["n"]), str(row["n_prompts"])] for name, row in main_first(rows).items()
    ]
    columns = ("judge", "same order as gold", "95 % interval", "pairs", "prompts")
    return Table("Agreement with gold on base images", columns, lines)


def diversity(groups: Json, names: Names = BASE_AND_TUNED) -> Table:
    """Spread within a prompt, second side / first, among the images of each group that the world can name."""
    lines = [
        [f"{words(group)}: {words(name)}", *estimate(row), str(row["n_prompts"])]
        for group, rows in groups.items()
        for name, row in (rows or {}).items()
    ]
    return Table("Diversity", ("spread", f"{names[1]} / {names[0]}", "95 % interval", "prompts"), lines)


def training(metrics: Json) -> Table:
    margin = metrics["margin"]
    lines = [
        ["training loss, last epoch", number(metrics["train_loss"], 5)],
        ["held-out loss", number(metrics["held_out_loss"], 5)],
        ["held-out implicit accuracy", number(metrics["implicit_accuracy"])],
        ["held-out margin", NONE if margin is None else f"{margin:.2e}"],
        ["held-out standard deviation of u", number(metrics["u_std"], 2)],
        ["reward, validation prompts", number(metrics["reward"])],
        ["reward of the base, validation prompts", number(metrics["reward_base"])],
    ]
    return Table("Training", ("at the kept epoch", "value"), lines)


def reward_tests(report: Json) -> Table:
    """Classification of test ratings: all pairs, and the two kinds of them."""
    parts = {"all pairs": report, "pairs of the base's own samples": report["base"], "other pairs": report["other"]}
    columns = ("test ratings", "macro-F1", "95 % interval", "pair accuracy", "ceiling", "share of it", "zero-shot")
    lines = [
        [
            text,
            number(part["macro_f1"], 4),
            interval(part["macro_f1_low"], part["macro_f1_high"], 4),
            number(part["pair_accuracy"], 4),
            number(part["ceiling_macro_f1"], 4),
            number(part["share_of_ceiling"]),
            number(part["zero_shot_macro_f1"], 4),
            number(part["constant_f1"], 4),
            str(part["n_pairs"]),
            str(part["n_prompts"]),
        ]
        for text, part in parts.items()
        if part["n_pairs"]
    ]
    return Table("Reward model on test ratings", (*columns, "constant", "pairs", "prompts"), lines)


def reward_heads(report: Json) -> Table:
    columns = ("head", "macro-F1", "95 % interval", "pair accuracy", "pairs", "NLL", "Brier", "ECE", "temperature")
    lines = []
    for name, row in report["heads"].items():
        if isinstance(row, str):  # "untrained"
            lines.append([name, row] + [NONE] * (len(columns) - 2))
            continue
        span = interval(row["macro_f1_low"], row["macro_f1_high"])
        calibration = [number(row[key]) for key in ("nll", "brier", "ece")]
        classified = [number(row["macro_f1"]), span, number(row["pair_accuracy"]), str(row["n_pairs"])]
        lines.append([name, *classified, *calibration, number(row["temperature"], 2)])
    return Table("Heads and calibration", columns, lines)


def inputs(hashes: Mapping[str, str]) -> Table:
    return Table("Inputs", ("input", "md5 of names and contents"), [[name, value] for name, value in hashes.items()])
