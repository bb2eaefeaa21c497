"""``--dry-run``: what a command would do and take, without doing it. Nothing is read but configurations and prompts."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dspo.batch import check_output, missing_batches, run_settings
from dspo.data.files import read_json
from dspo.data.prompts import Prompt
from dspo.errors import UserError
from dspo.estimate import (
    META,
    Base,
    load_base,
    parameter_bytes,
    parameter_count,
    sampling_peak,
    training_peak,
)
from dspo.params import BaseModelParams, Params, RewardParams, SamplerParams, World
from dspo.preference.dora import add_dora, tensor_shapes
from dspo.preference.pairs import held_out_prompts
from dspo.quick_train import resolved
from dspo.reward.checkpoint import CONFIG
from dspo.reward.model import build_model

ADAM = 2  # tensors of an adapter's size that the optimizer keeps
FLOAT32, FLOAT16 = 4, 2  # bytes
LATENT_CHANNELS = 4

Rows = Mapping[str, str]


def plan_training(params: Params, prompts_file: Path, reward_folder: Path, num_pairs: int, output: Path) -> str:
    """What `dspo train` would do. Raises :class:`UserError` for bad prompts, or a model that is not there."""
    prompts, world = resolved(params.active, prompts_file, num_pairs)
    base = load_base(world.base)
    adapter = add_dora(base.unet, world.train, seed=0)
    trained = sum(parameter.numel() for parameter in adapter.parameters.values())
    logging.disable(logging.WARNING)  # open_clip's, that no weights were loaded
    try:
        reward = parameter_bytes(build_model(reward_params(reward_folder), params.seed, META))
    finally:
        logging.disable(logging.NOTSET)

    pairs, held_out = pair_counts(prompts, world, params.seed)
    checked = min(world.train.validation_prompts, len(held_out_ids(prompts, world, params.seed)))
    candidates = len(prompts) * len(world.generate.samplers) * world.generate.candidates_per_sampler
    checks = (world.train.epochs + 1) * checked
    per_epoch = math.ceil(pairs / (world.train.batch_size * world.train.gradient_accumulation_steps))

    averages = 0 if world.train.ema_decay is None else 1
    copies = trained * FLOAT32 * (ADAM + averages + 2)  # the last checkpoint's and the best epoch's adapter
    # The base's size has the adapter in it by now. In a step all but the UNet waits in host memory.
    step = training_peak(adapter, base, world.train, world.base.resolution)
    generated, checking = (
        base.size + reward + sampling_peak(base, world.base.resolution, part.batch_size)
        for part in (world.generate, world.evaluate)
    )
    memory = {
        "candidates": generated - trained * FLOAT32,
        "a training step": parameter_bytes(base.unet) + copies + step,
        "a reward check": checking + copies,
    }
    image, latent = image_bytes(world.base), latent_bytes(world.base)
    disk = {
        "candidates": candidates * (image + latent),
        "pairs": 2 * (pairs + held_out) * (image + latent) + text_bytes(base, len(prompts) + 1),
        "training state": trained * FLOAT32 * (ADAM + averages + 2),
        "adapter": trained * FLOAT32,
    }
    places = {"prompts": str(prompts_file), "reward_model": str(reward_folder), "output": str(output)}
    settings = {"num_pairs": num_pairs, "world": params.world, "seed": params.seed}
    return told(
        {**places, **settings, **chosen(world, "base", "generate", "score", "train")},
        {
            "prompts": f"{len(prompts)}, {checked} of them held out for the reward check",
            "images": f"{candidates + checks + 2 * checked}: {candidates} candidates, {checks} in "
            f"{world.train.epochs + 1} reward checks, {2 * checked} before and after",
            "UNet passes": f"{passes(world, len(prompts), checks + 2 * checked)} to sample them",
            "pairs": f"at most {pairs} to train on and {held_out} held out",
            "steps": f"at most {per_epoch * world.train.epochs}: {world.train.epochs} epochs of {per_epoch}",
            "parameters": f"{trained:,} to train in {len(adapter.layers)} layers; "
            f"the UNet has {parameter_count(base.unet) - trained:,}",
            "memory": f"about {size(max(memory.values()))}, weights included: "
            + ", ".join(f"{phase} {size(value)}" for phase, value in memory.items()),
            "disk": f"at most {size(sum(disk.values()))}: "
            + ", ".join(f"{name} {size(value)}" for name, value in disk.items()),
        },
    )


def plan_generation(
    params: Params,
    base_params: BaseModelParams,
    adapter: Path,
    prompts: Sequence[Prompt],
    seeds: int,
    output: Path,
) -> str:
    """What `dspo batch-generate` would do, given what ``output`` already holds."""
    sampler, batch_size = params.active.evaluate.sampler, params.active.evaluate.batch_size
    check_output(output, run_settings(base_params, adapter, sampler, params.seed, batch_size))
    base = load_base(base_params)
    trained = sum(map(math.prod, tensor_shapes(adapter).values()))
    images = sum(len(batch) for batch in missing_batches(prompts, seeds, batch_size, output))
    total = len(prompts) * seeds
    peak = sampling_peak(base, base_params.resolution, min(batch_size, total))
    return told(
        {
            "world": params.world,
            "seed": params.seed,
            "base": base_params.model_dump(mode="json"),
            "evaluate": {"sampler": sampler.model_dump(mode="json"), "batch_size": batch_size},
        },
        {
            "prompts": str(len(prompts)),
            "images": f"{images}" + ("" if images == total else f"; {total - images} of {total} are there"),
            "UNet passes": f"{images * passes_of(sampler)} to sample them, {sampler.steps} steps each",
            "parameters": f"UNet {parameter_count(base.unet):,}, adapter {trained:,}",
            "memory": f"about {size(base.size + trained * FLOAT32 + peak)}: base model {size(base.size)}, adapter "
            f"{size(trained * FLOAT32)}, at the peak of a batch of {min(batch_size, total)} {size(peak)}",
            "disk": f"at most {size(images * image_bytes(base_params))}",
        },
    )


def reward_params(folder: Path) -> RewardParams:
    """Raises :class:`UserError` if the folder holds no reward model."""
    config = read_json(folder / CONFIG)
    try:
        return RewardParams.model_validate(config["params"])
    except (KeyError, TypeError, ValidationError):
        raise UserError(
            f"{folder / CONFIG}: not the config of a reward model; train it: `dvc repro train_reward`"
        ) from None


def pair_counts(prompts: Sequence[Prompt], world: World, seed: int) -> tuple[int, int]:
    """The most pairs to train on, and held out: fewer where candidates do not differ."""
    groups = Counter(tuple(getattr(sampler, key) for key in world.score.match) for sampler in world.generate.samplers)
    possible = sum(math.comb(n * world.generate.candidates_per_sampler, 2) for n in groups.values())
    per_prompt = min(world.score.max_pairs_per_prompt, possible)
    held_out = len(held_out_ids(prompts, world, seed))
    return (len(prompts) - held_out) * per_prompt, held_out * per_prompt


def held_out_ids(prompts: Sequence[Prompt], world: World, seed: int) -> set[str]:
    return held_out_prompts((prompt.id for prompt in prompts), world.score.validation_share, seed)


def passes(world: World, prompts: int, other_images: int) -> int:
    """UNet passes for the candidates, and for images by the evaluation's sampler; a guided pass counts twice."""
    each = prompts * world.generate.candidates_per_sampler
    return sum(each * passes_of(one) for one in world.generate.samplers) + other_images * passes_of(
        world.evaluate.sampler
    )


def passes_of(sampler: SamplerParams) -> int:
    return sampler.steps * (2 if sampler.guidance_scale > 1 else 1)


def image_bytes(base: BaseModelParams) -> int:
    """Uncompressed: no codec that loses nothing, or little, takes more."""
    return 3 * base.resolution**2


def latent_bytes(base: BaseModelParams) -> int:
    return LATENT_CHANNELS * (base.resolution // 8) ** 2 * FLOAT16


def text_bytes(base: Base, prompts: int) -> int:
    length, width, pooled = base.text_shape
    return int(prompts * (length * width + pooled) * base.unet.dtype.itemsize)


def size(count: float) -> str:
    """Bytes for people: three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def chosen(world: World, *sections: str) -> dict[str, Any]:
    return {name: getattr(world, name).model_dump(mode="json") for name in sections}


def told(configuration: Mapping[str, Any], rows: Rows) -> str:
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    return "\n".join([str(yaml.safe_dump(dict(configuration), sort_keys=False)), *lines, "", "Nothing was done."])
