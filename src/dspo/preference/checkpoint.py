"""The state of a training run on disk: everything that the next step depends on. Read with ``weights_only=True``."""

import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspo.data.files import write_bytes
from dspo.errors import UserError
from dspo.preference.diagnostics import Row
from dspo.preference.dora import State


@dataclass
class Best:
    """The adapter of the epoch whose images the reward model liked most."""

    epoch: int
    reward: float | None
    adapter: State


@dataclass
class TrainingState:
    step: int  # optimizer steps done
    adapter: State
    optimizer: dict[str, Any]
    ema: State | None
    best: Best | None = None
    log: list[Row] = field(default_factory=list)  # one row per step
    epochs: list[Row] = field(default_factory=list)  # one row per epoch, the untrained adapter's first


def save_checkpoint(path: Path, state: TrainingState) -> None:
    """Replace the file whole, so that a kill leaves the old one. Equal states give equal bytes.

    Raises :class:`UserError` if the disk is full.
    """
    fields = {name: getattr(state, name) for name in ("step", "adapter", "optimizer", "ema", "log", "epochs")}
    best = None if state.best is None else {name: getattr(state.best, name) for name in ("epoch", "reward", "adapter")}
    content = io.BytesIO()
    torch.save(_interned(fields | {"best": best}), content)
    write_bytes(content.getbuffer(), path)


def load_checkpoint(path: Path, like: Mapping[str, Tensor]) -> TrainingState:
    """The state in host memory.

    Raises :class:`UserError` if the file is damaged, or its adapter has other names or shapes than ``like``.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        best = saved.pop("best")
        state = TrainingState(**saved, best=None if best is None else Best(**best))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a training checkpoint ({error}). Remove it to start anew.") from None
    if {name: t.shape for name, t in state.adapter.items()} != {name: t.shape for name, t in like.items()}:
        raise UserError(f"{path}: a checkpoint of another model or adapter. Remove it to start anew.")
    return state


def _interned(value: Any) -> Any:
    """The same value in which equal strings are one object: pickle writes a string anew for every object."""
    if isinstance(value, dict):
        return {_interned(key): _interned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_interned(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value
