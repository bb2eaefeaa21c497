"""The loss of a batch: which forward passes it takes, and what they say."""

from collections.abc import Hashable, Sequence
from functools import partial

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dspo.diffusion.compiled import compile_blocks
from dspo.params import TrainParams
from dspo.preference.dataset import Batch, Draw, Pairs, make_batch, on_device
from dspo.preference.diagnostics import Columns, pair_columns
from dspo.preference.dora import Adapter
from dspo.preference.losses import NEEDS, Needs, Predictions, Strength, pair_losses, pull_of, shared_terms
from dspo.preference.schedule import NoiseSchedule


class Method:
    """A loss with its strengths, applied to an adapter in a UNet."""

    def __init__(self, adapter: Adapter, schedule: NoiseSchedule, params: TrainParams, permute_k: bool) -> None:
        self.adapter, self.schedule, self.loss = adapter, schedule, params.loss
        self.strength = Strength(params.beta, params.lam, params.mapo_scale, permute_k)
        self.needs = NEEDS[params.loss]
        omega = schedule.omega(params.timestep_weight_bias)
        self.omega = omega if self.needs.omega else torch.ones_like(omega)

    def batch(self, pairs: Pairs, draws: Sequence[Draw]) -> Batch:
        return make_batch(pairs, draws, self.schedule, self.adapter.dtype, self.adapter.device)

    def losses(self, batch: Batch, needs: Needs, reference: Tensor | None = None) -> tuple[Tensor, Columns]:
        """Loss of every pair, [B], and the diagnostics that ``needs`` allows for. ``reference``: as in `predict`."""
        p = predict(self.adapter, batch, needs, reference)
        terms = shared_terms(p, self.strength.beta, self.omega[batch.t])
        losses = pair_losses(self.loss, p, terms, batch.delta, self.strength)
        k = None if terms.u is None else pull_of(self.loss, terms.u, self.strength)
        return losses, pair_columns(losses, p, terms, batch.t, k)


class References:
    """What the reference says of micro-batches that come again, in host memory.

    Predictions and not errors, since a DSPO target is made of them: 0.26 MB per pair and draw at 1024 px in bfloat16.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def of(self, key: Hashable, adapter: Adapter, batch: Batch, needs: Needs) -> Tensor:
        """The reference's prediction [2 B, 4, h, w], computed where ``key`` is new; equal keys mean equal batches."""
        if key in self._kept:
            return on_device(self._kept[key], adapter.device).float()
        predicted = predict_reference(adapter, batch, needs)
        kept = torch.empty(predicted.shape, dtype=adapter.dtype, pin_memory=adapter.device.type == "cuda")
        self._kept[key] = kept.copy_(predicted, non_blocking=True)
        return predicted


def predict(adapter: Adapter, batch: Batch, needs: Needs, reference: Tensor | None = None) -> Predictions:
    """Run the UNet as often as ``needs`` asks, winner and loser in one batch; predictions are float32.

    ``reference`` [2 B, 4, h, w]: what :func:`predict_reference` says, where that is known already.
    """
    r_w = r_l = e_l = None
    # The reference first: no graph of the policy is alive meanwhile.
    if needs.reference:
        r_w, r_l = (predict_reference(adapter, batch, needs) if reference is None else reference).chunk(2)
    if needs.loser == "value":
        with torch.no_grad():
            e_l = forward(adapter.unet, batch.noisy_l, batch)
    if needs.loser == "gradient":
        e_w, e_l = forward(adapter.unet, torch.cat([batch.noisy_w, batch.noisy_l]), batch).chunk(2)
    else:
        e_w = forward(adapter.unet, batch.noisy_w, batch)
    return Predictions(e_w=e_w, y_w=batch.target_w, e_l=e_l, y_l=batch.target_l, r_w=r_w, r_l=r_l)


@torch.no_grad()
def predict_reference(adapter: Adapter, batch: Batch, needs: Needs) -> Tensor:
    """The UNet without the adapter on the winners, then the losers, [2 B, 4, h, w] float32.

    In one pass where the policy takes one, else in two: an untrained policy is the reference to the bit.
    """
    both = [batch.noisy_w, batch.noisy_l]
    with adapter.disabled():
        parts = [torch.cat(both)] if needs.loser == "gradient" else both
        return torch.cat([forward(adapter.unet, part, batch) for part in parts])


def forward(unet: UNet2DConditionModel, noisy: Tensor, batch: Batch) -> Tensor:
    """Prediction [n, 4, h, w] float32; n is B or 2 B, and the conditions are repeated to fit."""
    times = len(noisy) // len(batch)
    conditions = {"text_embeds": batch.pooled.repeat(times, 1), "time_ids": batch.time_ids.repeat(times, 1)}
    prediction: Tensor = unet(
        noisy,
        batch.t.repeat(times),
        encoder_hidden_states=batch.embeds.repeat(times, 1, 1),
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]
    return prediction.float()


def prepare(unet: UNet2DConditionModel, params: TrainParams, latent_sizes: int) -> None:
    """Make the UNet, with its adapter in it, ready for many passes over so many latent sizes: in place, for good."""
    if params.gradient_checkpointing:
        checkpoint_blocks(unet, params.gradient_checkpointing)
    if unet.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # the order that cuDNN's kernels for 16 bits compute in
        if params.compile:
            compile_blocks(unet, latent_sizes)


def checkpoint_blocks(unet: UNet2DConditionModel, share: float) -> None:
    """Let this share of the residual and transformer blocks, and of the adapter's layers before and after the latter,
    forget what it can compute again; evenly spread. Once for a UNet: its layers' ``forward`` are replaced."""
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]
    transformers = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
    outside = [layer for t in transformers for layer in (t.proj_in, t.proj_out) if isinstance(layer, LoraLinear)]
    chosen = set(_spread(blocks, share))

    def run(block: nn.Module, *arguments: object) -> object:
        return checkpoint(block, *arguments, use_reentrant=False) if block in chosen else block(*arguments)

    unet.enable_gradient_checkpointing(run)
    for layer in _spread(outside, share):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _spread(modules: Sequence[nn.Module], share: float) -> list[nn.Module]:
    return [module for i, module in enumerate(modules) if int((i + 1) * share) > int(i * share)]
