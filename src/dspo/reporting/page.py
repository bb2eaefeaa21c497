"""The report's page: one HTML file with everything in it."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dspo.reporting import tables
from dspo.reporting.tables import Json, interval, number


def verdict(results: Json) -> str:
    """Effect size, judge, n and the best-of-n figure. "Improved" only where the interval says so."""
    rows = results["tuned_against_base"]["win_rates"]
    judge = main_judge(rows)
    row, state = rows[judge], results["verdict"]
    published = [column for column in tables.PUBLISHED if column in rows]
    name = judge_name(rows)
    if row["win_rate"] is None:
        return f"Nothing can be said: {name} decided no image pair."
    figures = decided(row)
    if state["over_optimised"]:
        said = f"Over-optimised: the reward went up and {name} did not; tuned beats base on only {figures}."
    elif state["improved"][judge]:
        said = f"Improved by {name}: tuned beats base on {figures}."
    elif state["worse"][judge]:
        said = f"Worse by {name}: tuned beats base on only {figures}."
    else:
        said = f"Not separable from the base by {name}: tuned beats base on {figures}."
    return said + _published(published, state) + _best_of_n(results["best_of_n"], judge)


def compared(results: Json, names: tables.Names) -> str:
    """The verdict on two adapters, of which none is the base."""
    rows, state, (first, second) = results["tuned_against_base"]["win_rates"], results["verdict"], names
    judge, name = main_judge(rows), judge_name(rows)
    if rows[judge]["win_rate"] is None:
        return f"Nothing can be said: {name} decided no image pair."
    figures = f"{second} beats {first} on {decided(rows[judge])}."
    if state["improved"][judge]:
        said = f"{second} is better by {name}: {figures}"
    elif state["worse"][judge]:
        said = f"{first} is better by {name}: {figures}"
    else:
        said = f"Not separable by {name}: {figures}"
    return said + _published([column for column in tables.PUBLISHED if column in rows], state)


def main_judge(rows: Json) -> str:
    """The column that a verdict is read from."""
    return "gold_overall" if "gold_overall" in rows else "reward_overall"


def judge_name(rows: Json) -> str:
    if "gold_overall" in rows:
        return "the gold judge"
    alone = not any(column in rows for column in tables.PUBLISHED)
    return "its own training reward" + (", the only judge of this world" if alone else "")


def decided(row: Json) -> str:
    return (
        f"{row['win_rate']:.1%} of {row['n_decided']} decided images "
        f"(95 % interval {row['low']:.1%} to {row['high']:.1%}; "
        f"{row['tie_share']:.0%} of {row['n_images']} images of {row['n_prompts']} prompts are ties)"
    )


def _published(judges: Sequence[str], state: Json) -> str:
    """What the published judges say, which the adapter was not trained on."""
    groups = {
        "improved by": [judge for judge in judges if state["improved"][judge]],
        "worse by": [judge for judge in judges if state["worse"][judge]],
        "not separable by": [judge for judge in judges if not state["improved"][judge] and not state["worse"][judge]],
    }
    said = [f"{text} {', '.join(tables.PUBLISHED[judge] for judge in of)}" for text, of in groups.items() if of]
    return f" Judges that it never saw: {'; '.join(said)}." if said else ""


def _best_of_n(best: Json, judge: str) -> str:
    row = best["best_against_base"].get(judge)
    if row is None or row["win_rate"] is None:
        return ""
    return f" The best of {best['n']} base images by the reward model beats base on {row['win_rate']:.1%}."


def render(template: str, *, figures: Mapping[str, str], **values: Any) -> str:
    """A page of this folder's templates, with style and script in it. Its policy lets no other script run, and nothing
    be fetched. Texts are escaped; only ``figures``, our own SVG by name, is markup."""
    environment = Environment(
        loader=PackageLoader("dspo.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": number, "interval": interval, "tables": tables}
    environment.filters |= {"number": number}
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704  our own page.css
        script=Markup(script),  # noqa: S704  our own page.js
        script_hash=script_hash,
        figures={name: Markup(text) for name, text in figures.items()},  # noqa: S704  our own SVG
        **values,
    )
