"""Many images from a tuned model: one per prompt and seed, resumable."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dspo.data.codecs import encoder
from dspo.data.files import read_json, whole_file, write_bytes, write_json
from dspo.data.prompts import Prompt
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.environment import device
from dspo.errors import UserError
from dspo.params import BaseModelParams, SamplerParams
from dspo.preference.dora import load_adapter
from dspo.progress import progress

RUN = "run.json"
MANIFEST = "manifest.jsonl"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Encoded = tuple[SampleRequest, "Future[bytes]"]


def generate(
    base: BaseModelParams,
    adapter: Path,
    prompts: Sequence[Prompt],
    seeds_per_prompt: int,
    sampler: SamplerParams,
    seed: int,
    batch_size: int,
    output: Path,
) -> None:
    """Write ``output/images/<prompt id>-<seed>.png`` for every prompt and seed 0 … ``seeds_per_prompt`` - 1.

    Run again after an interruption, it makes the missing images only, in the same batches as before, so that their
    bytes are the same. ``output/manifest.jsonl`` says which prompt, seed and settings belong to which file, and stands
    there when all images do. Raises :class:`UserError` if ``output`` holds images of another adapter or other
    settings, or if the adapter is damaged or of another base.
    """
    settings = run_settings(base, adapter, sampler, seed, batch_size)
    check_output(output, settings)
    write_json(settings, output / RUN)
    missing = missing_batches(prompts, seeds_per_prompt, batch_size, output)
    if missing:
        pipe = load_pipeline(base, device())
        pipe.unet = load_adapter(pipe.unet, adapter)
        samples = sample(pipe, list(chain(*missing)), sampler, base.resolution, seed, batch_size)
        with encoder("png", base.resolution) as images:
            waiting: list[Encoded] = []
            for batch in progress(missing, len(missing), f"batches of {batch_size}"):
                encoded = [(one.request, images.submit(one.image)) for one in islice(samples, len(batch))]
                _write(waiting, output)  # encoded while this batch was sampled
                waiting = encoded
            _write(waiting, output)
    rows = [_manifest_row(one, sampler, base.resolution) for one in _requests(prompts, seeds_per_prompt)]
    with whole_file(output / MANIFEST) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def missing_batches(
    prompts: Sequence[Prompt], seeds_per_prompt: int, batch_size: int, output: Path
) -> list[list[SampleRequest]]:
    """The batches of which ``output`` lacks an image."""
    requests = _requests(prompts, seeds_per_prompt)
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    return [batch for batch in batches if not all((output / _name(request)).exists() for request in batch)]


def _write(images: Sequence[Encoded], output: Path) -> None:
    for request, content in images:
        write_bytes(content.result(), output / _name(request))


def _requests(prompts: Sequence[Prompt], seeds_per_prompt: int) -> list[SampleRequest]:
    return [SampleRequest(prompt, index, index) for prompt in prompts for index in range(seeds_per_prompt)]


def adapter_folder(model: Path) -> Path:
    """The folder that holds the adapter: ``model`` itself, or ``model/dora_weights`` as `dspo train` writes it.

    Raises :class:`UserError` if neither does.
    """
    for folder in (model, model / "dora_weights"):
        if all((folder / name).is_file() for name in ADAPTER_FILES):
            return folder
    raise UserError(
        f"{model}: no adapter here; expected {' and '.join(ADAPTER_FILES)}. "
        "Give the --output folder of `dspo train`, or models/adapter, which `make repro` makes."
    )


def run_settings(
    base: BaseModelParams, adapter: Path, sampler: SamplerParams, seed: int, batch_size: int
) -> dict[str, Any]:
    """Everything that decides the images, as JSON values."""
    return {
        "adapter": _hash(adapter),
        "base": base.model_dump(),
        "sampler": sampler.model_dump(),
        "seed": seed,
        "batch_size": batch_size,
    }


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """Raise :class:`UserError` if ``output`` holds images of another run."""
    path = output / RUN
    if not path.exists() or not any(output.glob("images/*")):
        return
    different = [name for name, value in settings.items() if read_json(path).get(name) != value]
    if different:
        what = ", ".join(different)
        raise UserError(f"{output}: holds images made with another {what}. Give another --output.")


def _hash(adapter: Path) -> str:
    return hashlib.sha256(b"".join((adapter / name).read_bytes() for name in ADAPTER_FILES)).hexdigest()


def _name(request: SampleRequest) -> str:
    """From the prompt's hash: the text itself never becomes a file name."""
    return f"images/{request.prompt.id}-{request.sample_index:04d}.png"


def _manifest_row(request: SampleRequest, sampler: SamplerParams, resolution: int) -> dict[str, Any]:
    size = {"width": resolution, "height": resolution}
    prompt = {"prompt": request.prompt.text, "prompt_id": request.prompt.id, "seed": request.sample_index}
    return {"file_name": _name(request)} | prompt | sampler.model_dump() | size
