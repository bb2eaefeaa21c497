"""The comparisons, each a list of rows that were measured beside each other."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from bench.measure import Case, Row, matrix_product, measure
from bench.models import Size, build_scorer, train_params, with_shared_weights
from bench.steps import COMPILED_CASES, PROMPTS, SEED, Ours, PeftDora, Stock, our_dora, peft_lora, plain_lora
from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt
from dspo.diffusion.compiled import compile_blocks
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.params import SamplerParams, TrainParams

PAIRS_PER_STEP = 4

ADAPTERS: dict[str, tuple[Callable[..., Any], bool]] = {  # whether it runs as peft's users run it
    "lora": (plain_lora, False),
    "lora, peft": (peft_lora, True),
    "dora, peft": (PeftDora, True),
    "dora, ours": (our_dora, False),
}


def adapters(pipe: StableDiffusionXLPipeline, size: Size, rounds: int) -> Iterator[Row]:
    """LoRA, peft's DoRA and ours in the same step; the matrix rate beside them.

    Four pairs a step without checkpointing, for the time; one pair with it, for the memory.
    """
    device = pipe.device
    for micro_batch, pairs, checkpointing in ((size.adapter_micro_batch, PAIRS_PER_STEP, False), (1, 1, True)):
        params = settings(size, micro_batch, pairs, checkpointing)
        cases = [matrix_product(size.matrix_side, size.dtype, device)]
        for name, (put, as_peft) in ADAPTERS.items():
            ours = Ours(pipe, params, size.resolution, put, as_peft)
            labels = {"group": "adapter", "variant": name, **described(params, size.resolution)}
            cases.append(Case(labels, ours.step, ours.tensors))
        yield from measure(cases, rounds, device)


def recipes(pipe: StableDiffusionXLPipeline, size: Size, rounds: int) -> Iterator[Row]:
    """Whole steps of the stock recipe and of ours, at the same settings."""
    for micro_batch, checkpointing in size.recipe_settings:
        params = settings(size, micro_batch, PAIRS_PER_STEP, checkpointing)
        one_sided = params.model_copy(update={"loss": "dspo"})
        steps: dict[str, Ours | Stock] = {
            "stock, disable_adapter": Stock(pipe, params, size.resolution, second_unet=False),
            "stock, second UNet": Stock(pipe, params, size.resolution, second_unet=True),
            "ours": Ours(pipe, params, size.resolution, our_dora),
            "ours, loss dspo": Ours(pipe, one_sided, size.resolution, our_dora),
        }
        labels = {"group": "recipe", **described(params, size.resolution)}
        cases = [Case(labels | {"variant": name}, step.step, step.tensors) for name, step in steps.items()]
        yield from measure(cases, rounds, pipe.device)


def growth(pipe: StableDiffusionXLPipeline, size: Size, rounds: int) -> Iterator[Row]:
    """Our step over pairs in a batch, rank and resolution, one of them at a time, with checkpointing.

    These are no ratios of a few percent, so half the rounds do.
    """
    rounds = (rounds + 1) // 2

    def case(batch: int, rank: int, resolution: int, over: str) -> Case:
        params = settings(size, batch, batch, checkpointing=True)
        ours = Ours(pipe, params.model_copy(update={"rank": rank, "alpha": rank}), resolution, our_dora)
        return Case({"group": over, "variant": "ours", **described(ours.params, resolution)}, ours.step, ours.tensors)

    yield from measure([case(n, size.rank, size.resolution, "batch") for n in size.batches], rounds, pipe.device)
    yield from measure([case(1, rank, size.resolution, "rank") for rank in size.ranks], rounds, pipe.device)
    yield from measure([case(1, size.rank, px, "resolution") for px in size.resolutions], rounds, pipe.device)


def images(pipe: StableDiffusionXLPipeline, size: Size, rounds: int) -> Iterator[Row]:
    """Sampling as ``generate_pairs`` does and by the pipeline called prompt by prompt; scoring by the reward model."""
    device = pipe.device
    sampler = SamplerParams(scheduler="euler", steps=size.sampler_steps, guidance_scale=5.0)
    prompts = [Prompt(prompt_id(text), text) for text in PROMPTS[: size.images]]
    requests = [SampleRequest(prompt, 0, 0) for prompt in prompts]

    def one_by_one() -> None:
        for prompt in prompts:
            generator = torch.Generator().manual_seed(SEED)
            pipe(
                prompt.text,
                height=size.resolution,
                width=size.resolution,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                generator=generator,
            )

    unet = with_shared_weights(pipe.unet)
    ours = StableDiffusionXLPipeline(**pipe.components | {"unet": unet}, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        compile_blocks(unet, COMPILED_CASES)

    def together() -> list[Any]:
        return list(sample(ours, requests, sampler, size.resolution, SEED, size.images))

    scorer = build_scorer(size, device)
    made = [one.image for one in together()]
    captions = [prompt.text for prompt in prompts]
    labels = {"group": "images", "images": size.images, "resolution": size.resolution}

    def weights() -> Iterator[torch.Tensor]:
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            yield from part.parameters()

    cases = [
        Case(labels | {"variant": name, "steps": sampler.steps}, run, weights)
        for name, run in (("pipeline, one by one", one_by_one), ("ours, together", together))
    ]
    cases.append(
        Case(
            labels | {"variant": "scoring"},
            lambda: scorer.score(made, captions, len(made)),
            lambda: scorer.model.parameters(),
        )
    )
    yield from measure(cases, rounds, device)


def settings(size: Size, micro_batch: int, pairs: int, checkpointing: bool) -> TrainParams:
    return train_params(size).model_copy(
        update={
            "batch_size": micro_batch,
            "gradient_accumulation_steps": pairs // micro_batch,
            "gradient_checkpointing": checkpointing,
        }
    )


def described(params: TrainParams, resolution: int) -> Row:
    return {
        "pairs": params.batch_size * params.gradient_accumulation_steps,
        "micro_batch": params.batch_size,
        "checkpointing": params.gradient_checkpointing,
        "rank": params.rank,
        "resolution": resolution,
    }
