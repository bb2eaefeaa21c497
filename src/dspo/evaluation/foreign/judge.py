"""A published judge: its weights are read when it is asked, and given back after."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dspo.errors import UserError
from dspo.evaluation.foreign.aesthetics import Aesthetics
from dspo.evaluation.foreign.clip_score import ClipScore
from dspo.evaluation.foreign.hpsv2 import HPSv2
from dspo.evaluation.foreign.imagereward import ImageReward
from dspo.evaluation.foreign.pickscore import PickScore
from dspo.evaluation.foreign.places import require, wanted
from dspo.params import ForeignJudgeParams
from dspo.progress import progress

Array = npt.NDArray[np.float64]
Scorer = Callable[[list[Image.Image], list[str]], Tensor]

JUDGES: dict[str, Callable[..., Scorer]] = {
    "pickscore": PickScore,
    "hpsv2.1": HPSv2,
    "imagereward": ImageReward,
    "clip_score": ClipScore,
    "aesthetics": Aesthetics,
}
_DAMAGED = (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class ForeignJudge:
    """Holds no weights, so that five judges take no more memory than the largest of them."""

    params: ForeignJudgeParams
    device: torch.device

    @property
    def name(self) -> str:
        """Of the judge and of its column."""
        return self.params.name

    def load(self) -> Scorer:
        """Raises :class:`UserError` if weights are missing, damaged or those of another model."""
        require([self.params])
        try:
            return JUDGES[self.name](self.params, self.device)
        except _DAMAGED as error:
            remedies = "; ".join(want.remedy for want in wanted(self.params))
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"evaluate.judges: {self.name} cannot be loaded ({type(error).__name__}: {reason}). "
                f"Its files are damaged or of another model; get them again: {remedies}"
            ) from None

    @torch.inference_mode()
    def score(self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], batch_size: int) -> Array:
        """Scores [n], in float32, of uint8 images [height, width, 3] for their prompts."""
        scorer = self.load()
        scores = []
        starts = range(0, len(images), batch_size)
        for start in progress(starts, len(starts), self.name):
            batch = slice(start, start + batch_size)
            pictures = [Image.fromarray(image) for image in images[batch]]
            scores.append(scorer(pictures, list(prompts[batch])).double().cpu().numpy())
        return np.concatenate([np.zeros(0), *scores])
