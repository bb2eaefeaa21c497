"""Checkpoints of the trainers that make the small models: the same command again continues."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, step: int, **parts: Any) -> None:
    """Write the ``state_dict`` of every part and the next step, whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, **parts: Any) -> int:
    """Restore every part and return the next step; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
