"""The loss of a batch: which forward passes it takes, and what they say."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dspo.params import TrainParams
from dspo.preference.dataset import Batch, Draw, Pairs, make_batch
from dspo.preference.diagnostics import Columns, pair_columns
from dspo.preference.dora import Adapter
from dspo.preference.losses import NEEDS, Needs, Predictions, Strength, pair_losses, shared_terms
from dspo.preference.schedule import NoiseSchedule


class Method:
    """A loss with its strengths, applied to an adapter in a UNet."""

    def __init__(self, adapter: Adapter, schedule: NoiseSchedule, params: TrainParams, permute_k: bool) -> None:
        self.adapter, self.schedule, self.loss = adapter, schedule, params.loss
        self.strength = Strength(params.beta, params.lam, params.mapo_scale, permute_k)
        self.needs = NEEDS[params.loss]
        omega = schedule.omega(params.timestep_weight_bias)
        self.omega = omega if self.needs.omega else torch.ones_like(omega)
        self.pull_strength = {"dspo": params.lam, "dspo_official_sd15": params.beta}.get(params.loss)

    def batch(self, pairs: Pairs, draws: Sequence[Draw]) -> Batch:
        return make_batch(pairs, draws, self.schedule, self.adapter.dtype, self.adapter.device)

    def losses(self, batch: Batch, needs: Needs) -> tuple[Tensor, Columns]:
        """Loss of every pair, [B], and the diagnostics that ``needs`` allows for."""
        p = predict(self.adapter, batch, needs)
        terms = shared_terms(p, self.strength.beta, self.omega[batch.t])
        losses = pair_losses(self.loss, p, terms, batch.delta, self.strength)
        return losses, pair_columns(losses, p, terms, batch.t, self.pull_strength)


def predict(adapter: Adapter, batch: Batch, needs: Needs) -> Predictions:
    """Run the UNet as often as ``needs`` asks, winner and loser in one batch; predictions are float32."""
    both = torch.cat([batch.noisy_w, batch.noisy_l])
    r_w = r_l = e_l = None
    # The reference first: no graph of the policy is alive meanwhile.
    with torch.no_grad():
        if needs.reference:
            with adapter.disabled():
                r_w, r_l = forward(adapter.unet, both, batch).chunk(2)
        if needs.loser == "value":
            e_l = forward(adapter.unet, batch.noisy_l, batch)
    if needs.loser == "gradient":
        e_w, e_l = forward(adapter.unet, both, batch).chunk(2)
    else:
        e_w = forward(adapter.unet, batch.noisy_w, batch)
    return Predictions(e_w=e_w, y_w=batch.target_w, e_l=e_l, y_l=batch.target_l, r_w=r_w, r_l=r_l)


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
