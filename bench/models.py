"""SDXL's pipeline and the reward model in memory, with random weights, at three sizes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from tools.random_sdxl import CLIP_NAME, builders, clip_tokenizer, draw_weights, scheduler
from torch import nn

from dspo.diffusion.base import LARGE
from dspo.params import RewardParams, TrainParams, load_params
from dspo.reward.backbone import Backbone
from dspo.reward.checkpoint import RewardScorer
from dspo.reward.model import RewardModel, build_model

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Size:
    """What is measured at a size; the first entry of each list is the smallest."""

    name: str
    dtype: torch.dtype  # of the frozen weights
    resolutions: tuple[int, ...]  # pixels; the last one is the size's own
    batches: tuple[int, ...]  # pairs of a micro-batch, in the table
    ranks: tuple[int, ...]  # in the table
    rank: int  # elsewhere
    adapter_micro_batch: int  # pairs of a micro-batch where adapters are compared without checkpointing
    recipe_settings: tuple[tuple[int, bool], ...]  # pairs of a micro-batch, gradient checkpointing
    matrix_side: int  # of the product that gives the matrix rate
    images: int  # of a round of sampling and of scoring
    sampler_steps: int

    @property
    def resolution(self) -> int:
        return self.resolutions[-1]


SIZES = {
    size.name: size
    for size in (
        Size(
            name="full",
            dtype=torch.bfloat16,
            resolutions=(512, 768, 1024),
            batches=(1, 2, 4, 8, 16),
            ranks=(4, 8, 16, 32, 64, 128),
            rank=32,
            adapter_micro_batch=4,
            recipe_settings=((1, False), (1, True), (4, True)),
            matrix_side=8192,
            images=8,
            sampler_steps=10,
        ),
        Size(
            name="small",
            dtype=torch.float32,
            resolutions=(96, 128, 160),
            batches=(1, 2, 4, 8, 16),
            ranks=(4, 8, 16, 32, 64, 128),
            rank=8,
            adapter_micro_batch=4,
            recipe_settings=((4, False),),
            matrix_side=1024,
            images=4,
            sampler_steps=4,
        ),
        Size(
            name="tiny",
            dtype=torch.float32,
            resolutions=(32, 64),
            batches=(1, 2),
            ranks=(2, 4),
            rank=2,
            adapter_micro_batch=4,
            recipe_settings=((4, False), (2, True)),
            matrix_side=128,
            images=2,
            sampler_steps=2,
        ),
    )
}


def train_params(size: Size) -> TrainParams:
    """The world ``sdxl``'s, with the loss that needs winner and loser with gradient, and the reference."""
    params = load_params(ROOT / "params.yaml").worlds["sdxl"].train
    return params.model_copy(update={"loss": "dspo_two_sided", "rank": size.rank, "alpha": size.rank})


def build_pipeline(size: Size, device: torch.device) -> StableDiffusionXLPipeline:
    """Frozen, in evaluation mode, on the device, as ``load_pipeline`` leaves it."""

    def build(builder: Callable[[], nn.Module]) -> nn.Module:
        with device:
            model = builder()
        return draw_weights(nn.Module.to(model, size.dtype)).requires_grad_(False)

    parts = {name: build(builder) for name, builder in builders(size.name).items()}
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=clip_tokenizer("<|endoftext|>"),
        tokenizer_2=clip_tokenizer("!"),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if size.resolution >= LARGE:
        pipe.vae.enable_slicing()
    return pipe


def build_scorer(size: Size, device: torch.device) -> RewardScorer:
    """The world ``sdxl``'s reward model on a random ViT-L-14-336; at the other sizes that of ``shapes``, untrained."""
    worlds = load_params(ROOT / "params.yaml").worlds
    params = worlds["sdxl" if size.name == "full" else "shapes"].reward
    if size.name != "full":
        local = params.model_copy(update={"backbone": f"local-dir:{ROOT / 'models' / 'shapes-clip'}"})
        model = build_model(local, seed=0, device=device)
    else:
        model = _random_reward_model(params, device)
    model.requires_grad_(False)
    return RewardScorer(model, params, temperatures={"overall": 1.0}, untrained=[])


def _random_reward_model(params: RewardParams, device: torch.device) -> RewardModel:
    clip = open_clip.create_model(CLIP_NAME, load_weights=False, device=device)
    tokenizer = open_clip.get_tokenizer(CLIP_NAME)
    backbone = Backbone(clip, tokenizer, params.unlocked_image_blocks, params.unlocked_text_blocks)
    if params.dtype == "bfloat16":
        backbone.multiply_tokens_at_once()
    return RewardModel(backbone, params).to(device).eval()


def with_shared_weights(unet: UNet2DConditionModel, own_convolutions: bool = False) -> UNet2DConditionModel:
    """A UNet to put an adapter into, with the weights of ``unet`` and no copy of them.

    ``own_convolutions``: but for the weights of convolutions, whose order in memory the training changes.
    """
    tensors = (*unet.parameters(), *unet.buffers())
    return copy.deepcopy(unet, {id(t): t for t in tensors if not (own_convolutions and t.ndim == 4)})
