"""The second judge of `shapes`: a small CNN trained on renders alone, never used for ratings, tuning or selection.

It answers "is this a clean picture of that request?" with a logit, and stands beside the gold judge in every table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from dspo.errors import UserError
from dspo.shapes.grammar import COLOURS, PATTERNS, POSITIONS, RELATIONS, SHAPES, SIZES, Request, parse

WEIGHTS = "model.safetensors"
_OBJECT_FIELDS = ((SHAPES, "shape"), (COLOURS, "colour"), (SIZES, "size"), (PATTERNS, "pattern"))
_SCENE_FIELDS = ((POSITIONS, "position"), (RELATIONS, "relation"), (COLOURS, "background"))
WIDTH = sum(len(v) + 1 for v, _ in _OBJECT_FIELDS) * 2 + sum(len(v) + 1 for v, _ in _SCENE_FIELDS)
CHANNELS = 64


def encode_request(request: Request) -> NDArray[np.float32]:
    """One-hot per attribute, with one place more for "free", [WIDTH]."""
    parts = []
    for i in range(2):
        wanted = request.objects[i] if i < len(request.objects) else None
        parts += [_one_hot(values, getattr(wanted, name, None)) for values, name in _OBJECT_FIELDS]
    parts += [_one_hot(values, getattr(request, name)) for values, name in _SCENE_FIELDS]
    return np.concatenate(parts)


def _one_hot(values: tuple[str, ...], value: str | None) -> NDArray[np.float32]:
    row = np.zeros(len(values) + 1, np.float32)
    row[values.index(value) if value else -1] = 1
    return row


class SecondJudge(nn.Module):
    """Convolutions over the picture; the request attends to their 8x8 map."""

    def __init__(self) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for before, after, stride in ((3, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 2), (64, CHANNELS, 1)):
            steps += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*steps)
        self.place = nn.Parameter(torch.zeros(64, CHANNELS))
        self.request = nn.Sequential(nn.Linear(WIDTH, 128), nn.SiLU(), nn.Linear(128, 4 * CHANNELS))
        self.attention = nn.MultiheadAttention(CHANNELS, 4, batch_first=True)
        self.verdict = nn.Sequential(nn.Linear(8 * CHANNELS, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, pixels: Tensor, request: Tensor) -> Tensor:
        """Logits [B] from pixels [B, 3, 64, 64] in [0, 1] and encoded requests [B, WIDTH]."""
        tokens = self.trunk(pixels * 4 - 2).flatten(2).transpose(1, 2) + self.place
        queries = self.request(request).unflatten(1, (4, CHANNELS))
        found, _ = self.attention(queries, tokens, tokens, need_weights=False)
        return torch.as_tensor(self.verdict(torch.cat([found, queries], dim=-1).flatten(1)).squeeze(-1))

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
        """Logits [N] for pictures uint8 [64, 64, 3]."""
        logits = []
        for first in range(0, len(images), 256):
            pixels = torch.from_numpy(np.stack(images[first : first + 256])).permute(0, 3, 1, 2).float() / 255
            encoded = np.stack([encode_request(parse(prompt)) for prompt in prompts[first : first + 256]])
            logits.append(self(pixels, torch.from_numpy(encoded)))
        return np.asarray(torch.cat(logits).numpy())
