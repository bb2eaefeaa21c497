"""A stage that does next to nothing, for test_distributed.py: `python -m launched FOLDER`."""

from pathlib import Path

import torch

from dspo import distributed
from dspo.data.files import write_json
from dspo.stages.runner import run
from dspo.stages.shared import SharedScratch


def main(argv: list[str]) -> None:
    scratch = SharedScratch("launched", {}, [])
    own = distributed.share(range(7), 2)
    total = torch.full((1,), distributed.rank() + 1.0)
    distributed.add_up([total])
    found = {"all": distributed.merged(own, 2), "own": own, "sum": total.item(), "processes": distributed.count()}
    if distributed.first():
        write_json(found, scratch.path / "output" / "found.json")
    scratch.publish({"output": Path(argv[0])})


if __name__ == "__main__":
    run(main, "launched")
