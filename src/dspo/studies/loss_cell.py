"""One cell of the matrix of losses and seeds: an adapter trained by that loss, judged on fresh prompts.

    python -m dspo.studies.loss_cell --params params.yaml --study pipelines/losses/params.yaml --loss dpo --seed 1
        --prompts data/prompts.csv --pairs data/pairs --reward models/reward --second-judge models/shapes-judge
        --output pipelines/losses/cells/dpo-1.json

Without ``--loss``, ``--seed`` and ``--pairs`` the base itself is judged. Prompts and noise are the same in every cell.
The adapter is that of the last epoch. After a kill the same command goes on at the last checkpoint.
"""

import argparse
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dspo.data.files import read_json, write_json
from dspo.data.keys import keyed_seed
from dspo.data.prompts import read_prompts
from dspo.data.records import GOLD, PROXY
from dspo.diffusion.base import local_files
from dspo.errors import UserError
from dspo.evaluation.judges import FULLY_RIGHT, SECOND
from dspo.params import Count, Section, TrainParams, load_params, read_yaml, validated
from dspo.preference.dataset import load_pairs
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import run
from dspo.studies.common import fresh_prompts, judges_of_shapes
from dspo.studies.trials import PromptSet, Recipe, Result, Trials

JUDGED = (GOLD, PROXY, SECOND, FULLY_RIGHT)


class Study(Section):
    """The parameters beside the pipeline of the matrix."""

    losses: Annotated[list[str], Field(min_length=1)]  # names below `train`: the rows of the table
    seeds: Annotated[list[int], Field(min_length=1)]
    prompts: Count  # fresh ones
    images: Count  # per prompt
    train: dict[str, dict[str, Any]]  # by name: what it changes about the world's `train`


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params, study = load_params(args.params), load_study(args.study)
    world = params.active
    train = None if args.loss is None else changed(world.train, study, args.loss)
    what_decides = {
        "seed": [params.seed, args.seed],
        "base": world.base.model_dump(mode="json"),
        "train": None if train is None else train.model_dump(mode="json"),
        "sampler": world.evaluate.sampler.model_dump(mode="json"),
        "batch_size": world.evaluate.batch_size,
        "prompts": [study.prompts, study.images],
    }
    inputs = [args.prompts, args.reward, args.second_judge, *local_files(world.base)]
    inputs += [] if args.pairs is None else [args.pairs]
    scratch = open_scratch(f"loss_cell/{args.output.stem}", what_decides, inputs)

    known = [prompt.text for prompt in read_prompts(args.prompts, world.prompts.max_characters)]
    fresh = PromptSet(
        "fresh",
        fresh_prompts(study.prompts, known, params.seed, "loss cell"),
        study.images,
        keyed_seed(params.seed, "loss cell"),
    )
    # Starting processes for the gold judge costs more than it saves.
    judges = judges_of_shapes(params, args.reward, args.second_judge, processes=1)
    pairs = {} if args.pairs is None else {"reward": load_pairs(args.pairs)}
    trials = Trials(params, judges, pairs, scratch.path)
    seed = keyed_seed(params.seed, "fresh training seed", args.seed)
    result = trials.base(fresh) if train is None else trials.run(Recipe("reward", train, seed), fresh)
    write_json(as_json(result), scratch.path / "cell.json")
    scratch.publish({"cell.json": args.output})


def as_json(result: Result | None) -> dict[str, Any]:
    """A cell as its file holds it; without the seconds, since equal inputs give equal bytes."""
    if result is None:
        return {"ran_away": True}
    scores = {name: result.scores[name].tolist() for name in JUDGED}
    return {"ran_away": False, "drift": result.drift, "scores": scores}


def read_cell(path: Path) -> Result | None:
    """The cell in a file; ``None``: its training ran away. Raises :class:`UserError` if the file is missing."""
    cell = read_json(path)
    if cell["ran_away"]:
        return None
    return Result({name: np.array(scores) for name, scores in cell["scores"].items()}, cell["drift"], seconds=0.0)


def load_study(path: Path) -> Study:
    """Raises :class:`UserError` that names file and key."""
    return validated(Study, read_yaml(path), path)


def changed(train: TrainParams, study: Study, loss: str) -> TrainParams:
    """The world's settings of training with what ``loss`` changes.

    Raises :class:`UserError` that names loss and key.
    """
    if loss not in study.train:
        raise UserError(f"train.{loss}: no settings of this name. There are: {', '.join(study.train)}")
    return validated(TrainParams, train.model_dump() | study.train[loss], f"train.{loss}")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "study", "prompts", "reward", "second-judge", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--loss", help="name below `train` of the study's parameters; left out: the base")
    parser.add_argument("--seed", type=int, help="of the training")
    parser.add_argument("--pairs", type=Path, help="to train on")
    args = parser.parse_args(argv)
    if len({args.loss is None, args.seed is None, args.pairs is None}) > 1:
        parser.error("--loss, --seed and --pairs go together")
    return args


if __name__ == "__main__":
    run(main)
