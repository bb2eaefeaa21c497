"""BLIP's image encoder and its cross-attending text encoder, from weights in the names of BLIP's own code.

BLIP names its image encoder as timm does and its text encoder as BERT; transformers has the same modules under other
names. Sizes are read from the weights, since transformers' defaults are those of another BLIP.
"""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
HEAD_WIDTH = 64  # of every attention head in BLIP; the weights do not show it
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.layer_norm1."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.layer_norm2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
_BUFFER = "embeddings.position_ids"  # a range of integers that older BERTs saved


def load_blip(state: Mapping[str, Tensor]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Image and text encoder from a checkpoint. Raises ``KeyError`` or ``RuntimeError`` if it holds another model."""
    image = {_vision_name(name): value for name, value in _below(VISION, state).items()}
    vision = BlipVisionModel(vision_config(image))
    vision.load_state_dict(image)
    words = {name: value for name, value in _below(TEXT, state).items() if name != _BUFFER}
    text = BlipTextModel(text_config(words), add_pooling_layer=False)
    text.load_state_dict(words)
    return vision, text


def vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """From weights in transformers' names."""
    patches = state["embeddings.position_embedding"].shape[1] - 1
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers("encoder.layers", state),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(state: Mapping[str, Tensor]) -> BlipTextConfig:
    """From weights in transformers' names, which are the published ones."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers("encoder.layer", state),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
    )


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    for published, ours in _VISION_NAMES:
        if re.match(published, name):
            return re.sub(published, ours, name)
    raise KeyError(name)


def _layers(prefix: str, state: Mapping[str, Tensor]) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max(int(found[1]) for name in state if (found := pattern.match(name)))
