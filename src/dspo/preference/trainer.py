"""Preference training of an adapter, in the order in which things happen.

Every draw is keyed by seed, epoch and pair, and a checkpoint holds all that the next step depends on: to go on after a
kill, call :func:`train` again with the same arguments. On a CPU both ways end in the same bytes.

Several processes share out the micro-batches of a step, which stay those of one process; only the order in which their
gradients are summed differs. The first process writes.

A step never waits for the device: its figures stay there until an epoch or a checkpoint is due.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dspo import distributed
from dspo.data.keys import keyed_seed
from dspo.errors import UserError
from dspo.params import TrainParams
from dspo.preference.checkpoint import Best, TrainingState, load_checkpoint, save_checkpoint
from dspo.preference.dataset import (
    Pairs,
    batches_alike,
    epoch_order,
    held_out_draws,
    rows_of,
    training_draw,
    with_random_labels,
)
from dspo.preference.diagnostics import Columns, Row, joined, summary
from dspo.preference.dora import Adapter, State
from dspo.preference.losses import EVERYTHING
from dspo.preference.method import Method, References, prepare
from dspo.preference.schedule import NoiseSchedule
from dspo.progress import progress

WATCHED = 256  # held-out pairs at most; a public set holds out more than a check has time for
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    adapter: State  # of the best epoch
    best_epoch: int
    steps: int
    log: list[Row]  # one row per step
    epochs: list[Row]  # one row per epoch, the untrained adapter's first


@dataclass(frozen=True)
class Step:
    """What a step leaves on the device."""

    known: Row  # its number, epoch and learning rate
    loss: Tensor
    gradient_norm: Tensor
    columns: list[Columns]  # of this process's micro-batches


def train(
    adapter: Adapter,
    schedule: NoiseSchedule,
    pairs: Pairs,  # to train on
    held_out: Pairs,  # of other prompts
    params: TrainParams,
    seed: int,
    folder: Path,  # for the checkpoint and the growing log
    reward_check: Callable[[UNet2DConditionModel], float] | None = None,  # picks the best epoch; None: the last one
    permute_k: bool = False,  # control, for DSPO: every winner gets another pair's k
) -> Trained:
    """Train the adapter, which holds the best epoch's parameters afterwards.

    The caller vouches that a checkpoint in ``folder`` is of the same arguments. Raises :class:`UserError` if the loss
    is no longer a number, all weights are 0, or the checkpoint is of another adapter.
    """
    mean_weight = pairs.weight.mean().item()
    if mean_weight == 0:
        raise UserError("train: every training pair's prompt has weight 0. Give a prompt a weight above 0.")
    if params.random_labels:
        pairs = with_random_labels(pairs, seed)
    held_out = rows_of(held_out, sorted(epoch_order(held_out, seed, 0)[:WATCHED]))
    if distributed.first() and distributed.count() > params.gradient_accumulation_steps:
        logger.warning(
            "train: a step has %d micro-batches for %d processes, so that some of them do nothing; "
            "raise train.gradient_accumulation_steps",
            params.gradient_accumulation_steps,
            distributed.count(),
        )
    accumulated = params.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(micro_batches(pairs, params, seed, 0)) / accumulated)
    n_steps = steps_per_epoch * params.epochs

    method = Method(adapter, schedule, params, permute_k)
    references = References()
    sizes = {some.latent_size(row) for some in (pairs, held_out) for row in range(len(some))}
    prepare(adapter.unet, params, len(sizes) + 1)  # one more for the images of the reward check
    parameters = list(adapter.parameters.values())
    optimizer = make_optimizer(adapter, params)
    folder.mkdir(parents=True, exist_ok=True)
    state = resume(adapter, optimizer, params, folder)
    if not state.epochs:
        state.epochs.append(check(method, references, state, held_out, params, seed, reward_check))
    unread: list[Step] = []
    epoch_batches: list[list[int]] = []

    cuda = [adapter.device] if adapter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the adapter's dropout draws from the global generator
        for step in progress(range(state.step, n_steps), n_steps - state.step, "train"):
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            drawn = epoch if params.fixed_draws is None else epoch % params.fixed_draws
            if step_in_epoch == 0 or not epoch_batches:
                epoch_batches = micro_batches(pairs, params, seed, drawn)
            batches = epoch_batches[step_in_epoch * accumulated : (step_in_epoch + 1) * accumulated]
            n_pairs = sum(map(len, batches))
            lr = params.lr * min(1.0, (step + 1) / max(1, params.warmup_steps))
            set_lr(optimizer, lr)

            adapter.train(True)
            loss = torch.zeros((), device=adapter.device)
            measured = []
            for number, rows in distributed.share(enumerate(batches)):
                draws = [
                    training_draw(pairs, row, seed, drawn, schedule.n_timesteps, params.prompt_dropout) for row in rows
                ]
                batch = method.batch(pairs, draws)
                reference = None
                if params.fixed_draws is not None and method.needs.reference:
                    reference = references.of((drawn, step_in_epoch, number), adapter, batch, method.needs)
                torch.manual_seed(keyed_seed(seed, "adapter dropout", step, number * params.batch_size))
                losses, columns = method.losses(batch, method.needs, reference)
                # The step's pairs and the whole set's mean weight: cutting into micro-batches changes nothing.
                share = (batch.weight * losses).sum() / (n_pairs * mean_weight)
                torch.autograd.backward(share)
                loss += share.detach()
                measured.append(columns)
            adapter.train(False)
            distributed.add_up_gradients(parameters)
            distributed.add_up([loss])

            norm = torch.nn.utils.clip_grad_norm_(parameters, params.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            adapter.refresh()
            if state.ema is not None:
                update_average(state.ema, adapter, params, step)
            state.step = step + 1
            unread.append(Step({"step": step + 1, "epoch": epoch + 1, "lr": lr}, loss, norm, measured))

            epoch_ends = step_in_epoch == steps_per_epoch - 1
            if epoch_ends or state.step % params.checkpoint_every_steps == 0:
                read(unread, schedule.n_timesteps, state.log, folder / LOG)
                unread.clear()
                if epoch_ends:
                    state.epochs.append(check(method, references, state, held_out, params, seed, reward_check))
                    keep_best(state, adapter)
                    logger.info("train %s", told(state.epochs[-1]))
                state.adapter, state.optimizer = on_host(adapter.parameters), optimizer.state_dict()
                if distributed.first():
                    save_checkpoint(folder / CHECKPOINT, state)

    assert state.best is not None
    adapter.load(state.best.adapter)
    return Trained(state.best.adapter, state.best.epoch, state.step, state.log, state.epochs)


def micro_batches(pairs: Pairs, params: TrainParams, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's pairs, by rows: `batch_size` at a time, of one latent size each."""
    return batches_alike(epoch_order(pairs, seed, epoch), params.batch_size, pairs.latent_size)


