"""What each part of the reward model is worth: the full model with one part changed, and the plain head without any.

Every row has the same backbone, unfrozen blocks, data, steps and number of learning-rate trials; the rate is chosen by
validation likelihood. Differences to the full model are paired on the test pairs and bootstrapped over prompts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dspo.params import RewardParams
from dspo.reward.dataset import Floats, RatedPairs, Stems
from dspo.reward.judged import judged_part
from dspo.reward.model import build_model
from dspo.reward.report import cross_entropy, fit_temperature, macro_f1_difference, reward_report
from dspo.reward.training import score_differences, train_reward

LR_DIVISORS = (3, 1)  # of params' lr_heads
FULL, PLAIN = "full model", "plain head"


@dataclass(frozen=True)
class Trial:
    lr_heads: float
    validation_nll: float  # of overall, at the temperature fitted on validation
    difference: Floats  # [n_test_pairs] overall score of the first minus the second image


def variants(params: RewardParams) -> dict[str, RewardParams]:
    """Name -> parameters. A part that ``params`` leaves out is added instead of taken away."""
    parts: dict[str, tuple[str, object, object]] = {  # key -> what it is called, off, on
        "fusion": ("fusion", False, True),
        "focal_gamma": ("focal loss", 0.0, 1.0),
        "ema_decay": ("EMA", 0.0, 0.99),
        "mixup_alpha": ("MixUp", 0.0, 0.2),
        "views": ("further views", 1, 2),
    }
    rows = {FULL: params}
    for key, (label, off, on) in parts.items():
        has_it = getattr(params, key) != off
        name = f"without {label}" if has_it else f"with {label}"
        rows[name] = params.model_copy(update={key: off if has_it else on})
    rows["one head"] = params.model_copy(update={"heads": ["overall"]})
    everything_off = {key: off for key, (_, off, _) in parts.items()}
    rows[PLAIN] = params.model_copy(update={**everything_off, "heads": ["overall"]})
    return rows


def run_trial(params: RewardParams, stems: dict[str, Stems], seed: int, device: torch.device) -> Trial:
    """Train on ``stems["train"]``, judge on ``["validation"]``, score ``["test"]``."""
    model = build_model(params, seed, device)
    train_reward(model, stems["train"], stems["validation"], params, seed, checkpoint=None)
    overall = model.heads.index("overall")
    on_validation = score_differences(model, stems["validation"])[:, overall]
    share = stems["validation"].pairs.head_shares(("overall",))[:, 0]
    nll = cross_entropy(on_validation / fit_temperature(on_validation, share), share)
    return Trial(params.lr_heads, float(np.nanmean(nll)), score_differences(model, stems["test"])[:, overall])


def ablation_report(trials: dict[str, list[Trial]], test: RatedPairs, seed: int) -> dict[str, Any]:
    """JSON values: per variant the chosen trial's macro-F1 with its interval and its paired difference to the full
    model, ``plain_head_macro_f1`` at the top."""
    chosen = {name: min(tried, key=lambda trial: trial.validation_nll) for name, tried in trials.items()}
    decided = test.vote != 0.5
    on_base = decided & test.base
    if not np.isnan(test.p_first[on_base]).all():  # as judged_part has it
        decided = on_base
    rows = {}
    for name, trial in chosen.items():
        sides = (trial.difference[decided], chosen[FULL].difference[decided])
        gain, low, high = macro_f1_difference(*sides, test.vote[decided] > 0.5, test.prompt_id[decided], seed)
        difference, temperatures = trial.difference, {"overall": 1.0}
        metrics = judged_part(
            reward_report(test, ("overall",), difference[:, None], difference, temperatures, [], seed)
        )
        rows[name] = {
            **{key: metrics[key] for key in ("macro_f1", "macro_f1_low", "macro_f1_high", "pair_accuracy")},
            "lr_heads": trial.lr_heads,
            "validation_nll": trial.validation_nll,
            "difference_to_full": gain,
            "difference_low": low,
            "difference_high": high,
        }
    return {
        "plain_head_macro_f1": rows[PLAIN]["macro_f1"],
        "full_macro_f1": rows[FULL]["macro_f1"],
        "ceiling_macro_f1": metrics["ceiling_macro_f1"],
        "n_pairs": metrics["n_pairs"],
        "n_prompts": metrics["n_prompts"],
        "rows": rows,
    }
