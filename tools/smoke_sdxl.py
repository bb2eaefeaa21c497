"""The world `sdxl` from prompts to adapter, on SDXL and ViT-L-14-336 at their true size with random weights.

    python tools/smoke_sdxl.py --work scratch/smoke-sdxl --transcript docs/smoke-sdxl.txt

`params.yaml` stays as it is but for the amount of work: two prompts (one to train on, one held out), two candidates
each, one rated pair for each split, one sampling step, one training step, 256 px. The models are read offline from a
cache of the hub below --work, which is removed at the end. The transcript is written when all went well.
`--size tiny` runs the same on models of about a million parameters.
"""

import argparse
import csv
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STAGES: dict[str, list[str]] = {
    "prepare_prompts": ["--prompts", "prompts.csv", "--output", "prompts"],
    "prepare_ratings": ["--input", "rated", "--output", "ratings"],
    "train_reward": ["--ratings", "ratings", "--output", "reward"],
    "generate_pairs": ["--prompts", "prompts/train.csv", "--output", "candidates"],
    "score": ["--candidates", "candidates", "--reward", "reward", "--output", "pairs"],
    "train": [
        *("--pairs", "pairs", "--reward", "reward", "--validation-prompts", "prompts/validation.csv"),
        *("--output", "adapter", "--log", "training"),
    ],
}
SHARES = {"validation_share": 0.3, "test_share": 0.3}
PROMPTS = [f"a chair, view {number}" for number in range(8)]
PIXELS = {"full": 256, "tiny": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to fill and remove; the full size takes 12 GB")
    parser.add_argument("--transcript", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--size", choices=list(PIXELS), default="full")
    args = parser.parse_args()
    work = args.work.resolve()
    if work.exists():
        sys.exit(f"error: {work} is there already; remove it or give another --work")
    transcript = Transcript()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended from outside"))  # so that the folder is removed
    try:
        smoke(work, args.params, args.size, transcript)
    finally:
        shutil.rmtree(work)
    args.transcript.write_text("\n".join([*transcript.lines, ""]), encoding="utf-8")


def smoke(work: Path, params: Path, size: str, transcript: "Transcript") -> None:
    work.mkdir(parents=True)
    raw = yaml.safe_load(params.read_text(encoding="utf-8"))
    write_inputs(work, PIXELS[size], raw["seed"])
    transcript.say(f"SDXL and ViT-L-14-336, size {size}, random weights, {PIXELS[size]} px; {machine()}")
    start = time.monotonic()
    written = measured(["models", str(work), str(params), size], work)
    raw["worlds"]["sdxl"]["reward"] |= written["reward"]
    with_little_work(raw, PIXELS[size])
    (work / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    counts = ", ".join(f"{part} {n:,}" for part, n in written["parameters"].items())
    transcript.say(f"parameters: {counts}")
    transcript.say(f"on disk: {sum(f.stat().st_size for f in work.rglob('*') if f.is_file()) / 1e9:.2f} GB")
    transcript.row("what", "seconds", "CPU seconds", "peak memory", "peak GPU memory")
    transcript.measured("write the models", written)
    for name, arguments in STAGES.items():
        transcript.measured(
            name, measured(["stage", f"dspo.stages.{name}", "--params", "params.yaml", *arguments], work)
        )
    transcript.say(f"whole: {time.monotonic() - start:.0f} s")
    transcript.say(adapter(work / "adapter"))


def with_little_work(raw: dict[str, Any], pixels: int) -> None:
    """As little as every stage can do; models, dtypes, heads and adapter stay those of the world."""
    sampler = {"scheduler": "euler", "steps": 1, "guidance_scale": 5.0}
    raw["world"] = "sdxl"
    world = raw["worlds"]["sdxl"]
    world["base"]["resolution"] = pixels
    world["prompts"] |= SHARES
    world["ratings"] |= {"layout": "csv", **SHARES}
    world["reward"] |= {"batch_size": 1, "warmup_steps": 0}
    world["generate"] |= {"num_prompts": 2, "samplers": [sampler], "candidates_per_sampler": 2, "batch_size": 2}
    world["score"] |= {"margin": 0.0, "max_pairs_per_prompt": 1, "validation_share": 0.5, "batch_size": 2}
    world["train"] |= {"gradient_accumulation_steps": 1, "epochs": 1, "warmup_steps": 0, "validation_prompts": 1}
    world["evaluate"] |= {"sampler": sampler, "batch_size": 1}


def write_inputs(work: Path, pixels: int, seed: int) -> None:
    """Prompts, and a rated pair of noise for each split."""
    import numpy as np
    from PIL import Image

    from dspo.data.keys import prompt_id
    from dspo.data.splits import split_of

    (work / "prompts.csv").write_text("\n".join(["prompt", *(f'"{prompt}"' for prompt in PROMPTS)]) + "\n")
    rated = {split_of(prompt_id(prompt), seed, **SHARES): prompt for prompt in PROMPTS}
    (work / "rated").mkdir()
    random = np.random.default_rng(0)
    with (work / "rated" / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "winner", "loser"])
        for number, prompt in enumerate(rated.values()):
            names = [f"{side}-{number}.png" for side in ("winner", "loser")]
            for name in names:
                noise = random.integers(0, 256, (pixels, pixels, 3), np.uint8)
                Image.fromarray(noise).save(work / "rated" / name)
            writer.writerow([prompt, *names])


def measured(task: list[str], work: Path) -> dict[str, Any]:
    """Run a task of this file in a process of its own, offline, in ``work``; what it says about itself."""
    hub = {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "DSPO_SCRATCH": str(work / "scratch")}
    report = work / "report.json"
    inside = [sys.executable, str(Path(__file__).resolve()), "--inside", str(report), *task]
    where = work if task[0] == "stage" else None
    done = subprocess.run(inside, cwd=where, env=os.environ | hub, check=False)
    if done.returncode:
        sys.exit(f"error: {task[1]} ended with exit code {done.returncode}")
    said: dict[str, Any] = json.loads(report.read_text())
    return said


def inside(report: Path, task: str, arguments: list[str]) -> None:
    start = time.monotonic()
    said: dict[str, Any] = {}
    if task == "models":
        said = write_models(*arguments)
    else:
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    said["seconds"] = time.monotonic() - start
    said["cpu_seconds"] = time.process_time()
    said["peak_gb"] = peak_memory() / 1e9
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        said["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    report.write_text(json.dumps(said))


def peak_memory() -> int:
    """Largest resident set of this process, bytes, pages of mapped files included. Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def write_models(work: str, params: str, size: str) -> dict[str, Any]:
    from random_sdxl import write_base, write_clip

    from dspo.params import load_params

    cache = Path(work) / "hub" / "hub"
    parameters = write_base(cache, load_params(Path(params)).worlds["sdxl"].base, size)
    reward, parameters["reward backbone"] = write_clip(cache, Path(work) / "clip", size)
    return {"parameters": parameters, "reward": reward}


def adapter(folder: Path) -> str:
    """What is in the adapter; training must have moved it."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        sys.exit("error: the adapter holds numbers that are not finite")
    pushed = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.any()]
    if not pushed:
        sys.exit("error: training left the adapter as it was")
    modules = sum("lora_A" in name for name in tensors)
    total = sum(tensor.numel() for tensor in tensors.values())
    return f"adapter: {modules} modules, {total:,} parameters, all finite; B moved in {len(pushed)} modules"


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"CPU {model or platform.machine()}, {torch.get_num_threads()} threads, {memory:.0f} GB"


class Transcript:
    """Lines that are said at once, and kept for a file: one of a run that failed would replace a good one."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def row(self, *cells: str) -> None:
        self.say(f"{cells[0]:<18}" + "".join(f"{cell:>18}" for cell in cells[1:]))

    def measured(self, name: str, said: dict[str, Any]) -> None:
        gpu = f"{said['gpu_gb']:.2f} GB" if "gpu_gb" in said else "-"
        self.row(name, f"{said['seconds']:.1f}", f"{said['cpu_seconds']:.1f}", f"{said['peak_gb']:.2f} GB", gpu)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
