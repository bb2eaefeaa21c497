"""Over-optimisation: where the training reward goes on rising and the gold judge does not.

    python -m dspo.studies.overopt --params params.yaml --prompts data/prompts.csv --rated data/raw/shapes-rated.parquet
        --candidates data/candidates --pairs data/pairs --second-judge models/shapes-judge --output reports/studies

Reward models from few and many ratings, by raters with and without a wrong taste, each optimised by DPO and DSPO at
one, three and ten times a mild learning rate. Writes ``overopt.json``, ``.md`` and ``.csv``; every
finished reward model and training is kept, so the command goes on where it was killed.
"""

import argparse
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dspo.data.csv_rows import write_csv
from dspo.data.images import write_table
from dspo.data.keys import keyed_seed, keyed_uniform
from dspo.data.prompts import read_prompts
from dspo.data.records import GOLD, PROXY
from dspo.diffusion.base import local_files
from dspo.environment import device
from dspo.evaluation.compare import over_optimised, worse
from dspo.evaluation.judges import SECOND, Judges
from dspo.evaluation.statistics import win_rate
from dspo.params import LossName, Params, load_params
from dspo.preference.dataset import Pairs, load_pairs
from dspo.preference.scoring import write_pairs
from dspo.reporting.studies import write_study
from dspo.reward.backbone import local_files as backbone_files
from dspo.reward.backbone import weights_sha256
from dspo.reward.checkpoint import RewardScorer, load_reward, save_reward
from dspo.reward.dataset import Stems, read_ratings
from dspo.reward.model import build_model
from dspo.reward.report import fit_temperatures
from dspo.reward.training import score_differences, train_reward
from dspo.shapes.ratings import RatedPair, make_pairs, rate, read_pictures
from dspo.shapes.second import SecondJudge
from dspo.stages.runner import run
from dspo.studies.common import fresh_prompts, study_folder
from dspo.studies.trials import PromptSet, Recipe, Trials

COUNTS = (100, 1000, 0)  # rated pairs; 0: all
LOSSES: tuple[LossName, ...] = ("dpo", "dspo")
LR = 3.0e-4  # mild for either loss, and not the world's, which is chosen for the default loss
STRENGTHS = (1.0, 3.0, 10.0)  # times LR
LEAST_REWARD_STEPS = 100
WATCHED_PAIRS = 400  # of the validation ratings: few ratings make many epochs, and each looks at all of these


@dataclass(frozen=True)
class Raters:
    """Whose votes a reward model learns from."""

    count: int  # rated pairs; 0: all
    wrong_taste: float

    @property
    def name(self) -> str:
        return f"{self.count or 'all'}-ratings-c{self.wrong_taste:g}"


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    world = params.active
    inputs = [args.prompts, args.rated, args.candidates, args.pairs, args.second_judge, *local_files(world.base)]
    decides = {
        "seed": params.seed,
        "sections": world.model_dump(mode="json", include={"base", "ratings", "reward", "score", "evaluate"}),
        "prompts": [args.prompts_judged, args.images],
    }
    folder = study_folder("overopt", decides, [*inputs, *backbone_files(world.reward)])
    known = [prompt.text for prompt in read_prompts(args.prompts, world.prompts.max_characters)]
    prompts = fresh_prompts(args.prompts_judged, known, params.seed, "overopt")
    fresh = PromptSet("fresh", prompts, args.images, keyed_seed(params.seed, "overopt"))

    rated = make_pairs(read_pictures(args.rated), params.seed)
    rows = []
    for count, taste in product(args.counts, (0.0, args.taste)):
        raters = Raters(count, taste)
        scorer = reward_of(raters, rated, params, folder / raters.name)
        own = pairs_of(args.candidates, scorer, params, folder / raters.name / "pairs")
        judges = Judges(scorer, True, SecondJudge.load(args.second_judge), world.evaluate.batch_size, processes=1)
        sets = {"reward": load_pairs(args.pairs), "own": own}  # drift is measured on the same pairs for all
        trials = Trials(params, judges, sets, folder / raters.name)
        rows += [
            asdict(raters) | {"loss": loss, "strength": strength} | outcome(trials, loss, strength, fresh, params)
            for loss, strength in product(LOSSES, STRENGTHS)
        ]

    report = {
        "settings": {
            "prompts": args.prompts_judged,
            "images_per_prompt": args.images,
            "counts": args.counts,
            "wrong_taste": args.taste,
            "lr": LR,
            "strength": "times lr",
        },
        "rows": rows,
        "detector_fires_on": [row_name(row) for row in rows if row["over_optimised"]],
        "gold_falls_on": [row_name(row) for row in rows if row["gold_falls"]],
    }
    write_study("overopt", report, args.output)
    flat = [_flat(row) for row in rows]
    write_csv(flat, list(flat[0]), args.output / "overopt.csv")