def make_optimizer(adapter: Adapter, params: TrainParams) -> torch.optim.Optimizer:
    """AdamW; magnitudes are not decayed, since their rest is ||W|| and not 0.

    Raises :class:`UserError` if the package for moments of 8 bits is missing.
    """
    matrices = [p for p in adapter.parameters.values() if p.ndim == 2]
    vectors = [p for p in adapter.parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=params.lr, fused=True)
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise UserError(
            "train.optimizer: adamw8bit needs the package torchao, which is not installed; `pip install torchao`"
        ) from None
    eight_bit: torch.optim.Optimizer = AdamW8bit(groups, lr=params.lr)
    return eight_bit


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def read(steps: list[Step], n_timesteps: int, log: list[Row], path: Path) -> None:
    """Read the steps into the log and its file; the device is waited for.

    Raises :class:`UserError` at a step that is no number; the steps before it are in the file and show how it came.
    """
    for step in steps:
        loss, norm = step.loss.item(), step.gradient_norm.item()
        check_finite("loss", loss, step.known["step"])
        check_finite("gradient norm", norm, step.known["step"])
        row = {"step": step.known["step"], "epoch": step.known["epoch"], "loss": loss, "gradient_norm": norm}
        row |= {"lr": step.known["lr"]} | summary(joined(merged(step.columns)), n_timesteps)
        log.append(row)
        append_row(path, row)


class RanAway(UserError):
    """A value is no number: no later step would mend it."""


