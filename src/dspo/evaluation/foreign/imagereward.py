"""ImageReward v1.0: BLIP's text encoder reads the prompt while it looks at the image; a linear head scores its [CLS].

(head(text_encoder(prompt, image)[CLS]) − mean) / std, with BLIP ViT-L at 224 px and prompts of 35 tokens.
Xu et al., *ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation*, NeurIPS 2023.
"""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dspo.evaluation.foreign.blip import load_blip
from dspo.evaluation.foreign.linear_head import load_head
from dspo.evaluation.foreign.places import path_of
from dspo.params import ImageRewardParams

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores of its training images
PROMPT_TOKENS = 35


class ImageReward:
    def __init__(self, params: ImageRewardParams, device: torch.device) -> None:
        state = torch.load(path_of(params.model), map_location="cpu", weights_only=True)
        self.vision, self.text = (part.to(device).eval() for part in load_blip(state))
        head = {name.removeprefix("mlp."): value for name, value in state.items() if name.startswith("mlp.")}
        self.head = load_head(head).to(device)
        self.tokenizer = BertTokenizer.from_pretrained(path_of(params.tokenizer, "tokenizer_config.json").parent)
        size = self.vision.config.image_size
        self.transform = Compose(
            [
                Resize(size, InterpolationMode.BICUBIC),
                CenterCrop(size),
                ToTensor(),
                Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            ]
        )

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Scores [batch]."""
        device = self.text.device
        pixels = torch.stack([self.transform(image) for image in images]).to(device)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        ).to(device)
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        scores: Tensor = (self.head(read[:, 0]) - MEAN) / STD
        return scores
