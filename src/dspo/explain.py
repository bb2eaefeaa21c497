"""What the reward model says of one image, and where its fusion looked, as a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from dspo.data.files import whole_file
from dspo.data.images import Pixels, decode_image
from dspo.environment import device
from dspo.errors import UserError
from dspo.reward.checkpoint import RewardScorer, load_reward
from dspo.reward.fusion import HEAD_WIDTH, CrossAttention, Fusion, FusionLayer
from dspo.reward.model import PROMPTED_HEADS

ACROSS = 6  # pictures in a row
NOTE = (
    "Above: the patches that each head looked at. Below: the patches that each word of the prompt looked at.\n"
    "Brighter: more attention, above and below on scales of their own. It says where the model looked, not why it "
    "scored so."
)

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    prompt: str
    image: Pixels  # [size, size, 3], the part that the model saw
    scores: dict[str, float]  # head -> score
    untrained: list[str]
    heads: dict[str, Map]  # head -> [side, side] attention of its query to the patches; 1 where it is spread evenly
    on_image: dict[str, float]  # head -> share of its attention that is on the image; the rest is on the words
    words: list[tuple[str, Map]]  # each word that the model read, and the patches that the last fusion layer showed it


def explain(prompt: str, image: Path, reward: Path, output: Path) -> Explanation:
    """Score ``image`` for ``prompt`` and write the picture ``output`` (PNG).

    Raises :class:`UserError` if the image does not decode, the prompt is empty, or the model has no fusion.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty. Give the text that the image was made of, in quotes.")
    if not image.is_file():
        raise UserError(f"{image}: no such file. Give the path of a PNG, JPEG or WebP image.")
    pixels = decode_image(image.read_bytes(), str(image))
    said = look(load_reward(reward, device()), prompt, pixels)
    with whole_file(output) as partial:
        draw(said).savefig(partial, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return said


def look(scorer: RewardScorer, prompt: str, image: Pixels) -> Explanation:
    """The scores, and the attention weights of the pass over the image as it is, the first of the model's views.

    Raises :class:`UserError` as above.
    """
    fusion, backbone = scorer.model.fusion, scorer.model.backbone
    if not isinstance(fusion, Fusion):
        raise UserError(
            "this reward model has no fusion that could look anywhere (reward.fusion: false). Set it to true and train "
            "the model again: `dvc repro train_reward`."
        )
    attentions: dict[str, CrossAttention] = {"prompted": fusion.pool_prompted.attention}
    if fusion.pool_free is not None:
        attentions["free"] = fusion.pool_free.attention
    for layer in fusion.layers:  # the last one's stays
        assert isinstance(layer, FusionLayer)
        attentions["words"] = layer.text_reads_image
    with recorded(attentions) as weights:
        row = scorer.score([image], [prompt], batch_size=1)[0]

    side = backbone.clip.visual.grid_size[0]
    n_patches = side * side
    maps: dict[str, Map] = {}
    on_image: dict[str, float] = {}
    queries = {"prompted": 0, "free": 0}
    for head in scorer.heads:
        pool = "prompted" if head in PROMPTED_HEADS else "free"
        attention = weights[pool][queries[pool]]
        queries[pool] += 1
        patches = attention[:n_patches]
        on_image[head] = float(patches.sum())
        maps[head] = evenly_one(patches, side)
    spans = word_spans(scorer, prompt)
    words = [(word, evenly_one(weights["words"][a:b].mean(0), side)) for word, a, b in spans if "words" in weights]
    seen = backbone.preprocess([image])
    return Explanation(
        prompt=prompt,
        image=shown(seen, backbone.clip.visual.preprocess_cfg),
        scores={head: float(score) for head, score in zip(scorer.heads, row, strict=True)},
        untrained=scorer.untrained,
        heads=maps,
        on_image=on_image,
        words=words,
    )


@contextmanager
def recorded(attentions: dict[str, CrossAttention]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each module's weights [n_queries, n_context] come into when it is first called."""
    weights: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, CrossAttention)
            if name not in weights:
                weights[name] = attention_weights(module, *inputs)[0].cpu()

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in attentions.items()]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(module: CrossAttention, queries: Tensor, context: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) [batch, n_queries, n_context] in float32, the mean over the attention's heads.

    Arguments as of ``CrossAttention.forward``, which applies these weights without showing them.
    """
    q = module._split(module.to_q(queries)).float()
    k = module._split(module.to_kv(context).chunk(2, dim=-1)[0]).float()
    logits = q @ k.transpose(-1, -2) * HEAD_WIDTH**-0.5
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None, :], -torch.inf)
    weights: Tensor = logits.softmax(-1).mean(1)
    return weights


def word_spans(scorer: RewardScorer, prompt: str) -> list[tuple[str, int, int]]:
    """(word, first token, one past its last token) of every word that the model reads; long prompts are cut by it.

    CLIP's tokenizers split at white space first, so the tokens of the first words are those of their text alone.
    """
    words = prompt.split()
    beginnings = [" ".join(words[: i + 1]) for i in range(len(words))]
    ends = [1, *(int(scorer.model.backbone.tokenize([text]).argmax(-1)) for text in beginnings)]
    return [(word, first, end) for word, first, end in zip(words, ends, ends[1:], strict=False) if end > first]


def evenly_one(patches: Tensor, side: int) -> Map:
    """Attention [side * side] as a map [side, side] whose mean is 1."""
    scaled: Map = (patches / patches.mean()).reshape(side, side).numpy()
    return scaled


def shown(pixels: Tensor, statistics: dict[str, Any]) -> Pixels:
    """Normalised pixels [1, 3, size, size] as an image [size, size, 3]."""
    mean, std = (np.asarray(statistics[name], dtype=np.float32) for name in ("mean", "std"))
    image = pixels[0].permute(1, 2, 0).cpu().numpy() * std + mean
    return (image * 255).round().clip(0, 255).astype(np.uint8)


def draw(said: Explanation) -> Figure:
    """The image, where each head looked with its score, and where each word looked."""
    below = -(-len(said.words) // ACROSS)
    figure = Figure(figsize=(2.0 * ACROSS, 3.3 + 2.25 * below), layout="constrained")
    axes = figure.subplots(1 + below, ACROSS, squeeze=False)
    figure.suptitle(f"“{said.prompt}”", fontsize=13, parse_math=False)
    figure.supxlabel(NOTE, fontsize=9, color="#57606a")
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(said.image)
    axes[0, 0].set_title("image", fontsize=10)
    scale = max(map_.max() for map_ in said.heads.values())
    for axis, (head, map_) in zip(axes[0, 1:], said.heads.items(), strict=False):
        score = "untrained" if head in said.untrained else f"{said.scores[head]:.3f}"
        _overlay(axis, said.image, map_, scale)
        axis.set_title(f"{head}\n{score}\n{said.on_image[head]:.0%} on the image", fontsize=10)
    scale = max((map_.max() for _, map_ in said.words), default=1.0)
    for axis, (word, map_) in zip(axes[1:].flat, said.words, strict=False):
        _overlay(axis, said.image, map_, scale)
        axis.set_title(word, fontsize=10, parse_math=False)
    return figure


def _overlay(axis: Any, image: Pixels, map_: Map, scale: float) -> None:
    """The image in grey under the map; the brightest colour stands for ``scale``, and where less was looked at more of
    the image shows."""
    size = len(image)
    axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
    # By the square root: one patch often takes most of the attention, and the others should still be told apart.
    norm = PowerNorm(0.5, 0, scale)
    opacity = 0.45 + 0.35 * np.asarray(norm(map_))
    axis.imshow(map_, cmap="inferno", norm=norm, alpha=opacity, extent=(0, size, size, 0))
