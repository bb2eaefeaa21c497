"""The figures that matter and the bounds they must hold: ``python -m dspo.reporting.gates reports/summary.json``.

Exit code 1 if a bound does not hold, 2 if the file is not there.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspo.data.files import read_json
from dspo.errors import UserError

CEILING = (0.89, 0.91)


@dataclass(frozen=True)
class Gate:
    name: str
    value: float | None
    bound: str
    holds: bool


def gates(summary: Mapping[str, Any]) -> list[Gate]:
    """Every bound of the main job, in the world that has a gold judge."""
    evaluation, reward = summary["evaluation"], summary["reward_model"]
    gold, right = evaluation["gold"], evaluation["fully_right"]
    if gold is None or right is None:
        return []
    low = gold["ci95"][0]
    rise, rise_low = right["tuned"] - right["base"], right["ci95"][0]
    diversity, f1, ceiling = evaluation["diversity_ratio"], reward["macro_f1"], reward["ceiling"]
    return [
        Gate("gold win rate of tuned over base", gold["win_rate"], ">= 0.70", at_least(gold["win_rate"], 0.70)),
        Gate("  its decided images", gold["n_decided"], ">= 300", gold["n_decided"] >= 300),
        Gate("  lower end of its 95 % interval", low, "> 0.60", low is not None and low > 0.60),
        Gate("fully right, tuned - base", rise, ">= 0.05", rise >= 0.05),
        Gate("  lower end of its 95 % interval", rise_low, "> 0", rise_low is not None and rise_low > 0),
        Gate("diversity among right images, tuned / base", diversity, ">= 0.9", at_least(diversity, 0.9)),
        Gate("reward model, macro-F1", f1, ">= 0.8333", at_least(f1, 0.8333)),
        Gate("  as a share of the ceiling", f1 / ceiling, ">= 0.93", f1 / ceiling >= 0.93),
        Gate("  ceiling, macro-F1", ceiling, "0.89 .. 0.91", CEILING[0] <= ceiling <= CEILING[1]),
    ]


def at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound


def table(rows: list[Gate]) -> str:
    lines = []
    for row in rows:
        value = "none" if row.value is None else f"{row.value:.4g}"
        lines.append(f"{'holds' if row.holds else 'FAILS':6} {row.name:44} {value:>8}  {row.bound}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    try:
        rows = gates(read_json(Path(argv[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows) if rows else "no gold judge in this world: nothing to hold the figures against")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