def check_finite(name: str, value: float, step: float | None) -> None:
    """Raises :class:`RanAway` at a value that is no number."""
    if not math.isfinite(value):
        remedy = "lower train.lr or train.beta" if step else "set base.dtype to float32: the base model overflows"
        raise RanAway(f"train: the {name} is {value} at step {step}; {remedy}")


def resume(adapter: Adapter, optimizer: torch.optim.Optimizer, params: TrainParams, folder: Path) -> TrainingState:
    """The state of the checkpoint, loaded into adapter and optimizer; a fresh one where there is none."""
    if distributed.first():
        (folder / LOG).unlink(missing_ok=True)
    if not distributed.from_first((folder / CHECKPOINT).exists()):
        ema = None if params.ema_decay is None else adapter.state()
        return TrainingState(step=0, adapter=on_host(adapter.parameters), optimizer=optimizer.state_dict(), ema=ema)
    state = load_checkpoint(folder / CHECKPOINT, adapter.parameters)
    adapter.load(state.adapter)
    optimizer.load_state_dict(state.optimizer)
    if state.ema is not None:
        state.ema = {name: tensor.to(adapter.device) for name, tensor in state.ema.items()}
    for row in state.log:
        append_row(folder / LOG, row)
    logger.info("training continues at step %d", state.step)
    return state


def check(
    method: Method,
    references: References,
    state: TrainingState,
    held_out: Pairs,
    params: TrainParams,
    seed: int,
    reward_check: Callable[[UNet2DConditionModel], float] | None,
) -> Row:
    """Held-out pairs, and images of the adapter: of its moving average, where there is one."""
    adapter = method.adapter
    with adapter.holding(state.ema) if state.ema is not None else nullcontext():
        row: Row = {"epoch": len(state.epochs), "step": state.step}
        row |= held_out_row(method, references, held_out, params, seed)
        assert row["loss"] is not None
        check_finite("loss on held-out pairs", row["loss"], state.step)
        row["reward"] = None if reward_check is None else reward_check(adapter.unet)
    return row


@torch.no_grad()
def held_out_row(method: Method, references: References, pairs: Pairs, params: TrainParams, seed: int) -> Row:
    """Loss and diagnostics on fixed noise and timesteps, four per pair."""
    n_timesteps = method.schedule.n_timesteps
    draws = held_out_draws(pairs, seed, n_timesteps)
    batches = batches_alike(draws, params.batch_size, lambda draw: pairs.latent_size(draw.row))
    parts = []
    for number, drawn in distributed.share(enumerate(batches)):
        batch = method.batch(pairs, drawn)
        reference = references.of(("held out", number), method.adapter, batch, EVERYTHING)
        parts.append(method.losses(batch, EVERYTHING, reference)[1])
    columns = joined(merged(parts))
    return {"loss": columns["loss"].mean().item(), **summary(columns, n_timesteps)}


def merged(parts: list[Columns]) -> list[Columns]:
    """The columns of all processes' micro-batches, in their order, on the CPU."""
    return distributed.merged([{name: column.cpu() for name, column in part.items()} for part in parts])


def update_average(ema: State, adapter: Adapter, params: TrainParams, step: int) -> None:
    """ema <- d ema + (1 - d) parameter, d = min(decay, (1 + step) / (10 + step))."""
    assert params.ema_decay is not None
    decay = min(params.ema_decay, (1 + step) / (10 + step))
    for name, parameter in adapter.parameters.items():
        ema[name].lerp_(parameter.detach(), 1 - decay)


def keep_best(state: TrainingState, adapter: Adapter) -> None:
    """Keep the epoch that just ended if its reward beats every earlier one's, or if there are no rewards."""
    epoch, reward = len(state.epochs) - 1, state.epochs[-1]["reward"]
    if state.best is None or reward is None or state.best.reward is None or reward > state.best.reward:
        state.best = Best(epoch, reward, on_host(adapter.parameters if state.ema is None else state.ema))


def on_host(parameters: Mapping[str, Tensor]) -> State:
    """A copy in host memory: what no step reads takes no room on the device."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in parameters.items()}


def append_row(path: Path, row: Row) -> None:
    if not distributed.first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def told(row: Row) -> str:
    names = ("epoch", "loss", "implicit_accuracy", "margin", "u_std", "reward")
    return " ".join(f"{name} {row[name]:.4g}" for name in names if row[name] is not None)
