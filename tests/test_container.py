"""What can be checked of the container without building it. `make image` builds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]


def enter(folder: Path, tools: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint in a folder. ``tools`` holds what stands in for programs of the container."""
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools), "LC_ALL": "C"}
    entrypoint = str(ROOT / "container/entrypoint.sh")
    return subprocess.run(
        [entrypoint, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    return tmp_path / "tools"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return folder


def program(tools: Path, name: str, script: str) -> None:
    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
    (tools / name).chmod(0o755)


def test_the_command_runs_with_its_arguments_and_exit_code(clone: Path, tools: Path) -> None:
    done = enter(clone, tools, "sh", "-c", 'echo "$1"; exit 7', "sh", "a b; c")
    assert (done.returncode, done.stdout) == (7, "a b; c\n")
    assert "no GPU" in done.stderr


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path, tools: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no dvc.yaml" in enter(empty, tools, "true").stderr
    (empty / "dvc.yaml").write_text("stages: {}\n")
    done = enter(empty, tools, "true")
    assert done.returncode == 2
    assert "no Git repository" in done.stderr


def test_dubious_ownership_names_the_user_to_run_as(clone: Path, tools: Path) -> None:
    program(tools, "git", "echo 'fatal: detected dubious ownership in repository' >&2; exit 128")
    done = enter(clone, tools, "true")
    assert done.returncode == 2
    assert f"--user {clone.stat().st_uid}:{clone.stat().st_gid}" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(clone: Path, tools: Path) -> None:
    clone.chmod(0o555)
    done = enter(clone, tools, "true")
    assert done.returncode == 2
    assert "not writable" in done.stderr


@pytest.mark.parametrize(
    ("nvidia_smi", "message"),
    [("echo 570.12.01", "older than 580"), ("exit 9", "finds no driver"), ("echo 580.65.06", "")],
)
def test_the_driver_is_looked_at(clone: Path, tools: Path, nvidia_smi: str, message: str) -> None:
    program(tools, "nvidia-smi", nvidia_smi)
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert message in done.stderr
    assert bool(done.stderr) == bool(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model: models/shapes-sdxl": "model: models/none"}, "models/none: the base model is not here"),
        ({"world: shapes": "world: sdxl"}, "is not in the hub's cache and will be downloaded"),
        ({"world: shapes": "world: shape"}, "'shape' is none of"),
    ],
)
def test_a_missing_base_model_is_named(clone: Path, tools: Path, change: dict[str, str], message: str) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in change.items():
        text = text.replace(old, new)
    (clone / "params.yaml").write_text(text)
    program(tools, "python", f'exec {sys.executable} "$@"')
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert message in done.stderr


def test_the_image_has_the_locked_packages_and_no_root() -> None:
    assert "--require-hashes -r /build/requirements.runtime.lock" in DOCKERFILE
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"]
    assert "ARG BASE=python:3.11-slim-bookworm" in DOCKERFILE
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${BASE}", "${BASE}"]


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert sorted(path for line in copied for path in line.split()) == sorted(kept)
    assert all((ROOT / path).exists() for path in kept)


def test_uv_and_python_are_those_of_the_makefile() -> None:
    version = re.search(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version
    assert f"ARG UV_VERSION={version[1]}" in DOCKERFILE


def test_mlflow_answers_to_its_service_name_and_is_asked_by_it() -> None:
    mlflow = SERVICES["mlflow"]
    assert "mlflow:5000" in mlflow["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "http://mlflow:5000/api/" in mlflow["healthcheck"]["test"][-1]
    assert SERVICES["pipeline"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_only_loopback_ports_are_published_and_images_have_versions() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert all(re.search(r":[^:]*\d", image) and not image.endswith(":latest") for image in images)


def test_compose_and_the_lock_have_the_same_mlflow() -> None:
    locked = re.search(r"^mlflow==(\S+)", (ROOT / "requirements.runtime.lock").read_text(), re.MULTILINE)
    assert locked
    assert f":v{locked[1]}-full" in SERVICES["mlflow"]["image"]


def test_the_gpu_is_an_override() -> None:
    override = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]["pipeline"]
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["pipeline"]
