"""Stage: the figures, the plots and the page.

python -m dspo.stages.report --params params.yaml --evaluation data/evaluation --reward models/reward
    --training models/training --pairs data/pairs --studies reports/studies --output reports
"""

import hashlib
import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from dspo.data.files import read_json, write_json
from dspo.data.images import read_table
from dspo.params import Params, load_params
from dspo.reporting import plots
from dspo.reporting.page import main_judge, render_page
from dspo.reporting.pictures import choose, grid
from dspo.reporting.studies import STUDIES, study_tables
from dspo.reporting.summary import summarise
from dspo.reporting.tables import main_first, words
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "evaluation", "reward", "training", "pairs", "studies", "output")
    params = load_params(paths.params)
    inputs = [paths.evaluation, paths.reward, paths.training, paths.pairs]
    files = {name: paths.studies / f"{name}.json" for name in STUDIES}
    committed = {name: path for name, path in files.items() if path.exists()}
    scratch = open_scratch("report", params.model_dump(mode="json"), [*inputs, *committed.values()])

    results, reward = read_json(paths.evaluation / "results.json"), read_json(paths.reward / "report.json")
    training = read_json(paths.training / "metrics.json")
    studies = {name: read_json(path) for name, path in committed.items()}
    summary = summarise(results, reward, training, studies.get("ablation"))
    base, tuned = (pd.DataFrame(read_table(paths.evaluation / f"{x}.parquet").to_pydict()) for x in ("base", "tuned"))
    rates = results["tuned_against_base"]["win_rates"]
    judge = main_judge(rates)
    judges = sorted(main_first(rates), key=lambda name: name != judge)
    figures = draw(paths, results, training, base, tuned)
    page = render_page(
        results=results,
        summary=summary,
        pictures=choose(base, tuned, judges, rates[judge]["tau"]),
        judges=[words(name) for name in judges],
        figures={name: plots.svg(figure, name) for name, figure in figures.items()},
        reward=reward,
        training=training,
        params=configuration(params),
        hashes={str(path): digest(path) for path in inputs},
        studies=study_tables(studies),
    )

    write_json(summary, scratch.path / "summary.json")
    (scratch.path / "index.html").write_text(page, encoding="utf-8")
    folder = scratch.path / "plots"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.save_png(figure, folder / f"{name}.png")
    grid(base, tuned, judge).save(folder / "grid.png", optimize=True)
    shutil.copyfile(paths.evaluation / "win_rates.csv", folder / "win_rates.csv")
    shutil.copyfile(paths.training / "epochs.csv", folder / "epochs.csv")
    scratch.publish({name: paths.output / name for name in ("plots", "index.html", "summary.json")})


def draw(
    paths: Namespace, results: dict[str, Any], training: dict[str, Any], base: pd.DataFrame, tuned: pd.DataFrame
) -> dict[str, Figure]:
    """Every plot by its name."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    rates = main_first(results["tuned_against_base"]["win_rates"])
    log, epochs = (pd.read_csv(paths.training / f"{name}.csv") for name in ("log", "epochs"))
    return {
        "judges": plots.judges_plot(rates),
        "distributions": plots.score_distributions(base, tuned, list(rates)),
        "training": plots.training_curves(log, epochs, training["best_epoch"]),
        "reward": plots.reward_curve(pd.read_csv(paths.reward / "curve.csv")),
    }


def configuration(params: Params) -> str:
    world = {"world": params.world, "seed": params.seed, **params.active.model_dump(mode="json")}
    return str(yaml.safe_dump(world, sort_keys=False))


def digest(path: Path) -> str:
    """md5 over the names and bytes of a folder's files."""
    total = hashlib.md5(usedforsecurity=False)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    run(main)
