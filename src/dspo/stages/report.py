"""Stage: the figures, the plots and the page.

python -m dspo.stages.report --params params.yaml --evaluation data/evaluation --reward models/reward
    --training models/training --pairs data/pairs --output reports
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dspo.data.files import read_json, write_json
from dspo.data.images import decode_image, read_table
from dspo.params import Params, load_params
from dspo.reporting import plots
from dspo.reporting.page import choose, render_page
from dspo.reporting.summary import summarise
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run

STUDIES = ("losses", "ablation", "overopt", "audit", "base")


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "evaluation", "reward", "training", "pairs", "output")
    params = load_params(paths.params)
    inputs = [paths.evaluation, paths.reward, paths.training, paths.pairs]
    scratch = open_scratch("report", {"params": params.model_dump(mode="json")}, inputs)
    results, reward = read_json(paths.evaluation / "results.json"), read_json(paths.reward / "report.json")
    studies = {name: paths.output / f"{name}.json" for name in STUDIES if (paths.output / f"{name}.json").exists()}
    ablation = read_json(studies["ablation"]) if "ablation" in studies else None
    summary = summarise(results, reward, read_json(paths.training / "metrics.json"), ablation)
    write_json(summary, scratch.path / "summary.json")

    base, tuned = (read_images(paths.evaluation / f"{name}.parquet") for name in ("base", "tuned"))
    column = "gold_overall" if "gold_overall" in base else "reward_overall"
    figures = write_plots(scratch.path / "plots", paths.training, results, base, tuned, column)
    page = render_page(
        results,
        summary,
        choose(base, tuned, column),
        figures,
        reward,
        configuration(params),
        {str(path): digest(path) for path in inputs},
        {name: json.dumps(read_json(path), indent=1, sort_keys=True) for name, path in studies.items()},
    )
    (scratch.path / "index.html").write_text(page, encoding="utf-8")
    scratch.publish({name: paths.output / name for name in ("summary.json", "index.html", "plots")})


def read_images(path: Path) -> pd.DataFrame:
    return pd.DataFrame(read_table(path).to_pydict())


def write_plots(
    folder: Path, training: Path, results: dict[str, Any], base: pd.DataFrame, tuned: pd.DataFrame, column: str
) -> dict[str, str]:
    """Write every plot as a file and return those of the page as SVG."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    folder.mkdir(exist_ok=True)
    scores = [name for name in base if str(name).startswith(("reward_", "gold_")) and name != "gold_fully_right"]
    drawn = {
        "training": plots.training_curves(pd.read_csv(training / "log.csv"), pd.read_csv(training / "epochs.csv")),
        "judges": plots.judges_plot(results["tuned_against_base"]["win_rates"]),
        "distributions": plots.score_distributions(base, tuned, [str(name) for name in scores]),
    }
    for name, figure in drawn.items():
        plots.save_png(figure, folder / f"{name}.png")
    plots.grid(typical_pairs(base, tuned, column)).save(folder / "grid.png", optimize=True)
    return {name: plots.svg(figure) for name, figure in drawn.items()}


def typical_pairs(base: pd.DataFrame, tuned: pd.DataFrame, column: str, number: int = 16) -> list[tuple[Any, Any]]:
    """Image pairs at evenly spaced ranks of the difference, best first: what wins, what stays and what loses."""
    order = (tuned[column] - base[column]).sort_values(kind="stable", ascending=False).index
    ranks = [round((k + 0.5) * len(order) / number) for k in range(number)]
    rows = [order[min(rank, len(order) - 1)] for rank in ranks]
    return [
        (decode_image(base.loc[i, "image"], f"base image {i}"), decode_image(tuned.loc[i, "image"], f"tuned image {i}"))
        for i in rows
    ]


def configuration(params: Params) -> str:
    world = {"world": params.world, "seed": params.seed, **params.active.model_dump(mode="json")}
    return str(yaml.safe_dump(world, sort_keys=False))


def digest(path: Path) -> str:
    """sha256 over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


if __name__ == "__main__":
    run(main)
