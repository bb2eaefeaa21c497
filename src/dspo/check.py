"""The setup check: what is there, what is missing, and the command that mends it."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open

from dspo.data.files import read_json
from dspo.data.hub import Missing
from dspo.data.prompts import read_prompts
from dspo.diffusion import files
from dspo.diffusion.compiled import GET_COMPILER, lacks_compiler
from dspo.environment import device
from dspo.errors import UserError
from dspo.evaluation.foreign import places
from dspo.params import BaseModelParams, ForeignJudgeParams, Params, RewardParams, load_params
from dspo.reward import backbone

GPU_GIB = 15.0  # sampling at 1024 px with the reward model on the GPU; a training step takes half of it
HUB_GIB = 8.0  # SDXL in half precision with its other VAE


@dataclass(frozen=True)
class Check:
    """One line of the setup check; ``remedy`` is set where something is missing."""

    name: str
    found: str
    remedy: str | None = None

    @property
    def ok(self) -> bool:
        return self.remedy is None


def check_setup(params_file: Path, prompts: Path, reward: Path) -> Iterator[Check]:
    """Yield the checks in the order in which one would mend them; a params file with mistakes ends the list."""
    yield _versions()
    if not params_file.exists():
        remedy = "run this at the root of a clone of the repository, or name the file: --params FILE"
        yield Check("parameters", f"{params_file}: no such file", remedy)
        return
    try:
        params = load_params(params_file)
    except UserError as error:
        yield Check("parameters", str(error), f"correct {params_file}; src/dspo/params.py has every key")
        return
    yield Check("parameters", f"{params_file}: world {params.world}")
    yield _prompts(prompts, params)
    yield _base_model(params.active.base)
    if params.active.reward.pretrained is not None:
        yield _reward_backbone(params.active.reward)
    trained = _reward_model(reward, params.active.reward)
    if not trained.ok:
        yield _ratings(params)
    yield trained
    if params.active.evaluate.foreign_judges:
        yield _judges(params.active.evaluate.foreign_judges)
    yield _device(params)
    yield _disk(params)


def _versions() -> Check:
    """Python and the packages that pyproject.toml pins, against what is installed."""
    wrong = []
    for line in requires("dspo") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            wrong.append(f"{wanted.name} {installed}, expected {wanted.specifier}")
    if wrong:
        return Check("versions", "; ".join(wrong), "make setup")
    names = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "dvc", "mlflow")
    return Check(
        "versions", ", ".join([f"python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in names)])
    )


def _prompts(path: Path, params: Params) -> Check:
    try:
        prompts = read_prompts(path, params.active.prompts.max_characters)
    except UserError as error:
        return Check(
            "prompts", str(error), f"write {path}: a CSV with the header prompt,weight and one prompt per line"
        )
    return Check("prompts", f"{path}: {len(prompts)} prompts")


def _base_model(base: BaseModelParams) -> Check:
    found = ", ".join(place for place in (base.model, base.vae) if place is not None)
    return _weights("base model", found, files.missing(base))


def _reward_backbone(reward: RewardParams) -> Check:
    return _weights("reward backbone", f"{reward.backbone}, {reward.pretrained}", backbone.missing(reward))


def _judges(judges: Sequence[ForeignJudgeParams]) -> Check:
    absent = [one for judge in judges for one in places.missing(judge)]
    return _weights("judges", ", ".join(judge.name for judge in judges), absent)


def _weights(name: str, found: str, absent: Sequence[Missing]) -> Check:
    if not absent:
        return Check(name, found)
    return Check(name, "; ".join(one.what for one in absent), "\n            ".join(one.remedy for one in absent))


def _ratings(params: Params) -> Check:
    """What the pipeline trains the reward model on."""
    path = _raw_ratings(params)
    if not path.exists():
        own = f"; the repository's own: git checkout -- {path}" if params.world == "shapes" else ""
        remedy = f"put ratings there, in a layout of docs/data.md{own}"
        return Check("ratings", f"{path}: no such file or folder", remedy)
    return Check("ratings", f"{path}, layout {params.active.ratings.layout}")


def _raw_ratings(params: Params) -> Path:
    return Path("data/raw") / f"{params.world}-rated.parquet"


def _reward_model(folder: Path, wanted: RewardParams) -> Check:
    remedy = f"dvc repro train_reward   or, where a remote holds it:   dvc pull {folder}"
    weights = folder / "model.safetensors"
    for path in (folder / "config.json", weights):
        if not path.is_file():
            return Check("reward model", f"{path}: no such file", remedy)
    try:
        config = read_json(folder / "config.json")
        with safe_open(weights, framework="pt"):
            size = weights.stat().st_size
    except UserError as error:
        return Check("reward model", str(error), remedy)
    except (SafetensorError, OSError) as error:
        return Check("reward model", f"{weights}: not a whole safetensors file ({error})", remedy)
    try:
        on, untrained = config["params"]["backbone"], ", ".join(config["untrained"])
    except (KeyError, TypeError) as error:
        return Check("reward model", f"{folder / 'config.json'}: not the config of a reward model ({error})", remedy)
    if on != wanted.backbone:
        return Check("reward model", f"{folder}: on {on}, where this world has {wanted.backbone}", remedy)
    return Check(
        "reward model", f"{folder}: {size / 2**20:.0f} MiB" + (f", untrained heads: {untrained}" if untrained else "")
    )


def _device(params: Params) -> Check:
    try:
        where = device()
    except UserError as error:
        return Check("device", str(error), "unset DSPO_DEVICE, or name a device that is here")
    needs_gpu = params.active.base.resolution >= 512
    if where.type != "cuda":
        found = f"{where.type}, {torch.get_num_threads()} threads"
        return Check("device", found, "run on a machine with a CUDA GPU, or set `world: shapes`" if needs_gpu else None)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(where))
    found = f"{torch.cuda.get_device_name(where)}, {free:.1f} of {total:.1f} GiB free"
    if lacking := lacks_compiler():  # costs speed alone
        found += f"; {lacking}, so that nothing is compiled: {GET_COMPILER}"
    short = needs_gpu and free < GPU_GIB
    return Check("device", found, f"end other work on the GPU: {GPU_GIB:.0f} GiB are needed" if short else None)


def _disk(params: Params) -> Check:
    """Room for candidates, pairs and evaluation images, uncompressed, for a base model still to be fetched, and for the
    ratings three times: as the pipeline's output, in DVC's cache, and in the scratch folder while they are learnt."""
    raw = _raw_ratings(params)
    ratings = 3 * sum(file.stat().st_size for file in (raw, *raw.rglob("*")) if file.is_file())
    world = params.active
    candidates = world.generate.num_prompts * len(world.generate.samplers) * world.generate.candidates_per_sampler
    images = 2 * candidates + 2 * world.evaluate.num_prompts * world.evaluate.seeds_per_prompt
    made = images * 3 * world.base.resolution**2
    needed = 1.0 + (ratings + made) / 2**30 + (HUB_GIB if files.missing(world.base) else 0.0)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    found = f"{free:.1f} GiB free, about {needed:.1f} GiB needed"
    return Check("disk", found, "free some space, or lower generate.num_prompts" if free < needed else None)
