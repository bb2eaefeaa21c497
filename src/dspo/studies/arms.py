"""The rows of the table of losses: what each trains, and the settings that are tried for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspo.data.keys import keyed_uniform
from dspo.data.records import GOLD
from dspo.params import LossName, Params, TrainParams
from dspo.studies.trials import PromptSet, Recipe, Result, Trials, equal_steps

LEARNING_RATES = (0.4, 1.0)  # times the world's, for losses that have a strength of their own
LEARNING_RATES_ALONE = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0)
BETAS = (100.0, 300.0, 1000.0, 3000.0)
LAMS = (0.3, 0.5, 0.7, 0.9)

Outcome = tuple[TrainParams, Result | None]  # None: the training ran away


@dataclass(frozen=True)
class Arm:
    """A row of the table: a loss, what is changed about it, and the eight trials that tune it."""

    name: str
    loss: LossName
    strength: str | None = None  # the parameter of train that is tuned beside the learning rate
    values: tuple[float, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    pairs: str = "reward"
    permute_k: bool = False
    like: str | None = None  # a control: takes the choice of this arm


ARMS = (
    Arm("sft", "sft"),
    Arm("dpo", "dpo", "beta", BETAS),
    Arm("dspo", "dspo", "lam", LAMS),
    Arm("dspo, beta = 0", "dspo", "lam", LAMS, {"beta": 0.0}),
    Arm("dspo, k permuted", "dspo", permute_k=True, like="dspo"),
    Arm("dspo, two-sided", "dspo_two_sided", "lam", LAMS),
    Arm("dspo, two-sided, 1 fixed draw", "dspo_two_sided", changes={"fixed_draws": 1}, like="dspo, two-sided"),
    Arm("dspo, two-sided, 4 fixed draws", "dspo_two_sided", changes={"fixed_draws": 4}, like="dspo, two-sided"),
    Arm("dspo, two-sided, random labels", "dspo_two_sided", changes={"random_labels": True}, like="dspo, two-sided"),
    Arm("dspo, hinge", "dspo_hinge", "lam", LAMS),
    Arm("dspo, official for SD1.5", "dspo_official_sd15", "beta", (0.001, 0.01, 0.05, 0.5)),
    Arm("dspo, official for SDXL", "dspo_official_sdxl", "beta", BETAS),
    Arm("ipo", "ipo", "beta", BETAS),
    Arm("capo", "capo", "beta", BETAS),
    Arm("mapo", "mapo", "mapo_scale", BETAS),
    Arm("sft, random labels", "sft", changes={"random_labels": True}, like="sft"),
    Arm("dpo, random labels", "dpo", changes={"random_labels": True}, like="dpo"),
    Arm("dspo, random labels", "dspo", changes={"random_labels": True}, like="dspo"),
    Arm("oracle: sft on gold pairs", "sft", pairs="oracle"),
    Arm("oracle: dpo on gold pairs", "dpo", "beta", BETAS, pairs="oracle"),
    Arm("oracle: dspo on gold pairs", "dspo", "lam", LAMS, pairs="oracle"),
    Arm("oracle: dspo, two-sided on gold pairs", "dspo_two_sided", "lam", LAMS, pairs="oracle"),
    Arm("sft, all candidates unselected", "sft", pairs="unselected"),
)


def tune(arm: Arm, count: int, params: Params, trials: Trials, on: PromptSet) -> list[Outcome]:
    """The arm's first ``count`` settings, which come in a keyed order, and how they fared."""
    settings = grid(arm, params.active.train, len(trials.pairs["reward"][0]), len(trials.pairs[arm.pairs][0]))
    order = sorted(range(len(settings)), key=lambda i: keyed_uniform(params.seed, "trial", arm.name, i))[:count]
    return [(settings[i], trials.run(Recipe(arm.pairs, settings[i], params.seed, arm.permute_k), on)) for i in order]


def grid(arm: Arm, train: TrainParams, pairs: int, pairs_of_arm: int) -> list[TrainParams]:
    """Eight settings: learning rate times own strength, or learning rates alone; all take the same number of steps."""
    fixed = {"loss": arm.loss, "random_labels": False, **arm.changes}
    fixed["epochs"] = equal_steps(train.epochs, pairs, pairs_of_arm)
    if arm.strength is None:
        return [train.model_copy(update=fixed | {"lr": train.lr * rate}) for rate in LEARNING_RATES_ALONE]
    return [
        train.model_copy(update=fixed | {"lr": train.lr * rate, arm.strength: value})
        for rate in LEARNING_RATES
        for value in arm.values
    ]


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome with the largest mean gold score, the first of equals; one that ran away comes last."""
    return max(outcomes, key=lambda outcome: outcome[1].mean(GOLD) if outcome[1] else float("-inf"))
