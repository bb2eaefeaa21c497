"""The second judge of `shapes`: a small CNN trained on renders alone, never used for ratings, tuning or selection.

It answers, for every attribute that the prompt asks for, "is it so?", and besides "is the picture clean?". Its score is
the log-probability that all of it is so; it stands beside the gold judge where the adapter is evaluated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dspo.errors import UserError
from dspo.shapes.grammar import ATTRIBUTES, VALUES, Request, asked_value, parse

WEIGHTS = "model.safetensors"
QUESTIONS = (*ATTRIBUTES, "clean")
WIDTH = sum(len(VALUES[name.split("_")[0]]) + 1 for name in ATTRIBUTES)
CHANNELS = 96


def encode_request(request: Request) -> NDArray[np.float32]:
    """One-hot per attribute, with one place more for "free", [WIDTH]."""
    parts = []
    for name in ATTRIBUTES:
        values, value = VALUES[name.split("_")[0]], asked_value(request, name)
        row = np.zeros(len(values) + 1, np.float32)
        row[values.index(value) if value else -1] = 1
        parts.append(row)
    return np.concatenate(parts)


def asked(request: Request) -> NDArray[np.bool_]:
    """Which of QUESTIONS the request poses, [len(QUESTIONS)]; "clean" is always one."""
    return np.array([*(asked_value(request, name) is not None for name in ATTRIBUTES), True])


class SecondJudge(nn.Module):
    """Convolutions over the picture; the request scales and shifts the channels of their 8x8 map (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for before, after, stride in ((3, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 2), (64, CHANNELS, 1)):
            steps += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*steps)
        self.place = nn.Parameter(torch.zeros(CHANNELS, 8, 8))
        self.request = nn.Sequential(nn.Linear(WIDTH, 128), nn.SiLU(), nn.Linear(128, 6 * CHANNELS))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(8, CHANNELS))
            for _ in range(3)
        )
        self.answers = nn.Sequential(nn.Linear(2 * CHANNELS, 128), nn.SiLU(), nn.Linear(128, len(QUESTIONS)))

    def forward(self, pixels: Tensor, request: Tensor) -> Tensor:
        """Logits [B, len(QUESTIONS)] from pixels [B, 3, 64, 64] in [0, 1] and encoded requests [B, WIDTH]."""
        return self.answer(self.see(pixels), request)

    def see(self, pixels: Tensor) -> Tensor:
        """Features [B, CHANNELS, 8, 8] that do not know the request."""
        return torch.as_tensor(self.trunk(pixels * 4 - 2))

    def answer(self, seen: Tensor, request: Tensor) -> Tensor:
        x = seen + self.place
        film = self.request(request).unflatten(1, (3, 2, CHANNELS, 1, 1))
        for i, block in enumerate(self.blocks):
            scale, shift = film[:, i].unbind(dim=1)
            x = x + block(x * (1 + scale) + shift)
        return torch.as_tensor(self.answers(torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], dim=1)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises :class:`UserError` where there is none."""
        if not (folder / WEIGHTS).exists():
            raise UserError(f"{folder / WEIGHTS}: no such file; `make shapes` trains the second judge")
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
        return judge.eval()

    @torch.inference_mode()
    def score(self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> NDArray[np.float32]:
        """Log-probabilities [N] that everything asked for is so, for pictures uint8 [64, 64, 3]."""
        scores = []
        for first in range(0, len(images), 256):
            pixels = torch.from_numpy(np.stack(images[first : first + 256])).permute(0, 3, 1, 2).float() / 255
            requests = [parse(prompt) for prompt in prompts[first : first + 256]]
            logits = self(pixels, torch.from_numpy(np.stack([encode_request(request) for request in requests])))
            posed = torch.from_numpy(np.stack([asked(request) for request in requests]))
            scores.append((F.logsigmoid(logits) * posed).sum(dim=1))
        return np.asarray(torch.cat(scores).numpy())
