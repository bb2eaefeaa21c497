"""CLIP score: 100 · cos(image, text) of a CLIP-H that saw no preferences (LAION-2B).

Hessel et al., *CLIPScore: A Reference-free Evaluation Metric for Image Captioning*, EMNLP 2021, has 2.5 · max(cos, 0);
in work on text-to-image models the cosine is given times 100. Both order images alike.
"""

import torch
from PIL import Image
from torch import Tensor

from dspo.evaluation.foreign.clip_h import ClipH
from dspo.params import ClipHParams


class ClipScore:
    def __init__(self, params: ClipHParams, device: torch.device) -> None:
        self.clip = ClipH(params.model, device)
        self.transform = self.clip.pil_transform()

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [batch]."""
        return 100 * self.clip.cosines(images, prompts, self.transform)
