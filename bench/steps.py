"""Training steps: this project's, the same with other adapters, and the stock recipe of the field."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models import with_shared_weights
from dspo.diffusion.base import encode_prompts
from dspo.params import TrainParams
from dspo.preference.dataset import Pairs, training_draw
from dspo.preference.dora import NAME, Adapter, add_dora, add_lora
from dspo.preference.losses import Predictions, Strength, pair_losses, shared_terms
from dspo.preference.method import Method, prepare
from dspo.preference.schedule import NoiseSchedule
from dspo.preference.trainer import make_optimizer

SEED = 0
COMPILED_CASES = 16  # torch counts the graphs of all cases together
PROMPTS = [f"a {colour} {thing}, {how}" for colour in ("red", "blue") for thing in ("fox", "cup", "ship", "house")
           for how in ("oil on canvas", "a photograph at dusk")]  # fmt: skip


class PlainLora(LoraVariant):
    """LoRA with the casts that our DoRA has, and nothing of its own: the least that an adapter can cost."""

    def forward(self, module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        dropped = module.lora_dropout[active_adapter](x)
        return result + F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * module.scaling[active_adapter]


class PeftDora:
    """peft's own DoRA, with the interface of :class:`dspo.preference.dora.Adapter`."""

    def __init__(self, unet: UNet2DConditionModel, params: TrainParams) -> None:
        self.unet, self.device, self.dtype = unet, unet.device, unet.dtype
        get_peft_model(unet, lora_config(params), adapter_name=NAME)
        self.layers = [module for module in unet.modules() if isinstance(module, LoraLinear)]
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}

    def refresh(self) -> None:
        """peft keeps nothing between steps."""

    def train(self, mode: bool) -> None:
        for layer in self.layers:
            layer.training = layer.lora_dropout[NAME].training = mode

    disabled = Adapter.disabled  # reads `layers` alone


def lora_config(params: TrainParams) -> LoraConfig:
    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.target_modules),
        use_dora=True,
    )


def peft_lora(unet: UNet2DConditionModel, params: TrainParams) -> Adapter:
    return add_lora(unet, params, SEED)


def plain_lora(unet: UNet2DConditionModel, params: TrainParams) -> Adapter:
    adapter = add_lora(unet, params, SEED)
    for layer in adapter.layers:
        layer.lora_variant[NAME] = PlainLora()
        layer.cast_input_dtype_enabled = False
    return adapter


def our_dora(unet: UNet2DConditionModel, params: TrainParams) -> Adapter:
    return add_dora(unet, params, SEED)


