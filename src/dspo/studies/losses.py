"""Preference losses beside each other: each tuned on validation prompts, then trained anew and judged on fresh ones.

    python -m dspo.studies.losses --params params.yaml --prompts data/prompts.csv
        --validation-prompts data/prompts/validation.csv --candidates data/candidates --pairs data/pairs
        --reward models/reward --second-judge models/shapes-judge --output reports/studies

writes ``losses.json``, ``losses.csv`` and ``losses.md``. Every training's result is kept, so the command goes on where
it was killed. Adapters are those of the last epoch, and trials are chosen by the mean gold score on validation prompts.
"""

import argparse
from pathlib import Path

from dspo.data.csv_rows import write_csv
from dspo.data.keys import keyed_seed
from dspo.data.prompts import read_prompts, read_split
from dspo.data.records import GOLD
from dspo.diffusion.base import local_files
from dspo.environment import processes
from dspo.params import TrainParams, load_params
from dspo.preference.dataset import load_pairs
from dspo.reporting.studies import write_study
from dspo.stages.runner import run
from dspo.studies.arms import ARMS, Outcome, best, tune
from dspo.studies.common import fresh_prompts, judges_of_shapes, study_folder
from dspo.studies.losses_table import fared, flat, matched_drift, table, told
from dspo.studies.pair_sets import oracle_pairs, unselected_pairs
from dspo.studies.trials import PromptSet, Recipe, Result, Trials

FULL = {"trials": 8, "seeds": 5, "prompts": 200, "images": 2}


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    world = params.active
    inputs = [args.prompts, args.validation_prompts, args.candidates, args.pairs, args.reward, args.second_judge]
    inputs += local_files(world.base)
    decides = {
        "seed": params.seed,
        "evaluate": world.evaluate.model_dump(mode="json"),
        "prompts": [args.prompts_judged, args.images, args.validation],
    }
    folder = study_folder("losses", decides, inputs)
    known = [prompt.text for prompt in read_prompts(args.prompts, world.prompts.max_characters)]
    validation = PromptSet(
        "validation",
        read_split(args.validation_prompts)[: args.validation],
        1,
        keyed_seed(params.seed, "losses validation"),
    )
    fresh = PromptSet(
        "fresh",
        fresh_prompts(args.prompts_judged, known, params.seed, "losses"),
        args.images,
        keyed_seed(params.seed, "losses"),
    )
    pairs = {
        "reward": load_pairs(args.pairs),
        "oracle": oracle_pairs(args.candidates, params, processes(), folder / "oracle"),
        "unselected": unselected_pairs(args.candidates, params, folder / "unselected"),
    }
    # Starting processes for the gold judge in every trial costs more than it saves.
    judges = judges_of_shapes(params, args.reward, args.second_judge, processes=1)
    trials = Trials(params, judges, pairs, folder)

    chosen: dict[str, TrainParams] = {}
    tuning: dict[str, list[Outcome]] = {}
    finals: dict[str, list[Result | None]] = {}
    seeds = [keyed_seed(params.seed, "fresh training seed", number) for number in range(args.seeds)]
    for arm in ARMS:
        if arm.like is None:
            tuning[arm.name] = tune(arm, args.trials, params, trials, validation)
            chosen[arm.name] = best(tuning[arm.name])[0]
        train = chosen[arm.like or arm.name].model_copy(update=dict(arm.changes))
        finals[arm.name] = [trials.run(Recipe(arm.pairs, train, seed, arm.permute_k), fresh) for seed in seeds]

    report = {
        "settings": {
            "trials": args.trials,
            "seeds": args.seeds,
            "prompts": args.prompts_judged,
            "images_per_prompt": args.images,
            "validation_prompts": len(validation.prompts),
            "full": FULL,
            "reduced": (args.trials, args.seeds, args.prompts_judged, args.images) != tuple(FULL.values()),
            "epochs": world.train.epochs,
            "tie_band": world.evaluate.tie_band,
            "adapter": "of the last epoch",
            "choice": f"largest mean {GOLD} on validation prompts",
        },
        **table(finals, trials.base(fresh), len(fresh.prompts), params),
        "chosen": {arm: told(train) for arm, train in chosen.items()},
        "tuning": {arm: [fared(outcome) for outcome in outcomes] for arm, outcomes in tuning.items()},
        "at_the_drift_of_sft": matched_drift(tuning, [prompt.id for prompt in validation.prompts], params),
    }
    write_study("losses", report, args.output)
    rows = [{"arm": name, **flat(row)} for name, row in report["arms"].items()]
    write_csv(rows, list(rows[0]), args.output / "losses.csv")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "prompts", "validation-prompts", "candidates", "pairs", "reward", "second-judge", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=FULL["trials"], help="settings tried per arm, at most 8")
    parser.add_argument("--seeds", type=int, default=FULL["seeds"], help="trainings per arm at its best setting")
    parser.add_argument("--prompts-judged", type=int, default=FULL["prompts"], help="fresh prompts")
    parser.add_argument("--images", type=int, default=FULL["images"], help="images per fresh prompt")
    parser.add_argument("--validation", type=int, default=64, help="validation prompts that choose a setting")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
