"""Environment variables: they say where things are, never what the program does. The one module that reads them.

``DSPO_DEVICE``          torch device, e.g. ``cuda:1`` or ``cpu``; default: ``cuda`` where there is one, else the CPU.
                         ``cuda`` is the first one, under a launcher that of the process's place on its machine
``DSPO_SCRATCH``         folder for unfinished work; default: ``scratch`` in the current folder
``DSPO_PROCESSES``       processes for work that is spread over CPU cores; default: the cores this process may use
``DSPO_LAUNCH``          command that starts a stage in several processes (docs/scaling.md); default: one process
``MLFLOW_TRACKING_URI``  default: ``mlflow.db`` at the repository's root
``CC``                   the C compiler that Triton calls on a GPU; default: gcc, then clang

A launcher such as `accelerate launch` sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` for the processes it starts.
"""

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dspo.errors import UserError

if TYPE_CHECKING:
    import torch


def device() -> "torch.device":
    """Raises :class:`UserError` if ``DSPO_DEVICE`` names a device that is not there."""
    import torch  # here, so that reading a path does not cost torch's import

    name = os.environ.get("DSPO_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"DSPO_DEVICE={name}: no such device here ({str(error).splitlines()[0]}). Give cpu, cuda or cuda:N."
        ) from None
    return torch.device(name)


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Place of this process among those that a launcher started; 0 without one."""
    return int(os.environ["RANK"]) if launched() else 0


def launcher() -> list[str]:
    """The command to put before a stage's module, empty where there is none or it has done its work.

    It is given once: what it starts does not find it again.
    """
    command = shlex.split(os.environ.pop("DSPO_LAUNCH", ""))
    return [] if "RANK" in os.environ else command


def scratch_root() -> Path:
    return Path(os.environ.get("DSPO_SCRATCH") or "scratch")


def processes() -> int:
    wanted = os.environ.get("DSPO_PROCESSES")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"DSPO_PROCESSES={wanted}: expected a whole number of 1 or more")
    return int(wanted)


def c_compiler() -> str | None:
    """Path of the compiler that Triton calls on a GPU; None if there is none."""
    commands = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, commands)), None)


def repository_root() -> Path:
    """The nearest folder above the current one that holds ``params.yaml``; else the current folder.

    Inside an experiment that DVC runs in a copy below ``.dvc/tmp``, this is the repository the copy was made from.
    """
    here = Path.cwd()
    if ".dvc" in here.parts:
        here = Path(*here.parts[: here.parts.index(".dvc")])
    return next((folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file()), here)


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow.db'}"
