"""Training of the reward model, in the order in which things happen.

Every draw is keyed by seed, purpose and step, and a checkpoint holds all that the next step depends on: on a CPU a run
that was killed and started again ends in the same bytes.
"""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from dspo.data.files import write_bytes
from dspo.data.keys import keyed_rng
from dspo.errors import UserError
from dspo.lanes import in_lanes
from dspo.params import RewardParams
from dspo.progress import progress
from dspo.reward.backbone import ANY_SHAPE
from dspo.reward.dataset import Floats, RatedPairs, Rows, Stems, autocast
from dspo.reward.losses import masked_head_loss, mix_rows
from dspo.reward.model import RewardModel
from dspo.reward.views import View

MIXUP_SHARE = 0.8  # of the steps; the last ones see real pairs only
CHECKPOINT_EVERY_STEPS = 100
LEARNT_VIEWS = 2  # at most: each needs stem outputs of its own, and more of them teach no more
SCORE_BATCH = 64

State = dict[str, Tensor]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    ema: State  # moving average of the trained parameters: what scores
    raw: State  # the last step's
    curve: list[dict[str, float]]  # one row per epoch


@sdpa_kernel(ANY_SHAPE)
def train_reward(
    model: RewardModel,
    train: Stems,
    validation: Stems,
    params: RewardParams,
    seed: int,
    checkpoint: Path | None,
) -> Trained:
    """Fit the model to the train pairs; it holds the EMA weights afterwards.

    ``checkpoint``: a file that is written while training and picked up by the next call with the same arguments; the
    caller vouches that params, seed and data are the same. None: no checkpoints. Raises :class:`UserError` if the loss
    is no longer a number.
    """
    pairs = train.pairs
    parameters = model.trained_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(parameters, params), fused=True)
    learnt_from = model.views[:LEARNT_VIEWS]
    lr_of_group = [group["lr"] for group in optimizer.param_groups]
    ema = current_weights(model)
    labels = torch.from_numpy(pairs.head_shares(model.heads)).float().to(train.device)
    steps_per_epoch = math.ceil(len(pairs) / params.batch_size)
    batches = batches_of(pairs, params, seed)
    n_steps = len(batches)
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=train.device, weights_only=True)
        load_weights(model, saved["raw"])
        ema = saved["ema"]
        optimizer.load_state_dict(saved["optimizer"])
        start, losses, curve = saved["step"], saved["losses"], saved["curve"]
        logger.info("reward training continues at step %d of %d", start, n_steps)

    def view_of(step: int) -> View:
        return learnt_from[int(keyed_rng(seed, "reward-view", step).integers(len(learnt_from)))]

    for step in progress(range(start, n_steps), n_steps - start, "reward"):
        epoch, batch = divmod(step, steps_per_epoch)
        rows = batches[step]
        for group, lr in zip(optimizer.param_groups, lr_of_group, strict=True):
            group["lr"] = lr * schedule(step, params.warmup_steps, n_steps)
        mixing = params.mixup_alpha > 0 and step < MIXUP_SHARE * n_steps
        rng = keyed_rng(seed, "reward-mixup", step)
        mix = (
            (
                float(rng.beta(params.mixup_alpha, params.mixup_alpha)),
                rng.permutation(len(rows)),
            )
            if mixing
            else None
        )

        loss = batch_loss(model, train.seen(view_of(step)), rows, labels, mix, params.focal_gamma)
        for following in batches[step + 1 : step + 2]:
            train.seen(view_of(step + 1)).expect(distinct_views(pairs, following)[0][:, 1])
        if not torch.isfinite(loss):
            raise UserError(f"reward: the loss is {loss.item()} at step {step}; lower reward.lr_heads or lr_backbone")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters.values(), params.max_grad_norm)
        optimizer.step()
        update_ema(ema, parameters, params.ema_decay, step)
        losses.append(loss.item())

        if batch == steps_per_epoch - 1:
            curve.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": float(np.mean(losses)),
                    **check(model, ema, validation),
                }
            )
            losses = []
            logger.info(
                "reward %s",
                " ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()),
            )
        if checkpoint is not None and ((step + 1) % CHECKPOINT_EVERY_STEPS == 0 or batch == steps_per_epoch - 1):
            state = {
                "raw": current_weights(model),
                "ema": ema,
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(
                checkpoint,
                {**state, "step": step + 1, "losses": losses, "curve": curve},
            )

    raw = current_weights(model)
    load_weights(model, ema)
    return Trained(ema=ema, raw=raw, curve=curve)


def parameter_groups(parameters: dict[str, torch.nn.Parameter], params: RewardParams) -> list[dict[str, Any]]:
    """Backbone and new parts each at its rate; weight decay on matrices only."""
    groups = []
    for is_backbone, lr in ((True, params.lr_backbone), (False, params.lr_heads)):
        mine = [p for name, p in parameters.items() if name.startswith("backbone.") == is_backbone]
        groups.append(
            {
                "params": [p for p in mine if p.ndim >= 2],
                "lr": lr,
                "weight_decay": params.weight_decay,
            }
        )
        groups.append({"params": [p for p in mine if p.ndim < 2], "lr": lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def schedule(step: int, warmup_steps: int, n_steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def update_ema(ema: State, parameters: dict[str, torch.nn.Parameter], decay: float, step: int) -> None:
    """ema <- d * ema + (1 - d) * parameter, d = min(decay, (1 + step) / (10 + step)); decay 0 copies."""
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, parameter in parameters.items():
            ema[name].lerp_(parameter, 1 - d)


def epoch_order(pairs: RatedPairs, seed: int, epoch: int) -> Rows:
    """Row numbers [n_pairs]: prompts in random order, each with all its pairs at once.

    Pairs of a prompt share images, so that the towers see each image once and not once per pair (Ouyang et al., 2022).
    """
    rng = keyed_rng(seed, "reward-order", epoch)
    prompts, prompt_of_pair = np.unique(pairs.prompt_id, return_inverse=True)
    place_of_prompt = rng.permutation(len(prompts))
    return np.lexsort((rng.permutation(len(pairs)), place_of_prompt[prompt_of_pair]))


def batches_of(pairs: RatedPairs, params: RewardParams, seed: int) -> list[Rows]:
    """The rows of every step's pairs, epoch by epoch."""
    orders = (epoch_order(pairs, seed, epoch) for epoch in range(params.epochs))
    return [order[i : i + params.batch_size] for order in orders for i in range(0, len(order), params.batch_size)]


def batch_loss(
    model: RewardModel,
    stems: Stems,
    rows: Rows,
    labels: Tensor,
    mix: tuple[float, Rows] | None,
    gamma: float,
) -> Tensor:
    """Loss of the pairs ``rows``; ``mix``: MixUp's lambda and each row's partner, or None."""
    label = labels[torch.from_numpy(rows).to(labels.device)]
    mask = ~label.isnan()
    n = len(rows)
    distinct, place = distinct_views(stems.pairs, rows)
    with autocast(stems.device, stems.dtype):
        at = place.to(stems.device)
        z, cosine = (part.index_select(0, at) for part in view_features(model, stems, distinct))
        if mix is not None:
            lam, partner = mix[0], torch.from_numpy(mix[1]).to(labels.device)
            both = torch.cat([partner, partner + n])
            z, cosine = mix_rows(z, both, lam), mix_rows(cosine, both, lam)
            label, mask = mix_rows(label, partner, lam), mask & mask[partner]
        scores = model.score(z, cosine)
    return masked_head_loss(scores[:n] - scores[n:], label, mask, gamma)


def distinct_views(pairs: RatedPairs, rows: Rows) -> tuple[Rows, Tensor]:
    """The distinct (caption, image) row numbers of some pairs, [n_views, 2], and where each side's view is among them,
    [2 * len(rows)]: first the first images."""
    views = np.stack([np.tile(pairs.caption[rows], 2), np.concatenate([pairs.first[rows], pairs.second[rows]])], axis=1)
    distinct, place = np.unique(views, axis=0, return_inverse=True)
    return distinct, torch.from_numpy(place.reshape(-1))


def view_features(model: RewardModel, stems: Stems, views: Rows) -> tuple[Tensor, Tensor]:
    """What :meth:`RewardModel.features` gives for (caption, image) row numbers [n_views, 2]."""
    captions, row_of = np.unique(views[:, 0], return_inverse=True)
    text = model.backbone.text_top(*stems.texts(captions))[torch.from_numpy(row_of).to(stems.device)]
    return model.features(model.backbone.image_top(stems.images(views[:, 1])), text)


def check(model: RewardModel, ema: State, validation: Stems) -> dict[str, float]:
    """Validation likelihood (temperature 1) and accuracy on decided votes of `overall`, raw and EMA; of one view."""
    row = {}
    for name, state in (("raw", current_weights(model)), ("ema", ema)):
        with weights(model, state):
            difference = view_differences(model, validation)[:, model.heads.index("overall")]
        share, vote = validation.pairs.head_shares(("overall",))[:, 0], validation.pairs.vote
        nll = share * np.logaddexp(0, -difference) + (1 - share) * np.logaddexp(0, difference)
        decided = vote != 0.5
        row[f"validation_nll_{name}"] = float(np.nanmean(nll))
        row[f"validation_accuracy_{name}"] = float(np.mean((difference > 0)[decided] == (vote > 0.5)[decided]))
    return row


@sdpa_kernel(ANY_SHAPE)
def score_differences(model: RewardModel, stems: Stems) -> Floats:
    """Score of the first minus score of the second image, [n_pairs, n_heads]; the mean over the model's views."""
    mean: Floats = np.mean([view_differences(model, stems.seen(view)) for view in model.views], axis=0)
    return mean


def view_differences(model: RewardModel, stems: Stems) -> Floats:
    """As :func:`score_differences`, in the view of ``stems``; every (image, caption) is scored once."""
    n = len(stems.pairs)
    distinct, place = distinct_views(stems.pairs, np.arange(n))
    parts = (distinct[i : i + SCORE_BATCH] for i in range(0, len(distinct), SCORE_BATCH))

    def scored(part: Rows) -> Tensor:
        with torch.inference_mode(), autocast(stems.device, stems.dtype):
            return model.score(*view_features(model, stems, part))

    scores = torch.cat(list(in_lanes(scored, parts, stems.device, model.backbone.side))).cpu().numpy()
    table: Floats = scores.astype(np.float64)[place.numpy()]
    return table[:n] - table[n:]


@contextmanager
def weights(model: RewardModel, state: State) -> Iterator[None]:
    """The model with other trained parameters for the length of a block."""
    own = current_weights(model)
    load_weights(model, state)
    try:
        yield
    finally:
        load_weights(model, own)


def current_weights(model: RewardModel) -> State:
    """A copy of the trained parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.trained_parameters().items()}


def load_weights(model: RewardModel, state: State) -> None:
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            parameter.copy_(state[name])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the file whole, so that a kill leaves the old one. Raises :class:`UserError` if the disk is full."""
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(content.getbuffer(), path)
