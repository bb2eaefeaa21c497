"""What one run of the pipeline was, read from the files that it left: dvc.lock and the outputs that it names.

The record goes to a folder as ``record.json`` beside copies of the small files and of the adapter, so that it outlives
the files it was read from.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from dvc.api import DVCFileSystem

from dspo.data.files import read_json, write_json
from dspo.errors import UserError

LOCK = "dvc.lock"
TRAIN, EVALUATE, LAST = "train", "evaluate", "report"  # stages
DATASETS = "data/"  # dependencies below it are datasets; others are code, models and settings
INTERVAL = "ci95"  # [low, high]
SHOWN = {".json", ".csv", ".png", ".html", ".jsonl"}  # files that people look at; images and weights stay with DVC
STEP_COLUMNS = ("step", "epoch")
EXPERIMENT_NAME = "dvc.exp_name"  # tag of a run that `dvc exp run` made
BASE = ("model", "revision", "variant", "vae", "vae_revision", "dtype")  # parameters that decide what is loaded

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class StageRecord:
    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    series: dict[str, Series]  # [(step, value)] of each curve
    tags: dict[str, str]  # hashes of dependencies and outputs
    datasets: list["Dataset"] = field(default_factory=list)  # that the stage read


@dataclass(frozen=True)
class Dataset:
    path: str
    md5: str  # DVC's; of a folder it ends in .dir
    size: int  # bytes
    files: int


class Sampler(NamedTuple):
    """How the judged images were made."""

    resolution: int
    scheduler: str
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class RunRecord:
    """``content`` is equal for runs with equal parameters and equal outputs, whenever and wherever they ran.

    ``key`` tells experiments with equal content apart; of the workspace's run it is the content.
    """

    key: str
    content: str
    world: str
    base_model: str
    base_revision: str | None
    adapter_md5: str
    tags: dict[str, str]
    stages: list[StageRecord] = field(default_factory=list)

    @property
    def training(self) -> dict[str, str]:
        """Parameters of the stage train."""
        return next(stage.params for stage in self.stages if stage.name == TRAIN)

    @property
    def sampler(self) -> Sampler:
        of = {name: self.training[f"evaluate.sampler.{name}"] for name in ("scheduler", "steps", "guidance_scale")}
        size = int(self.training["base.resolution"])
        return Sampler(size, of["scheduler"], int(of["steps"]), float(of["guidance_scale"]))

    @property
    def base(self) -> dict[str, str | None]:
        """The base model's parameters; what is null is not among a stage's."""
        return {name: self.training.get(f"base.{name}") for name in BASE}

    @property
    def base_md5(self) -> str | None:
        """Of a base model that is a folder of the repository."""
        train = next(stage for stage in self.stages if stage.name == TRAIN)
        return train.tags.get(f"dvc.dep.{self.base_model}")

    @property
    def datasets(self) -> list[tuple[Dataset, str]]:
        """Every dataset of the run, with the names of the stages that read it."""
        readers: dict[Dataset, list[str]] = {}
        for stage in self.stages:
            for dataset in stage.datasets:
                readers.setdefault(dataset, []).append(stage.name)
        return [(dataset, ", ".join(names)) for dataset, names in readers.items()]

    def metrics(self, stage: str) -> dict[str, float]:
        return next((found.metrics for found in self.stages if found.name == stage), {})

    def write(self, folder: Path) -> None:
        write_json(asdict(self), folder / "record.json")

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        raw = read_json(folder / "record.json")
        stages = [
            StageRecord(**stage | {"datasets": [Dataset(**dataset) for dataset in stage["datasets"]]})
            for stage in raw["stages"]
        ]
        return cls(**raw | {"stages": stages})


def read_lock(text: bytes) -> dict[str, Any] | None:
    """The stages of a dvc.lock; None unless it is that of one whole run.

    It is not if the last stage is missing, or if a stage ran on another output than the one that stands there now.
    """
    stages = (yaml.safe_load(text) or {}).get("stages", {})
    if not {TRAIN, LAST} <= stages.keys():
        return None
    outs = _outs(stages)
    deps = [dep for stage in stages.values() for dep in stage.get("deps", [])]
    return stages if all(outs.get(dep["path"], dep["md5"]) == dep["md5"] for dep in deps) else None


def adapter_here(root: Path, world: str) -> str | None:
    """md5 of the adapter of the repository's last run; None outside of one that was run.

    Raises :class:`UserError` if that run is not whole, or was of another world.
    """
    lock = root / LOCK
    if not lock.is_file():
        return None
    stages = read_lock(lock.read_bytes())
    if stages is None:
        raise UserError(f"{lock}: not of one whole run. Run `dvc repro`, then `dspo sync`; or give a version.")
    ran = _params(stages[TRAIN])["world"]
    if ran != world:
        raise UserError(f"{lock}: the last run here was of world {ran}, params.yaml has {world}. Give a version.")
    artifacts = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["artifacts"]
    return _outs(stages)[artifacts["adapter"]["path"]]


def run_key(stages: Mapping[str, Any]) -> str:
    """The hash of all stages' parameters and outputs."""
    return _hash({name: [stage.get("params"), _outs({name: stage})] for name, stage in stages.items()})


