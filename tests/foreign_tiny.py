"""Small random models of the published judges' classes, saved by the libraries that publish such models."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from tiny import tiny_tokenizer
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

ARCHITECTURE = "dspo-test-clip"
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "small", "star"]


def jolt(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter counts: also biases and positions, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def save_transformers_clip(folder: Path, quick_gelu: bool = False, seed: int = 0) -> CLIPModel:
    """CLIP, tokenizer and preprocessing in transformers' layout."""
    tokenizer = tiny_tokenizer()
    act = "quick_gelu" if quick_gelu else "gelu"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **sizes,
        hidden_act=act,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, hidden_act=act, image_size=28, patch_size=14)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = jolt(CLIPModel(config), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return model


def register_open_clip(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder)


def open_clip_model(seed: int) -> open_clip.model.CLIP:
    return jolt(open_clip.model.CLIP(**OPEN_CLIP), seed)


def linear_head(width: int, seed: int) -> nn.Sequential:
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)]
    return jolt(nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)), seed)


def prefixed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def blip_vision(width: int, depth: int, heads: int, size: int) -> nn.Module:
    """timm's, which BLIP copied, names included; patches of 16 pixels."""
    return timm.models.VisionTransformer(
        img_size=size, patch_size=16, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool=""
    )


def blip_text(vision_width: int, **config: int) -> BertModel:
    """BERT, which BLIP copied, names included; its cross-attention reads tokens of the image encoder's width."""
    sizes = BertConfig(is_decoder=True, add_cross_attention=True, layer_norm_eps=1e-12, **config)
    bert = BertModel(sizes, add_pooling_layer=False)
    for layer in bert.encoder.layer:
        attention = layer.crossattention.self
        attention.key = nn.Linear(vision_width, sizes.hidden_size)
        attention.value = nn.Linear(vision_width, sizes.hidden_size)
    return bert


def imagereward_state(vision: nn.Module, text: BertModel, head: nn.Module) -> dict[str, torch.Tensor]:
    """As in ImageReward.pt: BLIP without BERT's token types, with its projections, which ImageReward does not use."""
    state = prefixed("blip.visual_encoder.", vision) | prefixed("blip.text_encoder.", text)
    del state["blip.text_encoder.embeddings.token_type_embeddings.weight"]
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(text.config.max_position_embeddings)[None]
    state["blip.vision_proj.weight"] = state["blip.text_proj.weight"] = torch.zeros(4, 4)
    return state | prefixed("mlp.layers.", head)


def save_bert_tokenizer(folder: Path) -> BertTokenizer:
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
