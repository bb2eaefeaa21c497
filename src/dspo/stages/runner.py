"""How every stage is started: a user's mistake becomes one message and exit code 2, without a traceback."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dspo.environment import launcher, rank
from dspo.errors import UserError


def run(main: Callable[[list[str]], None], module: str | None = None) -> None:
    """Run ``main`` on the command line's arguments and end the process: 0, or 2 after a :class:`UserError`.

    ``module``: the name of a stage that several processes can share; ``DSPO_LAUNCH`` starts them.
    """
    if module and (command := launcher()):
        os.execvp(command[0], [*command, "--module", module, *sys.argv[1:]])  # noqa: S606  no shell
    # Every process says an error; what goes on, the first one tells, of this package alone: open_clip tells every step.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("dspo", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        main(sys.argv[1:])
    except UserError as error:
        stop(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        stop("the disk is full. Free some space and run the same command again; finished work is kept.")


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def arguments(doc: str | None, argv: list[str], *names: str) -> argparse.Namespace:
    """Parse ``--params`` and the named path options, all required, into :class:`Path` values."""
    parser = argparse.ArgumentParser(description=doc)
    for name in ("params", *names):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args(argv)
