"""A CLIP from a folder in transformers' layout, with the preprocessing that stands beside it."""

from pathlib import Path

import torch
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def load_clip(folder: Path, device: torch.device) -> tuple[CLIPModel, CLIPImageProcessorPil]:
    """The model in float32, and PIL's resizing, with which scores were published; transformers' default is a tensor's.

    Raises ``ValueError`` if the weights do not fill the model: transformers would fill up at random.
    """
    clip, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the weights lack {sorted(info['missing_keys'])[0]}")
    return clip.to(device).eval(), CLIPImageProcessorPil.from_pretrained(folder)
