"""The files of a base model: which of them are missing on this disk, and the command that gets them.

diffusers itself fetches from the hub while it loads, unless ``HF_HUB_OFFLINE=1``.
"""

from collections.abc import Sequence
from pathlib import Path

from dspo.data.hub import Missing, fetch, find, is_local
from dspo.params import BaseModelParams

# Where a single .safetensors file takes its configuration and tokenizers from: they are the same for every SDXL.
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"

VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
CONFIG_PATTERNS = ("*.json", "*.txt")
_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in _WEIGHTS),
    *(f"{tokenizer}/tokenizer_config.json" for tokenizer in ("tokenizer", "tokenizer_2")),
)


def missing(base: BaseModelParams) -> list[Missing]:
    """What is not there, one entry for each place that ``base`` names."""
    if base.model.endswith(".safetensors"):
        absent = _missing(SDXL, base.revision or SDXL_REVISION, _CONFIGS, CONFIG_PATTERNS)
        if not Path(base.model).is_file():
            absent.append(Missing(f"{base.model}: no such file", "correct base.model in params.yaml"))
    else:
        weights = [name for part, name in weight_files(base.variant).items() if base.vae is None or part != "vae"]
        absent = _missing(base.model, base.revision, [*_CONFIGS, *weights], patterns(base.variant))
        if absent and base.variant and not missing(base.model_copy(update={"variant": None})):
            absent = [Missing(absent[0].what, "set base.variant to null: its weights are there without a variant")]
    if base.vae is not None:
        absent += _missing(base.vae, base.vae_revision, VAE_FILES, VAE_FILES)
    return absent


def weight_files(variant: str | None) -> dict[str, str]:
    """part -> its weights in diffusers' layout."""
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    return {part: f"{part}/{name}{ending}" for part, name in _WEIGHTS.items()}


def patterns(variant: str | None) -> list[str]:
    """What to fetch of a whole model."""
    return [*CONFIG_PATTERNS, *weight_files(variant).values()]


def _missing(place: str, revision: str | None, files: Sequence[str], wanted: Sequence[str]) -> list[Missing]:
    absent = [file for file in files if not any(find(place, revision, one) for one in (file, _shards(file)))]
    if not absent:
        return []
    which = f"all of {len(files)} files" if len(absent) == len(files) else ", ".join(absent)
    if revision is None or is_local(place, revision):
        return [Missing(f"{place}: missing: {which}", mend_local(place))]
    return [Missing(f"{place}: missing in the hub's cache at {revision[:8]}: {which}", fetch(place, revision, wanted))]


def mend_local(place: str) -> str:
    """What brings a local model back: Git has those of the repository."""
    if Path(place).parts[:1] == ("models",):
        return f"git checkout -- {place}"
    return "copy the whole model there, in diffusers' layout, or name another one"


def _shards(file: str) -> str:
    """The list of a weight file's parts, which stands in for it where it was saved in several."""
    name, dot, variant = file.removesuffix(".safetensors").partition(".")
    return f"{name}.safetensors.index{dot}{variant}.json" if file.endswith(".safetensors") else file
