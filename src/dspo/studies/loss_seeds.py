"""The table and the plot of the matrix of losses and seeds, from its cells.

    python -m dspo.studies.loss_seeds --params params.yaml --study pipelines/losses/params.yaml
        --cells pipelines/losses/cells --output pipelines/losses

writes ``loss_seeds.json`` (the metrics), ``loss_seeds.csv`` (a row per training), ``loss_seeds.md`` and
``loss_seeds.png``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dspo.data.csv_rows import write_csv
from dspo.data.files import whole_file
from dspo.data.keys import keyed_seed
from dspo.data.records import GOLD
from dspo.evaluation.judges import FULLY_RIGHT, SECOND
from dspo.evaluation.statistics import head_to_head, win_rate
from dspo.params import Params, load_params
from dspo.reporting.plots import save_png, seeds_plot
from dspo.reporting.studies import write_study
from dspo.stages.runner import arguments, run
from dspo.studies.loss_cell import Study, load_study, read_cell
from dspo.studies.losses_table import table
from dspo.studies.trials import Result

SHOWN = ("against_base", "ran_away", "gold", "proxy", "fully_right", "drift")


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "study", "cells", "output")
    params, study = load_params(paths.params), load_study(paths.study)
    base = read_cell(paths.cells / "base.json")
    assert base is not None  # nothing was trained
    cells = {
        loss: {str(seed): read_cell(paths.cells / f"{loss}-{seed}.json") for seed in study.seeds}
        for loss in study.losses
    }

    report = summarise(cells, base, study, params)
    write_study("loss_seeds", report, paths.output)
    rows = [
        {"loss": loss, "seed": seed, **row}
        for loss, arm in report["arms"].items()
        for seed, row in arm["seeds"].items()
    ]
    write_csv(rows, list(rows[0]), paths.output / "loss_seeds.csv")
    with whole_file(paths.output / "loss_seeds.png") as partial:
        save_png(seeds_plot(report), partial)


def summarise(
    cells: Mapping[str, Mapping[str, Result | None]], base: Result, study: Study, params: Params
) -> dict[str, Any]:
    """Each loss against base, sft and dpo over seeds x prompts, and each of its seeds by itself.

    ``cells``: loss -> seed -> its judged images, None where the training ran away; all of the same prompts and noise.
    """
    figures = table({loss: list(of.values()) for loss, of in cells.items()}, base, study.prompts, params)
    arms = {}
    for loss, of in cells.items():
        seeds = {seed: _one_seed(result, base, loss, seed, study, params) for seed, result in of.items()}
        rates = [row["win_rate"] for row in seeds.values() if row["win_rate"] is not None]
        arms[loss] = {name: figures["arms"][loss][name] for name in SHOWN} | {
            "against_base_second": _by_second_judge(list(of.values()), base, loss, study, params),
            "seed_sd": float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
            "seeds": seeds,
        }
    return {
        "settings": {
            "losses": study.losses,
            "seeds": len(study.seeds),
            "prompts": study.prompts,
            "images_per_prompt": study.images,
        },
        "arms": arms,
        "base": {name: figures["base"][name] for name in ("gold", "proxy", "fully_right")},
        "head_to_head": figures["head_to_head"],
    }


def _one_seed(
    result: Result | None, base: Result, loss: str, seed: str, study: Study, params: Params
) -> dict[str, Any]:
    names = ("win_rate", "low", "high", "n_decided")
    if result is None:
        return dict.fromkeys((*names, "fully_right", "drift"))
    evaluate = params.active.evaluate
    prompts = [str(prompt) for prompt in range(study.prompts) for _ in range(study.images)]
    key = keyed_seed(params.seed, "loss seeds", loss, seed)
    delta = result.scores[GOLD] - base.scores[GOLD]
    rate = asdict(win_rate(delta, prompts, evaluate.tie_band, evaluate.bootstrap_resamples, key))
    return {name: rate[name] for name in names} | {"fully_right": result.mean(FULLY_RIGHT), "drift": result.drift}


def _by_second_judge(
    results: Sequence[Result | None], base: Result, loss: str, study: Study, params: Params
) -> dict[str, Any] | None:
    """Win rate over base by the judge that no setting was chosen by; only equal scores tie."""
    scores = [result.scores[SECOND] for result in results if result is not None]
    if len(scores) < len(results):
        return None
    delta = (np.stack(scores) - base.scores[SECOND]).reshape(len(scores), study.prompts, study.images)
    key = keyed_seed(params.seed, "loss seeds", loss, SECOND)
    return asdict(head_to_head(delta, 0.0, params.active.evaluate.bootstrap_resamples, key))


if __name__ == "__main__":
    run(main)
