"""The CLIP that the reward model starts from: loading, freezing, and the split into a frozen stem and a trained top.

The stem (embeddings and the lower transformer blocks) never changes in training, so that its outputs can be computed
once per image and caption. Stem and top together give exactly what open_clip's ``forward_intermediates`` gives with
``normalize_intermediates=True`` (a test holds this).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from dspo.data.hub import Missing, fetch, find
from dspo.data.images import Pixels
from dspo.errors import UserError
from dspo.params import RewardParams

HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # open_clip takes the first that is there

# All kernels of attention but cuDNN's. Today's GPUs prefer those, and plan them anew for each shape, which takes a good
# part of a second: batches of distinct images and captions have many shapes.
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Tokenizer(Protocol):
    def __call__(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class ImageTokens:
    patches: Tensor  # [batch, n_patches, image_width], after the tower's last norm
    embedding: Tensor  # [batch, embed_dim], projected class token, not normalised

    def __getitem__(self, rows: Tensor) -> "ImageTokens":
        return ImageTokens(self.patches.index_select(0, rows), self.embedding.index_select(0, rows))


@dataclass(frozen=True)
class TextTokens:
    tokens: Tensor  # [batch, length, text_width], after the tower's last norm
    last: Tensor  # [batch] position of the end-of-text token; what follows it is padding
    embedding: Tensor  # [batch, embed_dim], projected end-of-text token, not normalised

    def __getitem__(self, rows: Tensor) -> "TextTokens":
        return TextTokens(*(part.index_select(0, rows) for part in (self.tokens, self.last, self.embedding)))


class Backbone(nn.Module):
    """A CLIP with the last blocks of both towers trainable and all else frozen.

    An unlocked tower also trains its last norm and its projection. The scale of the cosine stays frozen: the reward's
    own scale and the temperature do its work.
    """

    recompute = False  # in the backward pass, what the trained blocks would otherwise keep for it

    def __init__(
        self,
        clip: CLIP,
        tokenizer: Tokenizer,
        unlocked_image_blocks: int,
        unlocked_text_blocks: int,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.side = int(clip.visual.image_size[0])  # of the square image that it sees, in pixels
        self.frozen_image_blocks = len(clip.visual.transformer.resblocks) - unlocked_image_blocks
        self.frozen_text_blocks = len(clip.transformer.resblocks) - unlocked_text_blocks
        if self.frozen_image_blocks < 0 or self.frozen_text_blocks < 0:
            raise UserError(
                f"reward.unlocked_image_blocks, reward.unlocked_text_blocks: at most "
                f"{len(clip.visual.transformer.resblocks)} and {len(clip.transformer.resblocks)} in this backbone"
            )
        clip.requires_grad_(False)
        if unlocked_image_blocks:
            clip.visual.transformer.resblocks[self.frozen_image_blocks :].requires_grad_(True)
            clip.visual.ln_post.requires_grad_(True)
            clip.visual.proj.requires_grad_(True)
        if unlocked_text_blocks:
            clip.transformer.resblocks[self.frozen_text_blocks :].requires_grad_(True)
            clip.ln_final.requires_grad_(True)
            clip.text_projection.requires_grad_(True)

    def multiply_tokens_at_once(self) -> None:
        """For autocast: lay out what attention reads so that each of its products is one.

        torch's attention turns [batch, tokens, width] round to [tokens, batch, width]. Tokens that do not lie in that
        order it multiplies one by one where the weight has no gradient, as autocast's copies have none in inference:
        80 times as long for ViT-L at 336 px on a CPU.
        """
        for block in [*self.clip.visual.transformer.resblocks, *self.clip.transformer.resblocks]:
            block.ln_1.register_forward_hook(lambda _module, _inputs, x: x.transpose(0, 1).contiguous().transpose(0, 1))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.clip.logit_scale.device
        return device

    @property
    def image_width(self) -> int:
        return int(self.clip.visual.transformer.width)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.clip.visual.patch_size[0])

    @property
    def text_width(self) -> int:
        return int(self.clip.transformer.width)

    @property
    def embed_dim(self) -> int:
        return int(self.clip.visual.output_dim)

    @property
    def quick_gelu(self) -> bool:
        return uses_quick_gelu(self.clip)

    def preprocess(self, images: list[Pixels]) -> Tensor:
        """uint8 images [height, width, 3] to normalised pixels [batch, 3, size, size] on the backbone's device.

        As open_clip's evaluation transform: bicubic to the shorter side, centre crop, the model's mean and deviation.
        """
        resized = np.stack([self.resize(image) for image in images])
        pixels = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2)  # moved as bytes
        statistics = self.clip.visual.preprocess_cfg
        mean, std = (torch.tensor(statistics[key], device=self.device).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (pixels.float() / 255 - mean) / std

    def resize(self, image: Pixels) -> Pixels:
        """The middle of an image at the backbone's size, uint8 [size, size, 3]; one of that size stays as it is."""
        return _resize(image, self.side)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids [batch, length], cut to the longest caption of the batch (attention is causal)."""
        ids = self.tokenizer(captions)
        return ids[:, : int(ids.argmax(-1).max()) + 1]

    def image_stem(self, pixels: Tensor) -> Tensor:
        """[batch, 3, size, size] -> [batch, 1 + n_patches, image_width], output of the last frozen block."""
        with torch.no_grad():
            x: Tensor = self.clip.visual._embeds(pixels)
            for block in self.clip.visual.transformer.resblocks[: self.frozen_image_blocks]:
                x = block(x)
        return x

    def image_top(self, stem: Tensor) -> ImageTokens:
        x = stem
        for block in self.clip.visual.transformer.resblocks[self.frozen_image_blocks :]:
            x = self._trained(block, x)
        x = self.clip.visual.ln_post(x)
        return ImageTokens(patches=x[:, 1:], embedding=x[:, 0] @ self.clip.visual.proj)

    def text_stem(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, text_width], output of the last frozen block."""
        length = tokens.shape[1]
        with torch.no_grad():
            x: Tensor = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:length]
            for block in self.clip.transformer.resblocks[: self.frozen_text_blocks]:
                x = block(x, attn_mask=self._causal_mask(length))
        return x

    def text_top(self, stem: Tensor, last: Tensor) -> TextTokens:
        """``last``: [batch] position of the end-of-text token (the highest id, its first place)."""
        x = stem
        for block in self.clip.transformer.resblocks[self.frozen_text_blocks :]:
            x = self._trained(block, x, self._causal_mask(stem.shape[1]))
        x = self.clip.ln_final(x)
        pooled = x[torch.arange(len(x), device=x.device), last]
        return TextTokens(tokens=x, last=last, embedding=pooled @ self.clip.text_projection)

    def cosine(self, image: ImageTokens, text: TextTokens) -> Tensor:
        """CLIP's own score exp(logit_scale) * cos(image, text), [batch]."""
        similarity = nn.functional.cosine_similarity(image.embedding.float(), text.embedding.float(), dim=-1)
        scaled: Tensor = self.clip.logit_scale.exp() * similarity
        return scaled

    def _trained(self, block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs = (x, None, None, mask)
        if not self.recompute or not torch.is_grad_enabled():
            y: Tensor = block(*inputs)
        else:  # without a state for random draws: CLIP has no dropout
            y = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return y

    def _causal_mask(self, length: int) -> Tensor:
        mask: Tensor = self.clip.attn_mask
        return mask[:length, :length]


def load_backbone(
    name: str,
    pretrained: str | None,
    image_size: int,
    unlocked_image_blocks: int,
    unlocked_text_blocks: int,
    device: torch.device,
) -> Backbone:
    """Load an open_clip model in float32.

    ``name``: a model name of open_clip with ``pretrained`` a tag or a local weight file, or ``local-dir:FOLDER`` with
    ``open_clip_config.json``, ``open_clip_model.safetensors`` and tokenizer files. On the ``meta`` device no weights
    are read. Raises :class:`UserError` if the model cannot be had, is of another kind than CLIP, or would run OpenAI's
    weights with the wrong activation.
    """
    meta = device.type == "meta"
    if not meta and not name.startswith("local-dir:") and pretrained is None:
        raise UserError(f"reward.pretrained: {name} needs a tag of open_clip or a local weight file")
    try:
        with torch.device(device if meta else "cpu"):
            clip = open_clip.create_model(
                name,
                pretrained=None if meta else pretrained,
                load_weights=not meta,
                force_image_size=image_size,
                device=torch.device("meta") if meta else "cpu",
            )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as error:
        said = f"reward.backbone: {name} (pretrained {pretrained}) cannot be loaded: {error}"
        raise UserError("\n    ".join([said, *(one.remedy for one in _missing(name, pretrained))])) from None
    if not isinstance(clip, CLIP) or clip.visual.attn_pool is not None or clip.text_pool_type != "argmax":
        raise UserError(f"reward.backbone: {name} is no plain CLIP; take a ViT model with CLIP's own text tower")
    check_quick_gelu(name, pretrained, clip)
    return Backbone(clip, tokenizer, unlocked_image_blocks, unlocked_text_blocks).to(device).eval()


def local_files(params: RewardParams) -> list[Path]:
    """Where the backbone's weights are on this disk; empty if they come from a hub."""
    if params.backbone.startswith("local-dir:"):
        return [Path(params.backbone.removeprefix("local-dir:"))]
    return [Path(params.pretrained)] if params.pretrained and Path(params.pretrained).exists() else []


def missing(params: RewardParams) -> list[Missing]:
    """What of the backbone is not on this disk, and the command that gets it. Empty for a ``local-dir:``."""
    return _missing(params.backbone, params.pretrained)


def _missing(name: str, pretrained: str | None) -> list[Missing]:
    if pretrained is None or Path(pretrained).is_file():
        return []
    published = (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("hf_hub")
    if published is None:
        what = f"reward.pretrained: {pretrained}: no such file, and no tag of {name} that the hub has"
        return [Missing(what, "correct reward.pretrained in params.yaml")]
    repository, file = published.rsplit("/", 1)
    wanted = [file] if file else list(HUB_WEIGHTS)
    if any(find(repository, "main", one) for one in wanted):
        return []
    return [Missing(f"{repository}: missing in the hub's cache", fetch(repository, None, wanted[:1]))]


def uses_quick_gelu(clip: CLIP) -> bool:
    blocks = [*clip.visual.transformer.resblocks, *clip.transformer.resblocks]
    return all(isinstance(block.mlp.gelu, QuickGELU) for block in blocks)


def check_quick_gelu(name: str, pretrained: str | None, clip: CLIP) -> None:
    """Raise :class:`UserError` where weights trained with QuickGELU would meet GELU or the other way round.

    open_clip 3 only warns for a known tag and says nothing for a local file. A file's kind is known where all published
    weights of an architecture share it, as for ViT-L-14-336 (OpenAI's alone).
    """
    if name.startswith("local-dir:"):
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    wanted = {
        bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
        for tag in ([pretrained] if pretrained in tags else tags)
    }
    if len(wanted) == 1 and uses_quick_gelu(clip) not in wanted:
        other = f"{name}-quickgelu" if wanted == {True} else name.removesuffix("-quickgelu")
        raise UserError(
            f"reward.backbone: {name} computes {'QuickGELU' if uses_quick_gelu(clip) else 'GELU'}, but these weights "
            f"were trained with the other activation; use {other}"
        )


def weights_sha256(clip: CLIP) -> str:
    """Identity of a backbone as loaded: sha256 over names and float32 bytes of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(clip.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resize(image: Pixels, size: int) -> Pixels:
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    new_height, new_width = (
        max(size, int(height * scale)),
        max(size, int(width * scale)),
    )
    resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[top : top + size, left : left + size]
