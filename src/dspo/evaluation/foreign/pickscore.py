"""PickScore v1: a CLIP-H that was tuned on Pick-a-Pic's choices.

exp(logit_scale) · cos(image, text), in CLIP's own space; preprocessing and tokenizer are those of its folder.
Kirstain et al., *Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation*, NeurIPS 2023.
"""

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from dspo.evaluation.foreign.clip_folder import load_clip
from dspo.evaluation.foreign.places import path_of
from dspo.params import PickScoreParams


class PickScore:
    def __init__(self, params: PickScoreParams, device: torch.device) -> None:
        folder = path_of(params.model, "config.json").parent
        self.clip, self.processor = load_clip(folder, device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [batch]."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        out = self.clip(pixel_values=pixels.to(self.clip.device), **tokens.to(self.clip.device))
        scores: Tensor = self.clip.logit_scale.exp() * (out.image_embeds * out.text_embeds).sum(dim=-1)
        return scores
