"""LAION aesthetics: a linear head on the normalised image embedding of OpenAI's ViT-L/14; it does not see the prompt.

C. Schuhmann, *Improved Aesthetic Predictor*, 2022: `sac+logos+ava1-l14-linearMSE.pth`, trained on mean ratings of 1-10.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dspo.evaluation.foreign.clip_folder import load_clip
from dspo.evaluation.foreign.linear_head import load_head
from dspo.evaluation.foreign.places import path_of
from dspo.params import AestheticsParams


class Aesthetics:
    def __init__(self, params: AestheticsParams, device: torch.device) -> None:
        self.clip, self.processor = load_clip(path_of(params.clip, "config.json").parent, device)
        self.head = load_head(torch.load(path_of(params.model), map_location="cpu", weights_only=True)).to(device)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [batch]."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values
        embeddings = self.clip.get_image_features(pixels.to(self.clip.device)).pooler_output
        scores: Tensor = self.head(normalize(embeddings, dim=-1))
        return scores
