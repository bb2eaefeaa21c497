"""The report's page: one HTML file with everything in it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Json = Mapping[str, Any]
SHOWN = 8  # image pairs of each kind


@dataclass(frozen=True)
class Shown:
    """One image pair of the grid."""

    prompt: str
    base: str  # data URI
    tuned: str
    delta: float
    scores: str


def choose(base: pd.DataFrame, tuned: pd.DataFrame, column: str) -> dict[str, list[Shown]]:
    """The biggest wins, the biggest losses and the middle by the difference of ``column``; one pair per prompt."""
    delta = (tuned[column] - base[column]).rename("delta")
    order = delta.sort_values(kind="stable", ascending=False).index
    firsts = base.loc[order].drop_duplicates("prompt_id").index
    lasts = base.loc[order[::-1]].drop_duplicates("prompt_id").index
    middle = len(firsts) // 2 - SHOWN // 2
    kinds = {
        "biggest wins": firsts[:SHOWN],
        "from the middle": firsts[middle : middle + SHOWN],
        "biggest losses": lasts[:SHOWN],
    }
    return {
        kind: [_shown(base.loc[i], tuned.loc[i], float(delta[i]), column) for i in rows] for kind, rows in kinds.items()
    }


def _shown(base: "pd.Series[Any]", tuned: "pd.Series[Any]", delta: float, column: str) -> Shown:
    scores = f"{column.replace('_', ' ')}: base {base[column]:.3f}, tuned {tuned[column]:.3f}"
    return Shown(base["caption"], data_uri(base["image"]), data_uri(tuned["image"]), delta, scores)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def verdict(results: Json) -> str:
    """One sentence: effect size, judge, n and the best-of-n figure. "Better" only where the interval says so."""
    rows = results["tuned_against_base"]["win_rates"]
    judge = "gold_overall" if "gold_overall" in rows else "reward_overall"
    row, state = rows[judge], results["verdict"]
    name = "the gold judge" if judge == "gold_overall" else "its own training reward, the only judge of this world"
    if row["win_rate"] is None:
        return f"Nothing can be said: {name} decided no image pair."
    figures = (
        f"{row['win_rate']:.1%} of {row['n_decided']} decided images "
        f"(95 % interval {row['low']:.1%} to {row['high']:.1%}, "
        f"{row['tie_share']:.0%} of {row['n_images']} undecided)"
    )
    if state["over_optimised"]:
        said = f"Over-optimised: the reward went up and {name} down; tuned wins only {figures}."
    elif state["improved"][judge]:
        said = f"Improved by {name}: tuned beats base on {figures}."
    elif state["worse"][judge]:
        said = f"Worse by {name}: tuned beats base on only {figures}."
    else:
        said = f"Not separable from the base by {name}: tuned wins {figures}."
    best = (results["best_of_n"]["best_against_base"] or {}).get(judge)
    if best and best["win_rate"] is not None:
        number = results["best_of_n"]["n"]
        said += f" Taking the best of {number} base images by the reward model wins {best['win_rate']:.1%}."
    return said


def render_page(
    results: Json,
    summary: Json,
    pictures: Mapping[str, Sequence[Shown]],
    figures: Mapping[str, str],
    reward_report: Json,
    params: str,
    hashes: Mapping[str, str],
    studies: Mapping[str, Any],
) -> str:
    """The page's HTML. Texts are escaped; only our own SVG is markup."""
    environment = Environment(
        loader=PackageLoader("dspo.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    return environment.get_template("page.html.j2").render(
        verdict=verdict(results),
        results=results,
        summary=summary,
        pictures=pictures,
        figures={name: Markup(text) for name, text in figures.items()},  # noqa: S704
        reward=reward_report,
        params=params,
        hashes=hashes,
        studies=studies,
    )