class Ours:
    """The steps of :func:`dspo.preference.trainer.train` over cached latents and text, with any adapter.

    ``as_peft``: as peft's own layers need it, under autocast, since their A and B are float32; and as they are used,
    neither compiled nor with another order of the weights.
    """

    def __init__(
        self,
        pipe: StableDiffusionXLPipeline,
        params: TrainParams,
        resolution: int,
        put: Callable[[UNet2DConditionModel, TrainParams], Any],
        as_peft: bool = False,
    ) -> None:
        self.params, self.as_peft = params, as_peft
        self.unet = with_shared_weights(pipe.unet, own_convolutions=not as_peft)
        self.adapter = put(self.unet, params)
        schedule = NoiseSchedule.of(pipe.scheduler, self.unet.device)
        self.method = Method(self.adapter, schedule, params, permute_k=False)
        if not as_peft:
            prepare(self.unet, params, COMPILED_CASES)
        elif params.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.optimizer = make_optimizer(self.adapter, params)
        self.pairs = _pairs(pipe, params.batch_size * params.gradient_accumulation_steps, resolution)
        self.count = 0

    def step(self) -> None:
        params, parameters = self.params, list(self.adapter.parameters.values())
        self.adapter.train(True)
        for start in range(0, len(self.pairs), params.batch_size):
            torch.autograd.backward(self.losses(start).sum() / len(self.pairs))
        self.adapter.train(False)
        torch.nn.utils.clip_grad_norm_(parameters, params.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapter.refresh()
        self.count += 1

    def losses(self, start: int) -> Tensor:
        rows = range(start, start + self.params.batch_size)
        timesteps = self.method.schedule.n_timesteps
        draws = [
            training_draw(self.pairs, row, SEED, self.count, timesteps, self.params.prompt_dropout) for row in rows
        ]
        with autocast(self.unet) if self.as_peft else nullcontext():
            losses, _ = self.method.losses(self.method.batch(self.pairs, draws), self.method.needs)
        return losses

    def tensors(self) -> Iterator[Tensor]:
        """All that stays between two steps."""
        yield from _kept(self.unet, self.optimizer)
        for layer in self.adapter.layers:
            kept = vars(layer.lora_variant[NAME]) if NAME in layer.lora_variant else {}
            yield from (value for value in kept.values() if isinstance(value, Tensor))


class Stock:
    """The recipe of the published scripts: peft's DoRA under autocast, pixels and prompts encoded in each step.

    Winner and loser share noise and timestep and go through the UNet as one batch. The reference is the same UNet
    inside peft's ``disable_adapter``, or a second UNet with weights of its own.
    """

    def __init__(
        self, pipe: StableDiffusionXLPipeline, params: TrainParams, resolution: int, second_unet: bool
    ) -> None:
        self.pipe, self.params = pipe, params
        self.unet = with_shared_weights(pipe.unet)
        self.model = get_peft_model(self.unet, lora_config(params))
        self.model.train()
        self.reference = _copy(pipe.unet) if second_unet else None
        if params.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=params.lr, weight_decay=params.weight_decay)
        self.noise = DDPMScheduler.from_config(pipe.scheduler.config)
        self.n_pairs = params.batch_size * params.gradient_accumulation_steps
        self.resolution = resolution
        self.pixels = torch.rand(2 * params.batch_size, 3, resolution, resolution) * 2 - 1

    def step(self) -> None:
        for start in range(0, self.n_pairs, self.params.batch_size):
            texts = [PROMPTS[i % len(PROMPTS)] for i in range(start, start + self.params.batch_size)]
            (self.losses(texts).sum() / self.n_pairs).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.params.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def losses(self, texts: list[str]) -> Tensor:
        pipe, device, n = self.pipe, self.unet.device, len(texts)
        with torch.no_grad():
            pixels = self.pixels.to(device, pipe.vae.dtype)
            latents = torch.cat([pipe.vae.encode(image[None]).latent_dist.sample() for image in pixels])
            latents = (latents * pipe.vae.config.scaling_factor).float()
            embeds, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        noise = torch.randn(n, *latents.shape[1:], device=device).repeat(2, 1, 1, 1)
        t = torch.randint(0, self.noise.config.num_train_timesteps, (n,), device=device)
        noisy = self.noise.add_noise(latents, noise, t.repeat(2)).to(self.unet.dtype)
        size = [self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]
        inputs = {
            "encoder_hidden_states": embeds.repeat(2, 1, 1),
            "added_cond_kwargs": {
                "text_embeds": pooled.repeat(2, 1),
                "time_ids": torch.tensor([size] * (2 * n), device=device, dtype=self.unet.dtype),
            },
        }
        with autocast(self.unet):
            policy = self.model(noisy, t.repeat(2), **inputs).sample.float()
            with torch.no_grad():
                if self.reference is None:
                    with self.model.disable_adapter():
                        reference = self.model(noisy, t.repeat(2), **inputs).sample.float()
                else:
                    reference = self.reference(noisy, t.repeat(2), **inputs).sample.float()
        e_w, e_l = policy.chunk(2)
        r_w, r_l = reference.chunk(2)
        y = noise[:n].float()
        p = Predictions(e_w=e_w, y_w=y, e_l=e_l, y_l=y, r_w=r_w, r_l=r_l)
        ones = torch.ones(n, device=device)
        strength = Strength(self.params.beta, self.params.lam, self.params.mapo_scale)
        return pair_losses(self.params.loss, p, shared_terms(p, self.params.beta, ones), ones, strength)

    def tensors(self) -> Iterator[Tensor]:
        yield from _kept(self.model, self.optimizer)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2, self.reference):
            if part is not None:
                yield from _kept(part)


def autocast(unet: UNet2DConditionModel) -> AbstractContextManager[Any]:
    return torch.autocast(unet.device.type, torch.bfloat16, enabled=unet.dtype == torch.bfloat16)


def _copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    nn.Module.to(twin, unet.dtype).to_empty(device=unet.device)
    twin.load_state_dict(unet.state_dict())
    return twin.eval().requires_grad_(False)


def _kept(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for state in optimizer.state.values() if optimizer else ():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _pairs(pipe: StableDiffusionXLPipeline, n: int, resolution: int) -> Pairs:
    """Random latents, and the prompts' real embeddings, as the stage `score` leaves them."""
    generator = torch.Generator().manual_seed(SEED)
    side = resolution // pipe.vae_scale_factor
    winners, losers = torch.randn(2, n, 4, side, side, generator=generator).half()
    text = list(encode_prompts(pipe, [*PROMPTS, ""]))
    return Pairs(
        ids=[str(i) for i in range(n)],
        latents_w=winners,
        latents_l=losers,
        weight=torch.ones(n),
        delta=torch.ones(n),
        size=torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * n, dtype=torch.float32),
        text_row=torch.arange(n) % len(PROMPTS),
        embeds=torch.stack([one.embeds for one in text]).cpu(),
        pooled=torch.stack([one.pooled for one in text]).cpu(),
    )
