"""What else could have been done: adapters from fewer pairs, LoRA in DoRA's place, and the best of several base images.

    python -m dspo.studies.beside --params params.yaml --prompts data/prompts.csv --pairs data/pairs
        --reward models/reward --second-judge models/shapes-judge --output reports/studies

writes ``beside.json`` and ``beside.md``. All rows are judged on the same fresh prompts from the same noise, at the
base's best sampler setting. Every training takes about as many steps, at the world's settings; its adapter is that of
the last epoch. A result is kept, so the command goes on where it was killed.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dspo.data.keys import keyed_seed
from dspo.data.prompts import read_prompts
from dspo.data.records import GOLD, PROXY
from dspo.diffusion.base import local_files
from dspo.environment import processes
from dspo.evaluation.judges import FULLY_RIGHT
from dspo.evaluation.statistics import mean, win_rate
from dspo.params import Params, load_params
from dspo.preference.dataset import load_pairs
from dspo.reporting.studies import write_study
from dspo.stages.runner import run
from dspo.studies.common import fresh_prompts, judges_of_shapes, study_folder
from dspo.studies.trials import PromptSet, Recipe, Result, Trials, equal_steps, first_pairs

PAIR_COUNTS = (100, 200, 400, 800)
BEST_OF = 4

Column = npt.NDArray[np.float64]


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    world = params.active
    inputs = [args.prompts, args.pairs, args.reward, args.second_judge, *local_files(world.base)]
    decides = {
        "seed": params.seed,
        "evaluate": world.evaluate.model_dump(mode="json"),
        "prompts": [args.prompts_judged, args.images],
    }
    folder = study_folder("beside", decides, inputs)
    known = [prompt.text for prompt in read_prompts(args.prompts, world.prompts.max_characters)]
    prompts = fresh_prompts(args.prompts_judged, known, params.seed, "beside")
    fresh = PromptSet("fresh", prompts, args.images, keyed_seed(params.seed, "beside"))
    pairs, held_out = load_pairs(args.pairs)
    some = {str(count): first_pairs(pairs, count) for count in PAIR_COUNTS if count < len(pairs)}
    sets = {name: (part, held_out) for name, part in (some | {"reward": pairs}).items()}
    judges = judges_of_shapes(params, args.reward, args.second_judge, processes())
    trials = Trials(params, judges, sets, folder)

    report = {
        "settings": {"prompts": args.prompts_judged, "images_per_prompt": args.images},
        **compared(trials, fresh, params),
    }
    write_study("beside", report, args.output)


def compared(trials: Trials, fresh: PromptSet, params: Params) -> dict[str, Any]:
    """The base and every row against it. A training that ran away has no row."""
    base = trials.base(fresh)
    more = replace(fresh, name="more", images_per_prompt=BEST_OF * fresh.images_per_prompt)
    chosen = best_of(trials.base(more))
    counts = {name: len(pairs) for name, (pairs, _) in trials.pairs.items()}
    trained = {name: trials.run(recipe, fresh) for name, recipe in recipes(params, counts).items()}
    results = {f"best of {BEST_OF} base images by the reward": chosen} | trained
    return {
        "base": {"fully_right": base.mean(FULLY_RIGHT), "gold": base.mean(GOLD)},
        "rows": [{"name": name, **_figures(result, base, fresh, params)} for name, result in results.items() if result],
    }


def recipes(params: Params, counts: dict[str, int]) -> dict[str, Recipe]:
    """Trainings by name; ``counts``: pairs in each set, all of them in ``reward``."""
    train = params.active.train
    of_sets = {
        f"{count} pairs": Recipe(
            name, train.model_copy(update={"epochs": equal_steps(train.epochs, counts["reward"], count)}), params.seed
        )
        for name, count in counts.items()
    }
    # A rank more makes up for the magnitudes: r (n + m) + m against (r + 1) (n + m) parameters of a layer.
    wider = train.model_copy(update={"rank": train.rank + 1, "alpha": train.alpha + 1})
    lora = {f"{counts['reward']} pairs, LoRA": Recipe("reward", wider, params.seed, lora=True)}
    return of_sets | lora


def best_of(samples: Result) -> Result:
    """Of each ``BEST_OF`` neighbouring images the one with the highest reward."""
    choice = samples.scores[PROXY].reshape(-1, BEST_OF).argmax(axis=1)
    rows = np.arange(len(choice)) * BEST_OF + choice
    return replace(samples, scores={name: column[rows] for name, column in samples.scores.items()})


def _figures(result: Result, base: Result, fresh: PromptSet, params: Params) -> dict[str, Any]:
    evaluate = params.active.evaluate
    ids = [prompt.id for prompt in fresh.prompts for _ in range(fresh.images_per_prompt)]

    def change(column: str) -> Column:
        return result.scores[column] - base.scores[column]

    key = keyed_seed(params.seed, "beside")
    right = mean(change(FULLY_RIGHT), ids, evaluate.bootstrap_resamples, key)
    return {
        "against_base": asdict(win_rate(change(GOLD), ids, evaluate.tie_band, evaluate.bootstrap_resamples, key)),
        "fully_right": result.mean(FULLY_RIGHT),
        "fully_right_gain": asdict(right),
        "training_seconds": result.seconds,
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "prompts", "pairs", "reward", "second-judge", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts-judged", type=int, default=300, help="fresh prompts")
    parser.add_argument("--images", type=int, default=2, help="images per fresh prompt")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
