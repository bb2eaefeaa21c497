"""dvc.yaml says what every stage reads: its code, its parameters, its packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from dspo.params import World, load_params

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS = load_params(ROOT / "params.yaml")
WHOLE = "worlds.${world}"
GIT_KEEPS = {"report"}  # outputs that DVC does not cache


def source(stage: str) -> str:
    module = re.search(r"-m dspo\.stages\.(\w+)", STAGES[stage]["cmd"])
    assert module
    return (ROOT / "src/dspo/stages" / f"{module[1]}.py").read_text(encoding="utf-8")


def outs(stage: str) -> dict[str, dict[str, bool]]:
    """Output paths with their options."""
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    return {path: options for e in entries for path, options in (e.items() if isinstance(e, dict) else [(e, {})])}


def parameters_read(code: str) -> set[str]:
    """The parameters that a stage's file names: the whole world, sections, or single keys where it takes no more."""
    found = set()
    for chain in re.findall(r"\b(?:active|world)\.([\w.]+)", code):
        model: type[BaseModel] | None = World
        parts = []
        for part in chain.split("."):
            if model is None or part not in model.model_fields:
                break
            parts.append(part)
            kind = model.model_fields[part].annotation
            model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        found.add(".".join([WHOLE, *parts]))
    return {path for path in found if not any(path.startswith(f"{other}.") for other in found)}


def test_code_dependencies_are_the_import_closure() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "dvc.yaml", *ROOT.glob("pipelines/*/dvc.yaml"))]
    command = [sys.executable, "tools/stage_deps.py", "--check", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_code_dependency_is_found(tmp_path: Path) -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(text.replace("      - src/dspo/data/splits.py\n", "", 1))
    command = [sys.executable, "tools/stage_deps.py", "--check", str(tmp_path / "dvc.yaml")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("stage", STAGES)
def test_declared_parameters_are_those_that_the_stage_reads(stage: str) -> None:
    code = source(stage)
    read = parameters_read(code) | {"world"}
    if "params.seed" in code:
        read.add("seed")
    assert sorted(STAGES[stage]["params"]) == sorted(read)


@pytest.mark.parametrize("stage", STAGES)
def test_the_locked_packages_are_a_dependency(stage: str) -> None:
    assert "requirements.runtime.lock" in STAGES[stage]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_of_the_command_is_declared(stage: str) -> None:
    declared = {*STAGES[stage]["deps"], *outs(stage), "params.yaml"}
    for path in re.findall(r"--[\w-]+ (\S+)", STAGES[stage]["cmd"]):
        assert any(path == d or path.startswith(f"{d}/") or d.startswith(f"{path}/") for d in declared), path


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_cached_and_ignored_by_git_or_neither(stage: str) -> None:
    for path, options in outs(stage).items():
        ignored = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode == 0
        assert ignored == (stage not in GIT_KEEPS)
        assert options.get("cache", True) == (stage not in GIT_KEEPS)


def test_the_models_of_shapes_are_dependencies_of_the_stages_that_load_them() -> None:
    world = PARAMS.worlds["shapes"]
    clip = world.reward.backbone.removeprefix("local-dir:")
    assert {name for name, stage in STAGES.items() if world.base.model in stage["deps"]} == {
        name
        for name in STAGES
        if "base" in {path.removeprefix(f"{WHOLE}.").partition(".")[0] for path in parameters_read(source(name))}
    }
    assert clip in STAGES["train_reward"]["deps"]
    assert "models/shapes-judge" in STAGES["evaluate"]["deps"]


def test_a_run_begins_with_the_check_of_the_weights() -> None:
    made = tuple(f"{path}/" for stage in STAGES for path in outs(stage))
    first = {name for name in STAGES if not any(f"{path}/".startswith(made) for path in STAGES[name]["deps"])}
    checked = {name for name in STAGES if STAGES[name]["cmd"].startswith("PYTHONPATH=src python -m dspo.weights ")}
    assert checked == first == {"prepare_prompts", "prepare_ratings"}


def test_one_module_reads_the_environment() -> None:
    readers = [
        path.relative_to(ROOT / "src/dspo").as_posix()
        for path in (ROOT / "src/dspo").rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)\b|\bgetenv\(", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["environment.py"]


def test_cheap_modules_do_not_import_torch() -> None:
    code = "import sys, dspo.cli, dspo.stages.prepare_prompts, dspo.shapes.grammar; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
