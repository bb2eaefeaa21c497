"""One scratch folder for all processes of a stage; several machines need it on a file system that they share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspo import distributed
from dspo.stages.atomic import open_scratch


class SharedScratch:
    """As :class:`~dspo.stages.atomic.Scratch`, for all processes of a stage; the first one holds and publishes it."""

    def __init__(self, stage: str, params: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        """Arguments and errors as :func:`~dspo.stages.atomic.open_scratch`; joins the other processes, if any."""
        distributed.start()
        self._own = open_scratch(stage, params, inputs) if distributed.first() else None
        self.path = distributed.from_first(self._own.path if self._own else Path())

    def publish(self, outputs: Mapping[str, Path]) -> None:
        """Publish when all processes have come here."""
        distributed.wait()
        if self._own:
            self._own.publish(outputs)
        distributed.wait()
        distributed.stop()
