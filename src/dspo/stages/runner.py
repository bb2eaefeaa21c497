"""How every stage is started: what a user can mend becomes one message and exit code 2, without a traceback."""

import argparse
import errno
import gc
import logging
import os
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from dspo.environment import launcher, rank
from dspo.errors import UserError

# torch has a class of its own for GPUs alone, and importing it here would cost every command a second.
NO_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|_ALLOC_FAILED", re.IGNORECASE)
LESS_MEMORY = (
    "In params.yaml set train.gradient_checkpointing to 1.0, or lower the batch_size of what ran (generate, score, "
    "train, reward or evaluate) or base.resolution; then run the same command again, finished work is kept. What a "
    "training takes: `dspo train --prompts data/prompts.csv --dry-run`. More: docs/troubleshooting.md."
)


def run(main: Callable[[list[str]], None], module: str | None = None) -> None:
    """Run ``main`` on the command line's arguments and end the process: 0, 2 after what a user can mend, 130 after
    an interruption.

    ``module``: the name of a stage that several processes can share; ``DSPO_LAUNCH`` starts them.
    """
    if module and (command := launcher()):
        os.execvp(command[0], [*command, "--module", module, *sys.argv[1:]])  # noqa: S606  no shell
    gc.freeze()  # what was imported stays: looking through it again at the end would cost every stage a second
    # Every process says an error; what goes on, the first one tells, of this package alone: open_clip tells every step.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("dspo", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; run the same command again, finished work is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = mendable(error)
        if message is None:
            raise
        stop(message)


def mendable(error: Exception) -> str | None:
    """What the user is told of an error, and can do about it; None for a defect of the program."""
    if said := out_of_memory(error):
        return f"out of memory ({said}). {LESS_MEMORY}"
    if isinstance(error, UserError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return "the disk is full. Free some space and run the same command again; finished work is kept."
    return None


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of the error that says so, also where reading a file ran out and the file was blamed."""
    while error is not None:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, MemoryError) or (not isinstance(error, UserError) and NO_MEMORY.search(said)):
            return said
        error = error.__context__
    return None


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def arguments(doc: str | None, argv: list[str], *names: str) -> argparse.Namespace:
    """Parse ``--params`` and the named path options, all required, into :class:`Path` values."""
    parser = argparse.ArgumentParser(description=doc)
    for name in ("params", *names):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args(argv)
