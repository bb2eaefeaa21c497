"""What the trainers of the small models share: a command line, and checkpoints to continue from."""

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_trainer(doc: str | None, train: Callable[..., None], *models: str) -> None:
    """Read the folders from the command line and call ``train(*models, work, output)``."""
    parser = argparse.ArgumentParser(description=doc)
    for name in models:
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of that model")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    train(*(getattr(args, name) for name in models), args.work, args.output)


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
