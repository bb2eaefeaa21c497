"""This repository's whole pipeline, run with real stages and models on few prompts and one step of everything."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[1]
KEPT = ("src", "dvc.yaml", "params.yaml", ".dvc", ".gitignore", ".dvcignore", "requirements.runtime.lock",
        "models", "data/prompts.csv", "data/raw", "reports/studies", "docs")  # fmt: skip
PROMPTS = 24
SAMPLER = {"scheduler": "ddim", "steps": 1, "guidance_scale": 1.0}
# `margin`: an untrained reward's gaps are of no known size. `lr`: after three steps the judges have to see something.
SMALL: dict[str, dict[str, Any]] = {
    "prompts": {"validation_share": 0.2, "test_share": 0.3},
    "ratings": {"validation_share": 0.2, "test_share": 0.3},
    "reward": {"epochs": 1, "warmup_steps": 0},
    "generate": {"samplers": [SAMPLER], "candidates_per_sampler": 2, "shard_size": 8},
    "score": {"validation_share": 0.3, "margin": 0.0},
    "train": {
        "rank": 2, "alpha": 2, "lr": 1e-2, "epochs": 1, "batch_size": 4, "warmup_steps": 0, "validation_prompts": 2,
        "checkpoint_every_steps": 1,
    },
    "evaluate": {
        "sampler": SAMPLER, "default_sampler": SAMPLER, "num_prompts": 4, "seeds_per_prompt": 1,
        "diversity_prompts": 2, "diversity_seeds": 2, "judges": ["gold"], "bootstrap_resamples": 20,
    },
}  # fmt: skip


def shell(
    folder: Path, *command: str | Path, fails: bool = False, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody who has this project's environment and no settings of their own.

    ``fails``: what is expected of it. Both outputs stand in ``stdout``.
    """
    who = {f"GIT_{role}_{what}": "tests@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "HOME": str(folder.parent),
        "OMP_NUM_THREADS": "1",
        "DSPO_PROCESSES": "1",
        "DSPO_DEVICE": "cpu",
        "COLUMNS": "300",
        **who,
        **(env or {}),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        start_new_session=True,  # what it starts can be killed as one
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done


def project(folder: Path) -> Path:
    """The files of this repository that its pipeline needs, with less to do; committed to Git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *KEPT],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    lines = (ROOT / "data/prompts.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "data/prompts.csv").write_text("".join(lines[: PROMPTS + 1]), encoding="utf-8")
    for path in (folder / "data/raw").glob("*.parquet"):
        rated = pq.read_table(path)
        prompts = pc.unique(rated["prompt_id"])[:PROMPTS]
        pq.write_table(rated.filter(pc.is_in(rated["prompt_id"], prompts)), path)
    raw = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SMALL.items():
        raw["worlds"]["shapes"][section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    shell(folder, "git", "init", "--quiet", "--initial-branch=main")
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "--quiet", "--message", "the project")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after `dvc repro` and a commit; one for all workers. Tests work on copies and clones of it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "tiny-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / "tiny-run" / "root"
        if not (folder.parent / "done").exists():
            shutil.rmtree(folder.parent, ignore_errors=True)
            shell(project(folder), "dvc", "repro")
            shell(folder, "git", "add", ".")
            shell(folder, "git", "commit", "--quiet", "--message", "run")
            (folder.parent / "done").touch()
    return folder
