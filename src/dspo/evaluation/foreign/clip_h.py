"""The open_clip ViT-H-14 under CLIP score and HPSv2.1: the cosine of image and text."""

from collections.abc import Callable

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from dspo.evaluation.foreign.places import path_of
from dspo.params import Place

ARCHITECTURE = "ViT-H-14"


class ClipH:
    """A plain CLIP with weights from one file, and a way to turn an image into its pixels."""

    def __init__(self, weights: Place, device: torch.device) -> None:
        self.clip = open_clip.create_model(ARCHITECTURE, pretrained=str(path_of(weights)), device=device).eval()
        self.tokenizer = open_clip.get_tokenizer(ARCHITECTURE)

    def cosines(self, images: list[Image.Image], prompts: list[str], transform: Callable[..., Tensor]) -> Tensor:
        """cos(image, text) of each pair, [batch]."""
        device = self.clip.logit_scale.device
        image = self.clip.encode_image(torch.stack([transform(image) for image in images]).to(device))
        text = self.clip.encode_text(self.tokenizer(prompts).to(device))
        return cosine_similarity(image, text, dim=-1)

    def pil_transform(self) -> Callable[..., Tensor]:
        """CLIP's own preprocessing: the image is resized before it becomes a tensor."""
        transform: Callable[..., Tensor] = Compose([*self._resize(), ToTensor(), self._normalise()])
        return transform

    def tensor_transform(self) -> Callable[..., Tensor]:
        """HPSv2's preprocessing: the image is resized as a tensor in [0, 1], so values are not rounded to 8 bits."""
        transform: Callable[..., Tensor] = Compose([ToTensor(), *self._resize(), self._normalise()])
        return transform

    def _resize(self) -> list[Callable[..., object]]:
        size = self.clip.visual.image_size[0]
        return [Resize(size, InterpolationMode.BICUBIC, antialias=True), CenterCrop(size)]

    def _normalise(self) -> Normalize:
        statistics = self.clip.visual.preprocess_cfg
        return Normalize(statistics["mean"], statistics["std"])
