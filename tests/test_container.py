"""What can be checked of the container without building it. `make image` builds it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]


ANYBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []


def enter(
    folder: Path, tools: Path, *command: str, user: Sequence[str] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint in a folder. ``tools`` holds what stands in for programs of the container, and is its HOME."""
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools), "LC_ALL": "C", **(env or {})}
    entrypoint = str(ROOT / "container/entrypoint.sh")
    return subprocess.run(
        [*user, entrypoint, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def tools(place: Path) -> Path:
    (place / "tools").mkdir()
    (place / "tools").chmod(0o777)
    return place / "tools"


@pytest.fixture
def clone(place: Path) -> Path:
    folder = place / "clone"
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    return folder


def program(tools: Path, name: str, script: str) -> None:
    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
    (tools / name).chmod(0o755)


def owner(folder: Path) -> str:
    return f"{folder.stat().st_uid}:{folder.stat().st_gid}"


def test_the_command_runs_with_its_arguments_and_exit_code(clone: Path, tools: Path) -> None:
    done = enter(clone, tools, "sh", "-c", 'echo "$1"; exit 7', "sh", "a b; c")
    assert (done.returncode, done.stdout) == (7, "a b; c\n")


def test_where_nothing_is_missing_nothing_is_said(clone: Path, tools: Path) -> None:
    program(tools, "nvidia-smi", "echo 580.65.06")
    (clone / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (clone / "models").symlink_to(ROOT / "models")
    with_packages(tools)
    done = enter(clone, tools, "echo", "done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("routes", "offline"),
    [
        ("", "1"),
        ("eth0 00000000 010011AC 0003 0 0 0 00000000", ""),
        ("fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000001     eth0", ""),
    ],
)
def test_without_a_network_the_hub_is_not_asked(clone: Path, tools: Path, routes: str, offline: str) -> None:
    """As the kernel says it: a headline, `lo` in any case, and what interfaces there are, but not idle ones."""
    lo = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 00200200       lo"
    program(tools, "cat", f"printf '%s\\n' 'Iface Destination Gateway ' '{routes or lo}' '{lo}'")
    assert enter(clone, tools, "sh", "-c", 'echo "$HF_HUB_OFFLINE"').stdout == f"{offline}\n"


def test_without_a_gpu_the_flag_is_named(clone: Path, tools: Path) -> None:
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert "warning: no GPU in this container" in done.stderr
    assert "-> docker run --gpus all" in done.stderr


@pytest.mark.parametrize(
    ("nvidia_smi", "message", "remedy"),
    [
        ("echo 570.12.01", "driver 570.12.01 is older than 580", "apt install nvidia-driver-580"),
        ("printf '580.65.06\\n570.12.01\\n'", "", ""),
        ("echo No devices were found; exit 6", "does not answer: nvidia-smi fails: No devices", "nvidia-ctk"),
        ("echo 'Failed to initialize NVML: Unknown Error'; exit 255", "Failed to initialize NVML", "nvidia-ctk"),
        ("echo 580.65.06", "", ""),
    ],
)
def test_the_driver_is_looked_at(clone: Path, tools: Path, nvidia_smi: str, message: str, remedy: str) -> None:
    program(tools, "nvidia-smi", nvidia_smi)
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert message in done.stderr
    assert remedy in done.stderr
    assert bool(done.stderr) == bool(message)


def with_packages(tools: Path) -> None:
    """As in the image: this checkout's code and the packages, and a hub's cache that holds nothing."""
    program(tools, "python", f'HF_HOME={tools}/hub PYTHONPATH={ROOT}/src exec {sys.executable} "$@"')


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (
            {"model: models/shapes-sdxl": "model: models/none"},
            "the base model is not whole: models/none: missing: all of",
            "-> git checkout -- models/none",
        ),
        (
            {"world: shapes": "world: sdxl"},
            "stabilityai/stable-diffusion-xl-base-1.0: missing in the hub's cache at 46216598",
            "-> docker run --rm -v dspo-cache:/cache dspo hf download stabilityai/stable-diffusion-xl",
        ),
        ({"world: shapes": "world: shape"}, "'shape' is none of", "-> correct params.yaml"),
    ],
)
def test_a_missing_base_model_is_named(
    clone: Path, tools: Path, change: dict[str, str], message: str, remedy: str
) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in change.items():
        text = text.replace(old, new)
    (clone / "params.yaml").write_text(text)
    with_packages(tools)
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert message in done.stderr
    assert remedy in done.stderr


def test_packages_that_do_not_load_are_said(clone: Path, tools: Path) -> None:
    (clone / "params.yaml").write_text("world: shapes\n")
    program(tools, "python", "echo no such package >&2; exit 1")
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert "warning: the packages do not load" in done.stderr


def test_a_workspace_that_cannot_be_written_names_its_owner(clone: Path, tools: Path) -> None:
    clone.chmod(0o555)
    done = enter(clone, tools, "echo", "ran", user=ANYBODY)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {clone} is not writable by uid" in done.stderr
    assert 'chown -R "$(id -u):$(id -g)" .' in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_workspace_of_somebody_else_names_the_user_to_run_as(clone: Path, tools: Path) -> None:
    os.chown(clone, 1234, 1235)
    done = enter(clone, tools, "true", user=ANYBODY)
    assert done.returncode == 2
    assert "it belongs to uid 1234" in done.stderr
    assert "-> docker run --user 1234:1235" in done.stderr


@pytest.mark.parametrize("mode", [0o555, None])
def test_a_cache_that_cannot_be_written_names_the_mount(clone: Path, tools: Path, mode: int | None) -> None:
    cache = tools / "cache"
    if mode is not None:
        cache.mkdir(mode)
    clone.chmod(0o777)
    done = enter(clone, tools, "true", user=ANYBODY, env={"HOME": str(cache)})
    assert done.returncode == 2
    assert f"error: {cache} is not" in done.stderr
    assert f"-> docker run -v dspo-cache:{cache}" in done.stderr


def test_a_folder_that_is_no_clone_is_named(place: Path, tools: Path) -> None:
    empty = place / "empty"
    empty.mkdir()
    done = enter(empty, tools, "true")
    assert done.returncode == 0
    assert "holds no dvc.yaml" in done.stderr
    (empty / "dvc.yaml").write_text("stages: {}\n")
    done = enter(empty, tools, "true")
    assert done.returncode == 2
    assert "needs one (fatal: not a git repository" in done.stderr
    assert '-> mount a whole clone, with its .git: docker run -v "$PWD":/workspace' in done.stderr
    program(tools, "git", "printf 'fatal: none up to /\\nStopping at a boundary\\n' >&2; exit 128")  # as at a mount
    assert "needs one (fatal: none up to /).\n" in enter(empty, tools, "true").stderr


@pytest.mark.parametrize(
    ("held", "said"), [('{"write": {"out": {"pid": 7, "cmd": "dvc repro"}}}', True), ("{}", False)]
)
def test_locks_of_a_run_that_was_killed_are_named(clone: Path, tools: Path, held: str, said: bool) -> None:
    (clone / ".dvc/tmp").mkdir(parents=True)
    (clone / ".dvc/tmp/rwlock").write_text(held)
    done = enter(clone, tools, "true")
    assert done.returncode == 0
    assert ("-> if none goes on: rm .dvc/tmp/rwlock" in done.stderr) == said


def test_dubious_ownership_names_the_user_to_run_as(clone: Path, tools: Path) -> None:
    """By Git itself, which is told to take the owner for another."""
    done = enter(clone, tools, "true", env={"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"})
    assert done.returncode == 2
    assert "Git does not trust" in done.stderr
    assert "dubious ownership" in done.stderr
    assert f"-> docker run --user {owner(clone)}" in done.stderr


def test_the_image_has_the_locked_packages_and_no_root() -> None:
    assert "--require-hashes -r /build/requirements.runtime.lock" in DOCKERFILE
    assert "ARG BASE=python:3.11-slim-bookworm" in DOCKERFILE
    stages = re.findall(r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert [name for _, name, _ in stages] == ["packages", "system", "dev", "runtime"]
    assert {base for base, _, _ in stages} == {"${BASE}", "system"}
    for _, name, instructions in stages[2:]:
        assert re.findall(r"^USER (\S+)", instructions, re.MULTILINE) == ["1000:1000"], name


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


def test_the_one_off_runs_as_the_caller_on_a_read_only_root() -> None:
    pipeline = SERVICES["pipeline"]
    assert pipeline["user"] == "${DSPO_USER:-1000:1000}"
    assert pipeline["read_only"]
    assert pipeline["tmpfs"] == ["/tmp"]
    assert [volume.split(":")[1] for volume in pipeline["volumes"]] == ["/workspace", "/cache"]


def test_docker_run_compose_and_the_dev_container_share_one_cache() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    mounted = next(volume for volume in SERVICES["pipeline"]["volumes"] if volume.endswith(":/cache"))
    name = compose["volumes"][mounted.split(":")[0]]["name"]
    for page in ("README.md", "docs/container.md", "container/entrypoint.sh"):
        assert set(re.findall(r"-v (\S+):(?:/cache|\$HOME)", (ROOT / page).read_text(encoding="utf-8"))) == {name}
    assert f"source={name},target=/cache," in (ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8")


def test_the_cache_holds_all_that_is_written_outside_the_workspace() -> None:
    written = re.findall(r"\b(?:HOME|\w+_HOME|\w+_DIR)=(\S+)", DOCKERFILE)
    assert len(written) == 6
    assert all(Path(place).is_relative_to("/cache") for place in written)


def test_what_the_dev_container_names_is_there() -> None:
    folder = ROOT / ".devcontainer"
    config = json.loads((folder / "devcontainer.json").read_text(encoding="utf-8"))
    build = config["build"]
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / build["context"]).resolve() == ROOT
    assert f" AS {build['target']}\n" in DOCKERFILE
    assert f"useradd --uid 1000 --create-home {config['remoteUser']}" in DOCKERFILE
    assert f"WORKDIR {config['workspaceFolder']}\n" in DOCKERFILE
    mounted = [re.search(r"target=([^,]+)", mount) for mount in (config["workspaceMount"], *config["mounts"])]
    assert [found[1] for found in mounted if found] == ["/workspace", "/workspace/.venv", "/cache"]
    for folders in ("/workspace /cache", "/workspace/.venv"):
        assert f"chmod 1777 {folders}" in DOCKERFILE  # so that a volume there belongs to whoever comes
    make, target = config["postCreateCommand"].split()
    assert make == "make"
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert config["hostRequirements"] == {"gpu": "optional"}


def test_the_gpu_is_an_override() -> None:
    override = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]["pipeline"]
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["pipeline"]
