"""Ablation of the reward model on the held-out ratings.

    python -m dspo.studies.reward_ablation --params params.yaml --ratings data/ratings --output reports/studies

writes ``ablation.json`` and ``ablation.md``. Finished trainings survive a kill.
"""

from pathlib import Path

import numpy as np

from dspo.data.files import whole_file
from dspo.environment import device
from dspo.params import RewardParams, load_params
from dspo.reporting.studies import write_study
from dspo.reward.ablation import LR_DIVISORS, Trial, ablation_report, run_trial, variants
from dspo.reward.backbone import local_files, weights_sha256
from dspo.reward.dataset import Stems, read_ratings
from dspo.reward.model import build_model
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "ratings", "output")
    params = load_params(paths.params)
    reward = params.active.reward
    what_decides = {"seed": params.seed, "reward": reward.model_dump(mode="json")}
    scratch = open_scratch("reward_ablation", what_decides, [paths.ratings, *local_files(reward)])
    splits = {name: read_ratings(paths.ratings / f"{name}.parquet") for name in ("train", "validation", "test")}
    backbone = build_model(reward, params.seed, device()).backbone
    stems = {name: Stems(backbone, pairs, reward.dtype, reward.views) for name, pairs in splits.items()}

    trials: dict[str, list[Trial]] = {}
    for name, variant in variants(reward).items():
        trials[name] = [
            _trial(scratch.path / f"{name}-{divisor:g}.npz", _at_rate(variant, divisor), stems, params.seed)
            for divisor in LR_DIVISORS
        ]
    report = {"backbone_sha256": weights_sha256(backbone.clip), **ablation_report(trials, splits["test"], params.seed)}
    write_study("ablation", report, scratch.path)
    scratch.publish({name: paths.output / name for name in ("ablation.json", "ablation.md")})


def _at_rate(params: RewardParams, divisor: float) -> RewardParams:
    return params.model_copy(update={"lr_heads": params.lr_heads / divisor})


def _trial(path: Path, params: RewardParams, stems: dict[str, Stems], seed: int) -> Trial:
    if not path.exists():
        trial = run_trial(params, stems, seed, device())
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez(file, validation_nll=trial.validation_nll, difference=trial.difference)
    with np.load(path) as saved:
        return Trial(params.lr_heads, float(saved["validation_nll"]), saved["difference"])


if __name__ == "__main__":
    run(main)
