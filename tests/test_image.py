"""The built image, run as docs/container.md runs it. Slow, and it needs an engine, so that it is asked for:

make image && DSPO_DOCKER_RUN='docker run' pytest tests/test_image.py
"""

import importlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, project

from dspo.params import load_params

RUN = shlex.split(os.environ.get("DSPO_DOCKER_RUN", ""))
IMAGE = "dspo"
USER = 1000 if os.geteuid() == 0 else os.geteuid()
STRICT = ["--rm", f"--user={USER}:{USER}", "--read-only", "--tmpfs=/tmp", "--network=none", "--cap-drop=ALL"]
pytestmark = pytest.mark.skipif(not RUN, reason="DSPO_DOCKER_RUN names no engine, as in DSPO_DOCKER_RUN='docker run'")


def run(*arguments: str | Path, status: int = 0) -> str:
    """Both outputs of a container; ``arguments``: flags, then the command after a ``dspo``."""
    done = subprocess.run(
        [*RUN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def give(folder: Path, user: int = USER) -> None:
    """Everything below ``folder`` to the user who calls."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)


@pytest.fixture(scope="module")
def mounts() -> Iterator[tuple[Path, Path]]:
    """A clone with the small configuration of tests/tiny_run.py, and an empty folder for caches."""
    with tempfile.TemporaryDirectory() as name:
        clone = project(Path(name) / "clone")
        cache = Path(name) / "cache"
        cache.mkdir()
        Path(name).chmod(0o755)
        give(Path(name))
        yield clone, cache


@pytest.fixture(scope="module")
def flags(mounts: tuple[Path, Path]) -> list[str]:
    return [*STRICT, f"--volume={mounts[1]}:/cache", f"--volume={mounts[0]}:/workspace"]


def test_the_three_commands(mounts: tuple[Path, Path], flags: list[str]) -> None:
    """check, repro, sync: as an unprivileged user, on a read-only root, without a network."""
    clone, _ = mounts
    said = run(*flags, IMAGE, "dspo", "check", status=1)
    assert "MISSING  reward model" in said  # nothing was run yet, and nothing else is missing
    assert said.count("MISSING") == 1
    said = run(*flags, IMAGE)
    print(said)
    stages = yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]
    ran = [line for line in said.splitlines() if line.startswith("Running stage")]
    assert sorted(ran) == sorted(f"Running stage '{name}':" for name in stages)
    assert (clone / "models/adapter/adapter_model.safetensors").stat().st_uid == USER
    assert (clone / "reports/index.html").exists()
    assert "MISSING" not in run(*flags, IMAGE, "dspo", "check")
    assert "up to date" in run(*flags, IMAGE, "dvc", "repro")
    assert "runs sent: 1" in run(*flags, IMAGE, "dspo", "sync")
    assert "runs sent: 0" in run(*flags, IMAGE, "dspo", "sync")
    changed = run(*flags, IMAGE, "git", "status", "--porcelain").splitlines()
    assert {line[3:].split("/")[0] for line in changed if line[1:3] in ("M ", "? ")} == {"dvc.lock", "reports"}


def test_it_runs_as_the_unprivileged_user_and_the_root_is_read_only(flags: list[str]) -> None:
    said = run(
        *flags, IMAGE, "sh", "-c", "id -u; touch /usr/x /var/tmp/x; ls /sys/class/net; grep CapEff /proc/self/status"
    )
    lines = said.splitlines()
    assert str(USER) in lines
    assert said.count("Read-only file system") == 2
    assert lines[-2:] == ["lo", "CapEff:\t0000000000000000"]
    assert run(*flags, IMAGE, "printenv", "HF_HUB_OFFLINE").endswith("\n1\n")


def test_a_compiler_for_triton_and_git_are_inside(flags: list[str]) -> None:
    compiled = "echo '#include <stdio.h>\nint main(void) { return 0; }' | gcc -xc - -o /tmp/program"
    assert "git version" in run(*flags, IMAGE, "sh", "-c", f"{compiled} && git --version")


@pytest.mark.parametrize(
    ("extra", "message", "remedy"),
    [
        (["--volume={clone}:/workspace:ro", "--volume={cache}:/cache"], "/workspace is not writable", "without :ro"),
        (["--volume={clone}:/workspace"], "/cache is not writable", "docker run -v dspo-cache:/cache"),
        (
            ["--volume={clone}:/elsewhere", "--volume={cache}:/cache", "--workdir=/elsewhere", "--user=0:0"],
            'Git does not trust /elsewhere: "dubious ownership"',
            f"docker run --user {USER}:{USER}",
        ),
    ],
)
def test_what_makes_every_command_fail_ends_it(
    mounts: tuple[Path, Path], extra: list[str], message: str, remedy: str
) -> None:
    given = [flag.format(clone=mounts[0], cache=mounts[1]) for flag in extra]
    strict = [flag for flag in STRICT if not (flag == "--cap-drop=ALL" and "--user=0:0" in extra)]
    said = run(*strict, *given, IMAGE, "true", status=2)
    assert message in said
    assert remedy in said


def test_without_gpu_and_weights_it_says_so_and_goes_on(mounts: tuple[Path, Path], flags: list[str]) -> None:
    clone = mounts[0].parent / "sdxl"
    shutil.copytree(mounts[0], clone, symlinks=True, dirs_exist_ok=True)
    params = clone / "params.yaml"
    params.write_text(params.read_text().replace("world: shapes", "world: sdxl"))
    give(clone)
    said = run(*STRICT, f"--volume={clone}:/workspace", f"--volume={mounts[1]}:/cache", IMAGE, "echo", "goes on")
    assert "-> docker run --gpus all" in said
    assert "missing in the hub's cache" in said
    assert "-> docker run --rm -v dspo-cache:/cache dspo hf download stabilityai/" in said
    assert said.endswith("goes on\n")


LOAD = """
import sys, time
from pathlib import Path
import torch
from dspo.diffusion.base import load_pipeline
from dspo.params import load_params
base = load_params(Path("params.yaml")).worlds["sdxl"].base
start = time.monotonic()
pipe = load_pipeline(base, torch.device("cpu"))
print(f"loaded in {time.monotonic() - start:.1f} s")
print(sum(weight.numel() for weight in pipe.unet.parameters()))
"""


def test_weights_in_the_mounted_cache_load_without_a_network(
    mounts: tuple[Path, Path], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few random weights, under the names and commits of SDXL's."""
    cache = mounts[0].parent / "weights"
    monkeypatch.syspath_prepend(ROOT / "tools")
    base = load_params(ROOT / "params.yaml").worlds["sdxl"].base
    sizes = importlib.import_module("random_sdxl").write_base(cache / "huggingface/hub", base, "tiny")
    give(cache)
    said = run(*STRICT, f"--volume={mounts[0]}:/workspace", f"--volume={cache}:/cache", IMAGE, "python", "-c", LOAD)
    print(said)
    assert said.endswith(f"\n{sizes['unet']}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_user_without_a_name_works_too(mounts: tuple[Path, Path]) -> None:
    clone = mounts[0].parent / "nameless"
    shutil.copytree(mounts[0], clone, symlinks=True)
    cache = mounts[0].parent / "nameless-cache"
    cache.mkdir()
    flags = [*STRICT, "--user=4321:4321", f"--volume={clone}:/workspace", f"--volume={cache}:/cache"]
    for folder in (clone, cache):
        give(folder, 4321)
    assert "I have no name" in run(*flags, IMAGE, "sh", "-c", "whoami || echo I have no name")
    run(*flags, IMAGE, "dvc", "repro", "prepare_prompts")
    assert (clone / "dvc.lock").stat().st_uid == 4321


STAGE = """
import signal
print("waiting", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("how", "clean"), [("stop", True), ("kill", False)])
def test_a_stop_leaves_no_lock_and_a_kill_leaves_one_that_is_named(flags: list[str], how: str, clean: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name)
        (clone / "dvc.yaml").write_text("stages: {wait: {cmd: python stage.py, outs: [out]}}")
        (clone / "stage.py").write_text(STAGE)
        subprocess.run(["git", "init", "--quiet", clone], check=True)
        (clone / ".dvc").mkdir()
        (clone / ".dvc/config").touch()
        give(clone)
        place = [*flags[:-1], f"--volume={clone}:/workspace"]
        container = f"dspo-{clone.name}".lower()
        command = [*RUN, *place, f"--name={container}", IMAGE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            assert running.stdout is not None
            assert any(line == "waiting\n" for line in running.stdout)
            subprocess.run([*RUN[:-1], how, container], check=True, capture_output=True)
            assert ("KeyboardInterrupt" in running.stdout.read()) == clean
        said = run(*place, IMAGE, "dvc", "status", "--quiet", status=1)
        assert ("rm .dvc/tmp/rwlock" not in said) == clean