def reward_of(raters: Raters, rated: list[RatedPair], params: Params, folder: Path) -> RewardScorer:
    """The reward model of these raters, trained once; at least so many steps, however few the ratings."""
    saved = folder / "reward"
    if not (saved / "config.json").exists():  # the last file that save_reward writes
        section = params.active.ratings.model_copy(update={"wrong_taste": raters.wrong_taste})
        tables = rate(rated, section, params.seed)
        tables["train"] = some_rows(tables["train"], raters.count, params.seed)
        tables["validation"] = some_rows(tables["validation"], WATCHED_PAIRS, params.seed)
        for split in ("train", "validation"):
            write_table(tables[split], folder / f"{split}.parquet")
        splits = {split: read_ratings(folder / f"{split}.parquet") for split in ("train", "validation")}
        reward = params.active.reward
        least = -(-LEAST_REWARD_STEPS * reward.batch_size // len(splits["train"]))
        reward = reward.model_copy(update={"epochs": max(reward.epochs, least)})
        model = build_model(reward, params.seed, device())
        backbone_hash = weights_sha256(model.backbone.clip)
        stems = {split: Stems(model.backbone, pairs, reward.dtype, reward.views) for split, pairs in splits.items()}
        checkpoint = folder / "reward-checkpoint.pt"
        trained = train_reward(model, stems["train"], stems["validation"], reward, params.seed, checkpoint)
        differences = score_differences(model, stems["validation"])
        temperatures = fit_temperatures(model.heads, differences, splits["validation"])
        untrained = splits["train"].unlabelled(model.heads)
        save_reward(saved, model, trained, reward, temperatures, untrained, backbone_hash)
    return load_reward(saved, device())


def some_rows(table: pa.Table, count: int, seed: int) -> pa.Table:
    """``count`` rows by keyed draws of their pair ids, in the order of the table; all rows for 0."""
    ids = table["pair_id"].to_pylist()
    chosen = sorted(range(len(ids)), key=lambda row: keyed_uniform(seed, "some ratings", ids[row]))[: count or len(ids)]
    return table.take(sorted(chosen))


def pairs_of(candidates: Path, scorer: RewardScorer, params: Params, folder: Path) -> tuple[Pairs, Pairs]:
    if not (folder / "summary.json").exists():  # the last file that write_pairs writes
        folder.mkdir(parents=True, exist_ok=True)
        world = params.active
        # Without the world's margin: a reward from a hundred ratings may be that sure of no pair.
        score = world.score.model_copy(update={"margin": 0.0})
        write_pairs(candidates, scorer, world.base, score, params.seed, device(), folder)
    return load_pairs(folder)


def outcome(trials: Trials, loss: LossName, strength: float, on: PromptSet, params: Params) -> dict[str, Any]:
    """Win rates over base by proxy, gold and second judge, and the drift; only ``ran_away`` if training did."""
    world = params.active
    train = world.train.model_copy(update={"loss": loss, "lr": LR * strength, "random_labels": False})
    base, tuned = trials.base(on), trials.run(Recipe("own", train, params.seed), on)
    if tuned is None:
        return {"ran_away": True, "over_optimised": None, "gold_falls": None}
    ids = list(np.repeat([prompt.id for prompt in on.prompts], on.images_per_prompt))
    resamples = world.evaluate.bootstrap_resamples
    rates = {
        column: win_rate(
            tuned.scores[column] - base.scores[column],
            ids,
            world.evaluate.tie_band if column == GOLD else 0.0,
            resamples,
            keyed_seed(params.seed, "overopt", loss, strength, column),
        )
        for column in (PROXY, GOLD, SECOND)
    }
    return {
        "ran_away": False,
        "drift": tuned.drift,
        "win_rates": {column: asdict(rate) for column, rate in rates.items()},
        "over_optimised": over_optimised(rates),
        "gold_falls": worse(rates[GOLD]),
    }


def row_name(row: dict[str, Any]) -> str:
    raters = Raters(row["count"], row["wrong_taste"])
    return f"{raters.name}, {row['loss']}, x{row['strength']:g}"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    rates = row.get("win_rates", {})
    names = ("count", "wrong_taste", "loss", "strength", "ran_away", "drift", "over_optimised", "gold_falls")
    flat = {name: row.get(name) for name in names}
    for label, column in (("proxy", PROXY), ("gold", GOLD), ("second", SECOND)):
        flat |= {f"{label}_{key}": rates.get(column, {}).get(key) for key in ("win_rate", "low", "high")}
    return flat


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "prompts", "rated", "candidates", "pairs", "second-judge", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="rated pairs; 0 is all")
    parser.add_argument("--taste", type=float, default=1.0, help="c of the raters with a wrong taste")
    parser.add_argument("--prompts-judged", type=int, default=100, help="fresh prompts")
    parser.add_argument("--images", type=int, default=2, help="images per fresh prompt")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
