"""A small CLIP folder and made-up ratings: brighter images win, and captions name a colour channel."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from dspo.data.images import encode_png, write_table
from dspo.data.keys import prompt_id
from dspo.data.records import HEADS, RATINGS
from dspo.params import RewardParams

COLOURS = ("red", "green", "blue")


def make_clip(folder: Path, quick_gelu: bool = False, seed: int = 0) -> str:
    """Write an untrained CLIP for open_clip's ``local-dir:`` and return its name."""
    folder.mkdir(parents=True)
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [
        *characters,
        *(c + "</w>" for c in characters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    config = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 32,
            "layers": 3,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": len(vocabulary),
            "width": 32,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "local",
        },
    }
    statistics = {"mean": [0.5, 0.4, 0.6], "std": [0.25, 0.3, 0.2]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": statistics}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.model.CLIP(**config)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def reward_params(backbone: str, **changes: object) -> RewardParams:
    values: dict[str, object] = {
        "backbone": backbone,
        "pretrained": None,
        "image_size": 16,
        "unlocked_image_blocks": 1,
        "unlocked_text_blocks": 1,
        "fusion": True,
        "fusion_dim": 32,
        "fusion_layers": 1,
        "heads": list(HEADS),
        "focal_gamma": 0.0,
        "mixup_alpha": 0.2,
        "views": 2,
        "ema_decay": 0.9,
        "lr_backbone": 1e-4,
        "lr_heads": 3e-3,
        "weight_decay": 0.01,
        "batch_size": 16,
        "epochs": 2,
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "dtype": "float32",
    }
    return RewardParams.model_validate(values | changes)


def write_ratings(path: Path, n_pairs: int, seed: int, unlabelled: tuple[str, ...] = ()) -> None:
    """Pairs where the image with more of the caption's colour wins overall and alignment, the brighter one the rest."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n_pairs):
        channel = int(rng.integers(3))
        caption = f"{COLOURS[channel]} {'abcdefghij'[int(rng.integers(10))]}"
        images = [flat_image(rng) for _ in range(2)]
        matching = float(images[0][0, 0, channel] > images[1][0, 0, channel])
        brighter = float(images[0].mean() > images[1].mean())
        shares = {h: matching if h in ("overall", "alignment") else brighter for h in HEADS}
        rows.append(
            {
                "pair_id": f"{seed}-{i}",
                "prompt_id": prompt_id(caption),
                "caption": caption,
                "jpg_0": encode_png(images[0]),
                "jpg_1": encode_png(images[1]),
                "label_0": matching,
                "label_1": 1 - matching,
                **{f"y_{h}": None if h in unlabelled else share for h, share in shares.items()},
                "votes": 3,
                "p_first": 0.9 if matching else 0.1,
                "source": "base" if i % 4 else "other",
            }
        )
    write_table(pa.Table.from_pylist(rows, schema=RATINGS), path)


def flat_image(rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (16, 16, 3)).copy()
