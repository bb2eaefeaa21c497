"""The figures that matter and the bounds they must hold: ``python -m dspo.reporting.gates reports/summary.json``.

Exit code 1 if a bound does not hold, 2 if the file is not there or no summary. ``--floor NAME=VALUE``, once for each,
names a figure that may miss its bound, but not this value.
"""

import argparse
import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspo.data.files import read_json
from dspo.errors import UserError

HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Gate:
    name: str
    value: float | None
    bound: str
    holds: bool


def gates(summary: Mapping[str, Any]) -> list[Gate]:
    """Every bound of the main job; none in a world without a gold judge. A figure that is not there does not hold."""
    evaluation, reward = summary["evaluation"], summary["reward_model"]
    gold, right = evaluation["gold"], evaluation["fully_right"]
    if gold is None or right is None:
        return []
    share = reward["macro_f1"] / reward["ceiling"] if reward["macro_f1"] and reward["ceiling"] else None
    rise = right["tuned"] - right["base"]
    hacks = [rates["gold"] for rates in evaluation["hacks"].values()]
    return [
        held("gold win rate of tuned over base", gold["win_rate"], ">=", 0.70),
        held("gold win rate, decided images", gold["n_decided"], ">=", 300),
        held("gold win rate, lower end of its interval", gold["ci95"][0], ">", 0.60),
        held("fully right, tuned - base", rise, ">=", 0.05),
        held("fully right, lower end of its interval", right["ci95"][0], ">", 0.0),
        between("fully right, base at its best sampler", right["base"], 0.50, 0.75),
        held("diversity among right images, tuned / base", evaluation["diversity_ratio"], ">=", 0.9),
        held("gold win rate of a hack, the highest", highest(hack["win_rate"] for hack in hacks), "<=", 0.5),
        held("gold win rate of a hack, highest upper end", highest(hack["ci95"][1] for hack in hacks), "<", 0.55),
        held("reward model, macro-F1", reward["macro_f1"], ">=", 0.8333),
        held("reward model, share of the ceiling", share, ">=", 0.93),
        between("reward model, ceiling of the ratings", reward["ceiling"], 0.89, 0.91),
        held("reward model, decided test pairs", reward["n_pairs"], ">=", 2000),
        held("reward model, test prompts", reward["n_prompts"], ">=", 500),
    ]


def highest(values: Iterable[float | None]) -> float | None:
    """None if there is no value, or one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return max(known) if found and len(known) == len(found) else None


def held(name: str, value: float | None, sign: str, bound: float) -> Gate:
    return Gate(name, value, f"{sign} {bound:g}", value is not None and HOLDS[sign](value, bound))


def between(name: str, value: float | None, low: float, high: float) -> Gate:
    return Gate(name, value, f"{low:g} .. {high:g}", value is not None and low <= value <= high)


def table(rows: list[Gate]) -> str:
    lines = [f"{'':6} {'figure':44} {'value':>8}  bound"]
    for row in rows:
        value = "none" if row.value is None else f"{row.value:.4g}"
        lines.append(f"{'holds' if row.holds else 'FAILS':6} {row.name:44} {value:>8}  {row.bound}")
    return "\n".join(lines)


def read_gates(path: Path) -> list[Gate]:
    """Raises :class:`UserError` if the file is missing or lacks a figure."""
    try:
        return gates(read_json(path))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not the report's summary ({error}). Make it: `dvc repro report`") from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dspo.reporting.gates", description=__doc__)
    parser.add_argument("summary", type=Path)
    parser.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=floor,
        help="a figure that may miss its bound, and the least that it must be",
    )
    args = parser.parse_args(argv)
    try:
        rows = read_gates(args.summary)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows) if rows else "no gold judge in this world: nothing to hold the figures against")
    failed = {row.name for row in rows if not row.holds}
    floors = dict(args.floor)
    values = {row.name: row.value for row in rows}
    if rows and (unknown := floors.keys() - values.keys()):
        print(f"error: --floor: no such figure: {'; '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if failed:
        print(f"{len(failed)} of {len(rows)} bounds do not hold: {'; '.join(sorted(failed))}", file=sys.stderr)
    lower = {row.name for row in rows if row.bound.startswith(">")}
    excused = {name for name in lower & floors.keys() if (value := values[name]) is not None and value >= floors[name]}
    return 1 if failed - excused else 0


def floor(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
