"""The noise schedule that the base model was trained with."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dspo.errors import UserError


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod`` [T] float32 and what the UNet predicts."""

    alphas_cumprod: Tensor
    prediction_type: Literal["epsilon", "v_prediction"]

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> "NoiseSchedule":
        """From a pipeline's scheduler. Raises :class:`UserError` for a prediction type that has no target here."""
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the base model's scheduler predicts {prediction_type!r}; expected epsilon or v_prediction. "
                "Choose another base.model."
            )
        return cls(scheduler.alphas_cumprod.float().to(device), prediction_type)

    @property
    def n_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a_t) x + sqrt(1 - a_t) noise; x, noise [B, C, H, W], t [B]."""
        signal, spread = self._scales(t)
        return signal * x + spread * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should say: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans & Ho, 2022)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(t)
        return signal * noise - spread * x

    def omega(self, bias: float) -> Tensor:
        """Weight of each timestep, [T]: sigmoid(bias - logSNR(t)), scaled to mean 1."""
        log_snr = torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod)
        weight = torch.sigmoid(bias - log_snr)
        return weight / weight.mean()

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()