def experiment_key(content: str, name: str, baseline: str) -> str:
    """Two experiments are two runs, even if they came to the same outputs."""
    return _hash([content, name, baseline])


def collect(
    files: DVCFileSystem, stages: Mapping[str, Any], key: str, tags: Mapping[str, str], folder: Path
) -> RunRecord:
    """Write the record of the run that ``files``, one revision of the repository, holds to ``folder``.

    ``stages``: of its dvc.lock. Raises FileNotFoundError if an output is neither in the workspace nor in DVC's cache.
    """
    # Paths of `files` begin with a slash: DVC takes others from the current folder, wherever that is.
    params = {name: _params(stage) for name, stage in stages.items()}
    train = params[TRAIN]
    adapter = yaml.safe_load(files.read_bytes("/dvc.yaml"))["artifacts"]["adapter"]["path"]
    _copy(files, adapter, folder / "adapter", lambda path: True)
    record = RunRecord(
        key=key,
        content=run_key(stages),
        world=train["world"],
        base_model=train["base.model"],
        base_revision=train.get("base.revision"),
        adapter_md5=_outs(stages)[adapter],
        tags={**tags, "dvc.lock_md5": _md5(files, LOCK), "dvc.params_md5": _md5(files, "params.yaml")},
        stages=[
            _stage(files, name, params[name], stage, folder / "artifacts" / name) for name, stage in stages.items()
        ],
    )
    record.write(folder)  # last: a folder with a record is whole
    return record


def _hash(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _outs(stages: Mapping[str, Any]) -> dict[str, str]:
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def _md5(files: DVCFileSystem, path: str) -> str:
    return hashlib.md5(files.read_bytes(f"/{path}"), usedforsecurity=False).hexdigest()


def _stage(files: DVCFileSystem, name: str, params: dict[str, str], lock: Any, folder: Path) -> StageRecord:
    for out in lock.get("outs", []):
        _copy(files, out["path"], folder, lambda path: path.suffix in SHOWN)
    shown = sorted(path for path in folder.rglob("*") if path.is_file())
    metrics: dict[str, float] = {}
    series: dict[str, Series] = {}
    for path in shown:
        if path.suffix == ".json" and "config" not in path.name:
            metrics |= {f"{path.stem}.{key}": value for key, value in numbers(read_json(path))}
        elif path.suffix == ".csv":
            series |= {f"{path.stem}.{key}": values for key, values in curves(path).items()}
    hashes = {
        f"dvc.{kind}.{entry['path']}": entry["md5"]
        for kind in ("dep", "out")
        for entry in lock.get(f"{kind}s", [])
        if "md5" in entry
    }
    datasets = [
        Dataset(dep["path"], dep["md5"], dep["size"], dep.get("nfiles", 1))
        for dep in lock.get("deps", [])
        if dep["path"].startswith(DATASETS)
    ]
    return StageRecord(name, params, metrics, series, hashes, datasets)


def _copy(files: DVCFileSystem, out: str, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    """Copy the wanted files of an output, a file or a folder, to ``folder``."""
    for name in files.find(f"/{out}"):
        path = PurePosixPath(name.lstrip("/"))
        if wanted(path):
            inside = path.relative_to(out)
            target = folder / (inside if inside.name else path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))


def _params(lock: Any) -> dict[str, str]:
    """``params:`` of a stage in dvc.lock as flat text; keys without ``worlds.<world>.``."""
    flat: dict[str, str] = {}
    for values in lock.get("params", {}).values():
        flat |= {re.sub(r"^worlds\.[^.]+\.", "", key): value for key, value in _flat_text(values)}
    return flat


def _flat_text(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat_text(inner, f"{prefix}.{key}" if prefix else key)
    elif value is not None:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def numbers(value: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    """All numbers in nested JSON objects, with dotted keys; truth values are 1 and 0.

    An interval is its low and its high; other lists are left out.
    """
    if prefix.endswith(f".{INTERVAL}") and isinstance(value, list) and len(value) == 2:
        value = {"low": value[0], "high": value[1]}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, bool | int | float) and math.isfinite(value):
        yield prefix, float(value)


def curves(path: Path) -> dict[str, Series]:
    """The numeric columns of a table over its step column; nothing if it has none, or several rows of one step."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    step = next((name for name in STEP_COLUMNS if rows and name in rows[0]), None)
    if step is None or len({row[step] for row in rows}) < len(rows):
        return {}
    found: dict[str, Series] = {}
    for row in rows:
        for name, text in row.items():
            value = _number(text)
            if name != step and value is not None:
                found.setdefault(name, []).append((int(float(row[step])), value))
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
