"""HPSv2.1: cos(image, text) of a CLIP-H that was tuned on Human Preference Dataset v2.

Its published code leaves the scale of the cosine out, and so do we: scores lie about 0.2 to 0.35.
Wu et al., *Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis*,
arXiv 2306.09341.
"""

import torch
from PIL import Image
from torch import Tensor

from dspo.evaluation.foreign.clip_h import ClipH
from dspo.params import ClipHParams


class HPSv2:
    def __init__(self, params: ClipHParams, device: torch.device) -> None:
        self.clip = ClipH(params.model, device)
        self.transform = self.clip.tensor_transform()

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [batch]."""
        return self.clip.cosines(images, prompts, self.transform)
