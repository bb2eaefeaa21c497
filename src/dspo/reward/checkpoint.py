"""The reward model on disk, and the scorer that the rest of the pipeline uses.

Only what training changed is saved; the frozen rest is named and held to a hash of the backbone's weights.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from dspo.data.files import read_json, write_bytes, write_json
from dspo.data.images import Pixels
from dspo.errors import UserError
from dspo.lanes import in_lanes
from dspo.params import RewardParams
from dspo.reward.backbone import ANY_SHAPE, weights_sha256
from dspo.reward.dataset import autocast
from dspo.reward.model import RewardModel, build_model
from dspo.reward.training import Trained, load_weights

CONFIG = "config.json"
EMA_WEIGHTS = "model.safetensors"
RAW_WEIGHTS = "raw.safetensors"


class RewardScorer:
    """A trained reward model that scores images."""

    def __init__(
        self,
        model: RewardModel,
        params: RewardParams,
        temperatures: dict[str, float],
        untrained: list[str],
    ) -> None:
        self.model = model
        self.params = params
        self.heads = model.heads
        self.temperatures = temperatures  # head -> T of p = sigmoid(difference / T), fitted on validation
        self.untrained = untrained  # heads that had no labels; their scores mean nothing

    @property
    def temperature(self) -> float:
        """T of the overall head."""
        return self.temperatures["overall"]

    def score(self, images: Sequence[Pixels], captions: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Scores [n, n_heads] of uint8 images [height, width, 3] for their captions; columns as ``heads``.

        The mean over the views that the model has (``reward.views``).
        """
        if not images:
            return np.zeros((0, len(self.heads)), dtype=np.float32)
        backbone = self.model.backbone
        parts = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]
        batches = ((images[part], self._tokens(captions[part])) for part in parts)
        with sdpa_kernel(ANY_SHAPE):
            scores = list(in_lanes(lambda batch: self._score(*batch), batches, backbone.device, backbone.side))
        return np.concatenate(scores)

    def _tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """The captions [n, length] of every view."""
        return [self.model.backbone.tokenize(view.captions(captions)) for view in self.model.views]

    def _score(self, images: Sequence[Pixels], tokens: Sequence[Tensor]) -> NDArray[np.float32]:
        backbone = self.model.backbone
        resized = [backbone.resize(image) for image in images]
        scores = []
        with torch.inference_mode(), autocast(backbone.device, self.params.dtype):
            for view, ids in zip(self.model.views, tokens, strict=True):
                pixels = backbone.preprocess([view.image(image, backbone.patch) for image in resized])
                scores.append(self.model(pixels, ids.to(backbone.device)).cpu().numpy())
        mean: NDArray[np.float32] = np.mean(scores, axis=0)
        return mean


def save_reward(
    folder: Path,
    model: RewardModel,
    trained: Trained,
    params: RewardParams,
    temperatures: dict[str, float],
    untrained: list[str],
    backbone_sha256: str,
) -> None:
    """Write ``config.json``, ``model.safetensors`` (EMA) and ``raw.safetensors``.

    ``backbone_sha256``: ``weights_sha256`` of the backbone before training.
    Raises :class:`UserError` if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in ((EMA_WEIGHTS, trained.ema), (RAW_WEIGHTS, trained.raw)):
        write_bytes(save({key: tensor.cpu().contiguous() for key, tensor in state.items()}), folder / name)
    config = {
        "params": params.model_dump(mode="json"),
        "heads": list(model.heads),
        "backbone_sha256": backbone_sha256,
        "quick_gelu": model.backbone.quick_gelu,
        "temperatures": temperatures,
        "untrained": untrained,
    }
    write_json(config, folder / CONFIG)


def load_reward(folder: Path, device: torch.device) -> RewardScorer:
    """Load a reward model for scoring. Raises :class:`UserError` if a file is missing or damaged, or the backbone that
    its config names is not the one that it was trained on."""
    config = read_json(folder / CONFIG)
    try:
        params = RewardParams.model_validate(config["params"])
        temperatures, untrained = (
            dict(config["temperatures"]),
            list(config["untrained"]),
        )
        expected_hash, quick_gelu = config["backbone_sha256"], config["quick_gelu"]
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{folder / CONFIG}: not the config of a reward model ({error}); train it again") from None
    state = read_weights(folder / EMA_WEIGHTS)
    model = build_model(params, seed=0, device=device)
    if weights_sha256(model.backbone.clip) != expected_hash or model.backbone.quick_gelu != quick_gelu:
        raise UserError(
            f"{folder}: trained on another backbone than {params.backbone} is now (its weights or its activation "
            "differ). Bring that backbone back, or train the reward model again: `dvc repro train_reward`."
        )
    shapes = {name: parameter.shape for name, parameter in model.trained_parameters().items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise UserError(f"{folder / EMA_WEIGHTS}: its tensors do not fit {CONFIG}; train the reward model again")
    load_weights(model, state)
    return RewardScorer(model, params, temperatures, untrained)


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train the reward model or fetch it: `dvc pull {path.parent}`") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); train the reward model again or fetch it again") from None
    return weights
