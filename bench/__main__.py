"""Measure on the device that is there and write ``<output>/<device>.{json,md,png}``."""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

from bench import groups
from bench.measure import Row
from bench.models import SIZES, build_pipeline
from bench.report import write
from dspo import environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), help="default: full on a GPU, small on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("reports/bench"))
    args = parser.parse_args()

    device = environment.device()
    size = SIZES[args.size or ("full" if device.type == "cuda" else "small")]
    if device.type == "cpu":
        torch.set_num_threads(1)
    say(f"{device_name(device)}, size {size.name}, {args.rounds} rounds")
    pipe = build_pipeline(size, device)
    machine = {
        "device": device_name(device),
        "size": size.name,
        "dtype": str(size.dtype).removeprefix("torch."),
        "rounds": args.rounds,
        "torch": torch.__version__,
    }
    rows: list[Row] = []
    for group in (groups.adapters, groups.recipes, groups.growth, groups.images):
        start = time.monotonic()
        rows += group(pipe, size, args.rounds)
        say(f"{group.__name__}: {time.monotonic() - start:.0f} s")
        say(f"{write(args.output, machine, rows)}")  # what is measured is kept, whatever happens to the rest


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU {model}, one core"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
