"""The code for a GPU on a machine that has none: `tests/gpu` stands in for CUDA, and says how."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import shell, tiny_run

from dspo.diffusion.compiled import lacks_compiler

__all__ = ["tiny_run"]  # a fixture

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests/gpu"
STAGES = ("train_reward", "generate_pairs", "score", "train", "evaluate")

LACKING = lacks_compiler() if sys.platform == "linux" else "torch for CUDA"
pytestmark = pytest.mark.skipif(
    LACKING is not None and "CI" not in os.environ, reason=f"{LACKING}: nothing to run with"
)


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after its stages ran on CPUs; in `gpu` what each of them makes of the same inputs on a GPU."""
    folder = tmp_path_factory.mktemp("gpu") / "project"
    shutil.copytree(tiny_run, folder)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    commands = []
    for name in STAGES:
        command = stages[name]["cmd"].split("python -m ")[-1]
        commands.append(command.replace("--output ", "--output gpu/").replace("--log ", "--log gpu/"))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "src", "WAITS": str(folder / "waits.json")}
    shell(folder, sys.executable, STAND_IN, "checked", *commands, env=env)
    return folder


def both(run: Path, path: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    read = pd.read_csv if path.endswith(".csv") else pd.read_parquet
    return read(run / path), read(run / "gpu" / path)


def test_every_stage_says_on_a_gpu_what_it_says_on_a_cpu(run: Path) -> None:
    """No tensor of the CPU meets one of the GPU in an operation, or the run would have ended; and the results are those
    of a CPU but for what is computed in another order there (attention, convolutions, dropout)."""
    cpu, gpu = both(run, "models/reward/curve.csv")
    assert np.allclose(cpu, gpu, rtol=1e-4)

    cpu, gpu = both(run, "data/candidates/00000.parquet")
    for ours, theirs in zip(cpu["latent"], gpu["latent"], strict=True):
        latents = [np.frombuffer(one, "<f2").astype(float) for one in (ours, theirs)]
        assert np.allclose(*latents, atol=2e-3)

    cpu, gpu = both(run, "data/pairs/scores.csv")
    assert (cpu["prompt_id"] == gpu["prompt_id"]).all()
    assert np.allclose(cpu["overall"], gpu["overall"], atol=5e-3)  # of a range of 25

    cpu, gpu = both(run, "models/training/log.csv")
    assert np.allclose(cpu[["loss", "gradient_norm"]], gpu[["loss", "gradient_norm"]], rtol=1e-4)
    ours, theirs = (load_file(folder / "models/adapter/adapter_model.safetensors") for folder in (run, run / "gpu"))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().mean() < 1e-4, name

    cpu, gpu = both(run, "data/evaluation/deltas.csv")
    assert np.allclose(cpu.select_dtypes("number"), gpu.select_dtypes("number"), atol=1e-2)


def test_a_training_step_never_waits_for_the_gpu(run: Path) -> None:
    """Only what reads a log, an image or a checkpoint does. Each wait is told by the functions that led to it."""
    waits = [chain.split("trainer.train", 1)[1].split() for chain in json.loads((run / "waits.json").read_text())
             if "trainer.train" in chain]  # fmt: skip
    assert {called[0] if called else "train itself" for called in waits} == {
        "trainer.resume", "trainer.check", "trainer.read", "trainer.on_host", "trainer.keep_best", "dora.load",
    }  # fmt: skip


def test_what_a_gpu_would_refuse_is_an_error_here(tmp_path: Path) -> None:
    """Else the two tests above would show nothing."""
    program = """
import pytest, torch
x = torch.ones(2, device="cuda")
with pytest.raises(RuntimeError, match="same device"):
    x + torch.ones(2)
with pytest.raises(TypeError, match="numpy"):
    x.numpy()
with pytest.raises(RuntimeError, match="generator"):
    torch.rand(2, device="cuda", generator=torch.Generator())
x.sum().item(), x.cpu(), x[x > 0], x.to("cpu", non_blocking=True), torch.ones(2).to("cuda")
torch.ones(2).pin_memory().to("cuda", non_blocking=True)
"""
    (tmp_path / "refused.py").write_text(program)
    env = {"PATH": os.environ["PATH"], "WAITS": str(tmp_path / "waits.json")}
    shell(tmp_path, sys.executable, STAND_IN, "checked", "refused", env=env)
    assert sum(json.loads((tmp_path / "waits.json").read_text()).values()) == 5


def test_a_step_at_sdxls_true_size_is_compiled_and_takes_what_the_bench_says(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    told = shell(ROOT, sys.executable, "-O", STAND_IN, "hollow", "step", env=env).stdout
    assert any((tmp_path / "cache").rglob("*.cubin"))
    bench = json.loads((ROOT / "reports/bench/no-gpu-seconds-of-the-host.json").read_text(encoding="utf-8"))
    assert float(told.splitlines()[-1]) == pytest.approx(bench["peak_memory_gb"], rel=0.01)
