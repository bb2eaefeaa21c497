"""The whole of preference training by one command, without DVC: candidates, pairs, training, before and after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionXLPipeline

from dspo.data.files import write_bytes, write_json
from dspo.data.images import Pixels, encode_png, read_table
from dspo.data.prompts import Prompt, read_prompts
from dspo.diffusion.base import load_pipeline, local_files
from dspo.diffusion.candidates import generate_candidates
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.environment import device
from dspo.errors import UserError
from dspo.params import Params, World
from dspo.preference.dataset import load_pairs
from dspo.preference.dora import Adapter, add_dora
from dspo.preference.schedule import NoiseSchedule
from dspo.preference.scoring import write_pairs
from dspo.preference.trainer import CHECKPOINT, train
from dspo.progress import progress
from dspo.reward.checkpoint import RewardScorer, load_reward
from dspo.stages.atomic import open_scratch
from dspo.stages.train import RewardCheck, metrics, write_logs

SIDE_BY_SIDE = 8  # prompts in the picture of base beside tuned


@dataclass(frozen=True)
class Change:
    """Mean overall reward of the same prompts and noise, before and after training."""

    reward_base: float
    reward_tuned: float
    images: int


def quick_train(params: Params, prompts_file: Path, reward: Path, num_pairs: int, output: Path) -> Change:
    """Train an adapter on at most ``num_pairs`` pairs of images of the user's prompts.

    A share of the prompts, ``score.validation_share``, is held out: their images choose the best epoch. Leaves in
    ``output``, all at once: ``dora_weights/``, ``training_state.pt``, ``preference_pairs/`` and ``logs/`` with
    ``log.csv``, ``epochs.csv``, ``metrics.json``, ``before_after.json`` and ``base_and_tuned.png``. The same command
    again, after an interruption, goes on where it stopped. Raises :class:`UserError` for bad input.
    """
    prompts, world = resolved(params.active, prompts_file, num_pairs)
    settings = {"seed": params.seed, "prompts": len(prompts), "world": world.model_dump(mode="json")}
    scratch = open_scratch("quick_train", settings, [prompts_file, reward, *local_files(world.base)])
    work = scratch.path

    scorer = load_reward(reward, device())
    generate_candidates(prompts, world.base, world.generate, params.seed, device(), work / "candidates")
    if not (work / "pairs" / "summary.json").exists():  # the last file that write_pairs leaves
        write_pairs(work / "candidates", scorer, world.base, world.score, params.seed, device(), work / "pairs")

    pairs, held_out = load_pairs(work / "pairs")
    ids = set(read_table(work / "pairs" / "validation.parquet", ["prompt_id"])["prompt_id"].to_pylist())
    validation = [p for p in prompts if p.id in ids][: world.train.validation_prompts]
    pipe = load_pipeline(world.base, device())
    adapter = add_dora(pipe.unet, world.train, params.seed)
    schedule = NoiseSchedule.of(pipe.scheduler, device())
    changed = params.model_copy(update={"worlds": {params.world: world}})
    check = RewardCheck(pipe, scorer, validation, changed)
    trained = train(adapter, schedule, pairs, held_out, world.train, params.seed, work, check)

    logs = work / "logs"
    adapter.save(work / "adapter", world.base.model)
    write_logs(trained, logs)
    write_json(metrics(trained, len(pairs), len(held_out)), logs / "metrics.json")
    with check.on_device():
        change = before_and_after(pipe, adapter, scorer, validation, world, params.seed, logs)
    scratch.publish(
        {
            "adapter": output / "dora_weights",
            CHECKPOINT: output / "training_state.pt",
            "pairs": output / "preference_pairs",
            "logs": output / "logs",
        }
    )
    return change


def resolved(world: World, prompts_file: Path, num_pairs: int) -> tuple[list[Prompt], World]:
    """The prompts that ``num_pairs`` pairs are made of, and the world with what they need.

    Raises :class:`UserError` for a bad prompt list, or one prompt alone.
    """
    prompts = [p for p in read_prompts(prompts_file, world.prompts.max_characters) if p.weight]
    if len(prompts) < 2:
        raise UserError(
            f"{prompts_file}: at least 2 prompts with a weight above 0 are needed: one is held out to choose the best "
            "epoch by."
        )
    enough = max(2, num_pairs // world.score.max_pairs_per_prompt)
    prompts = sorted(prompts, key=lambda p: p.id)[:enough]
    return prompts, with_pairs_per_prompt(world, num_pairs // len(prompts))


def with_pairs_per_prompt(world: World, pairs: int) -> World:
    """The world with this many pairs per prompt at most, and enough candidates of equal sampler settings for them.

    Whatever their gap: a few prompts have few candidates, and a margin could leave none to train on or to hold out.
    """
    candidates = world.generate.candidates_per_sampler
    while len(world.generate.samplers) * math.comb(candidates, 2) < pairs:
        candidates += 1
    return world.model_copy(
        update={
            "generate": world.generate.model_copy(update={"candidates_per_sampler": candidates}),
            "score": world.score.model_copy(update={"max_pairs_per_prompt": pairs, "margin": 0.0}),
        }
    )


def before_and_after(
    pipe: StableDiffusionXLPipeline,
    adapter: Adapter,
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    world: World,
    seed: int,
    folder: Path,
) -> Change:
    """Images of base and tuned from the same noise: their rewards, and the first few side by side as a picture.

    From other noise than the reward checks': the best epoch was chosen by its images from theirs.
    """
    requests = [SampleRequest(prompt, sample_index=0, noise_index=1) for prompt in prompts]

    def images(name: str) -> list[Pixels]:
        settings = (world.evaluate.sampler, world.base.resolution, seed, world.evaluate.batch_size)
        return [one.image for one in progress(sample(pipe, requests, *settings), len(requests), f"images of {name}")]

    tuned = images("tuned")
    with adapter.disabled():
        base = images("base")

    overall = scorer.heads.index("overall")
    captions = [prompt.text for prompt in prompts]
    rewards = [scorer.score(made, captions, world.evaluate.batch_size)[:, overall] for made in (base, tuned)]
    change = Change(float(rewards[0].mean()), float(rewards[1].mean()), len(prompts))
    rows = [
        {"prompt": prompt.text, "reward_base": float(before), "reward_tuned": float(after)}
        for prompt, before, after in zip(prompts, *rewards, strict=True)
    ]
    means = {"reward_base": change.reward_base, "reward_tuned": change.reward_tuned}
    write_json(means | {"prompts": rows}, folder / "before_after.json")
    write_bytes(encode_png(side_by_side(base[:SIDE_BY_SIDE], tuned[:SIDE_BY_SIDE])), folder / "base_and_tuned.png")
    return change


def side_by_side(base: Sequence[Pixels], tuned: Sequence[Pixels]) -> Pixels:
    """One row per prompt, base on the left and tuned on the right."""
    return np.concatenate([np.concatenate(row, axis=1) for row in zip(base, tuned, strict=True)])
