"""Stage: the figures, the plots, the page, the model card and the data statement.

python -m dspo.stages.report --params params.yaml --evaluation data/evaluation --reward models/reward
    --training models/training --adapter models/adapter --pairs data/pairs --ratings data/ratings --prompts data/prompts
    --studies reports/studies --output reports
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
from dspo.errors import UserError
from dspo.params import Params, load_params
from dspo.reporting import plots
from dspo.reporting.card import Run, data_statement, model_card
from dspo.reporting.page import main_judge, render, verdict
from dspo.reporting.pictures import choose, grid
from dspo.reporting.studies import STUDIES, study_tables
from dspo.reporting.summary import summarise
from dspo.reporting.tables import main_first, words
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run

INPUTS = ("evaluation", "reward", "training", "adapter", "pairs", "ratings", "prompts")
PAGES = ("model_card.md", "data_statement.md")


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, *INPUTS, "studies", "output")
    params = load_params(paths.params)
    inputs = [getattr(paths, name) for name in INPUTS]
    files = {name: paths.studies / f"{name}.json" for name in STUDIES}
    committed = {name: path for name, path in files.items() if path.exists()}
    scratch = open_scratch("report", params.model_dump(mode="json"), [*inputs, *committed.values()])

    results, reward = read_json(paths.evaluation / "results.json"), read_json(paths.reward / "report.json")
    backbone = read_json(paths.reward / "config.json")["backbone_sha256"]
    training = read_json(paths.training / "metrics.json")
    studies = {name: read_json(path) for name, path in committed.items()}
    summary = summarise(results, reward, backbone, training, studies.get("ablation"))
    base, tuned = (pd.DataFrame(read_table(paths.evaluation / f"{x}.parquet").to_pydict()) for x in ("base", "tuned"))
    rates = results["tuned_against_base"]["win_rates"]
    judge = main_judge(rates)
    judges = sorted(main_first(rates), key=lambda name: name != judge)
    figures = draw(paths, results, training, base, tuned)
    if "loss_seeds" in studies:
        figures["loss_seeds"] = plots.seeds_plot(studies["loss_seeds"])
    hashes = {str(path): digest(path) for path in inputs}
    page = render(
        "page.html.j2",
        title="DSPO report",
        verdict=verdict(results),
        results=results,
        summary=summary,
        pictures=choose(base, tuned, judges, rates[judge]["tau"]),
        judges=[words(name) for name in judges],
        figures={name: plots.svg(figure, name) for name, figure in figures.items()},
        reward=reward,
        training=training,
        params=configuration(params),
        hashes=hashes,
        studies=study_tables(studies),
    )

    facts = Run(
        params=params,
        results=results,
        summary=summary,
        reward=reward,
        training=training,
        **{name: read_json(getattr(paths, name) / "summary.json") for name in ("prompts", "ratings", "pairs")},
        adapter=str(paths.adapter),
        adapter_sha256=sha256(paths.adapter / "adapter_model.safetensors"),
        hashes=hashes,
    )

    write_json(summary, scratch.path / "summary.json")
    for name, text in zip(PAGES, (model_card(facts), data_statement(facts)), strict=True):
        (scratch.path / name).write_text(text, encoding="utf-8")
    (scratch.path / "index.html").write_text(page, encoding="utf-8")
    folder = scratch.path / "plots"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        plots.save_png(figure, folder / f"{name}.png")
    grid(base, tuned, judge).save(folder / "grid.png", optimize=True)
    shutil.copyfile(paths.evaluation / "win_rates.csv", folder / "win_rates.csv")
    shutil.copyfile(paths.training / "epochs.csv", folder / "epochs.csv")
    scratch.publish({name: paths.output / name for name in ("plots", "index.html", *PAGES, "summary.json")})


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
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                total.update(part)
    return total.hexdigest()


def sha256(path: Path) -> str:
    """As `sha256sum` prints it. Raises :class:`UserError` if the file is missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Train the adapter: `dvc repro train`")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
