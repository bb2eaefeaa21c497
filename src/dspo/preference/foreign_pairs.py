"""Pairs that were made elsewhere -> pairs on disk as the stage `score` leaves them, ready for training."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from dspo.data.files import write_json
from dspo.data.images import Pixels, decode_image, open_parquet, read_table, table_writer
from dspo.data.keys import prompt_id
from dspo.data.parts import in_parts
from dspo.data.readers.comparison import Comparison
from dspo.data.records import PAIRS
from dspo.diffusion.base import load_vae
from dspo.diffusion.encoding import Fitted, bucket, encode_images, fit
from dspo.errors import UserError
from dspo.params import BaseModelParams, ScoreParams
from dspo.preference.dataset import batches_alike
from dspo.preference.pairs import calibrated_rewards, held_out_prompts, weighted_reward
from dspo.preference.scoring import Row, Scorer, trained_heads, write_text

UNSPLIT = "unsplit.parquet"
ROWS_PER_PART = 128
PARTS_PER_LINE = 20  # of the log

Latents = NDArray[np.float16]

log = logging.getLogger(__name__)


def write_foreign_pairs(
    comparisons: Iterable[Comparison],
    base: BaseModelParams,
    params: ScoreParams,
    seed: int,
    device: torch.device,
    scorer: Scorer | None,
    test_prompts: Set[str],
    output: Path,
) -> dict[str, Any]:
    """Fill ``output`` with the comparisons that have a winner, and return the summary that is also written there.

    ``{train,validation}.parquet`` (columns: ``records.PAIRS``), ``text/`` and ``summary.json``. The images
    are kept as they came; the latents of a pair have the size of the SDXL bucket that is nearest to its aspect ratio,
    at the base's resolution. Without a scorer the ``score_*`` columns are null, and CaPO's calibrated reward is 1 for
    the winner and 0 for the loser: the win rate that people gave them. ``test_prompts``: ids of prompts that are left
    out. Images are in memory by ``params.batch_size`` pairs. Raises :class:`UserError` if there are fewer than two
    prompts, since one is held out, or if ``params.weights`` has a head that the scorer lacks.
    """
    if scorer is not None:
        trained_heads(scorer, params.weights)
    counts: Counter[str] = Counter()
    parts = in_parts(_decided(comparisons, test_prompts, counts), params.batch_size)
    first = next(parts, [])  # before the costly loading of a model: most mistakes are in the first rows already
    with table_writer(output / UNSPLIT, PAIRS) as write:
        vae = load_vae(base, device)
        for number, part in enumerate(chain([first] if first else [], parts), start=1):
            images = [_fitted(pair, base.resolution) for pair in part]
            counts["enlarged"] += sum(image.enlarged for both in images for image in both)
            rows = [_row(*one) for one in zip(part, _encoded(vae, images), images, strict=True)]
            if scorer is not None:
                _add_scores(rows, [image.pixels for both in images for image in both], scorer, params)
            write(pa.Table.from_pylist(rows, schema=PAIRS))
            if number % PARTS_PER_LINE == 0:
                log.info("%d pairs encoded", number * params.batch_size)

    table = read_table(output / UNSPLIT, ["prompt_id", "caption", "weight"])
    captions = dict(zip(table["prompt_id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    if len(captions) < 2:
        raise UserError(
            "the pairs with a winner have fewer than 2 prompts; one is held out. Add pairs of other prompts."
        )
    if not any(table["weight"].to_pylist()):
        raise UserError("every weight is 0: nothing would be learnt. Give a pair a weight above 0.")
    held_out = held_out_prompts(captions, params.validation_share, seed)
    _split(output, held_out)
    write_text(base, captions, device, output / "text")
    held = sum(prompt in held_out for prompt in table["prompt_id"].to_pylist())
    summary = {
        "pairs": len(table),
        "pairs_train": len(table) - held,
        "pairs_validation": held,
        "prompts_with_pairs": len(captions),
        "left_out": {reason: counts[reason] for reason in ("ties", "repeated", "test_prompts")},
        "images_enlarged": counts["enlarged"],
        "untrained_heads": [] if scorer is None else list(scorer.untrained),
    }
    write_json(summary, output / "summary.json")
    return summary


def _decided(comparisons: Iterable[Comparison], test_prompts: Set[str], counts: Counter[str]) -> Iterator[Comparison]:
    """The comparisons that have a winner, winner first; a prompt's pair of images once."""
    seen = set()
    for comparison in comparisons:
        if prompt_id(comparison.prompt) in test_prompts:
            counts["test_prompts"] += 1
        elif comparison.label == 0.5:
            counts["ties"] += 1
        elif comparison.pair_id in seen or comparison.images[0] == comparison.images[1]:
            counts["repeated"] += 1
        else:
            seen.add(comparison.pair_id)
            yield comparison if comparison.label == 1 else comparison.turned()


def _fitted(pair: Comparison, resolution: int) -> list[Fitted]:
    """Both images in the bucket that is nearest to the mean of their aspect ratios."""
    images = [decode_image(image, pair.where) for image in pair.images]
    aspects = [width / height for height, width, _ in (image.shape for image in images)]
    height, width = bucket(geometric_mean(aspects), resolution)
    return [fit(image, height, width) for image in images]


def _encoded(vae: AutoencoderKL, pairs: Sequence[Sequence[Fitted]]) -> list[Latents]:
    """Latents of each pair, [2, 4, h, w]."""
    latents: dict[int, Latents] = {}
    for alike in batches_alike(range(len(pairs)), len(pairs), lambda n: pairs[n][0].pixels.shape):
        encoded = encode_images(vae, [image.pixels for n in alike for image in pairs[n]])
        latents |= zip(alike, encoded.reshape(len(alike), 2, *encoded.shape[1:]), strict=True)
    return [latents[n] for n in range(len(pairs))]


def _row(pair: Comparison, latents: Latents, images: Sequence[Fitted]) -> Row:
    """A row of ``records.PAIRS``; how the images were sampled is not known."""
    height, width, _ = images[0].pixels.shape
    row: Row = dict.fromkeys(PAIRS.names)
    row |= {
        "pair_id": pair.pair_id,
        "prompt_id": prompt_id(pair.prompt),
        "caption": pair.prompt,
        "weight": pair.weight,
        "width": width,
        "height": height,
        "latent_shape": list(latents.shape[1:]),
        "time_ids": images[0].time_ids,
    }
    for side in (0, 1):
        row |= {
            f"jpg_{side}": pair.images[side],
            f"label_{side}": 1.0 - side,
            f"rca_{side}": 1.0 - side,
            f"latent_{side}": latents[side].astype("<f2").tobytes(),
        }
    return row


def _add_scores(rows: Sequence[Row], images: Sequence[Pixels], scorer: Scorer, params: ScoreParams) -> None:
    """``images``: those of the rows, winner and loser in turn."""
    captions = [row["caption"] for row in rows for _ in range(2)]
    scored = scorer.score(images, captions, params.batch_size).tolist()
    by_head = [dict(zip(scorer.heads, scores, strict=True)) for scores in scored]
    for row, both in zip(rows, zip(by_head[::2], by_head[1::2], strict=True), strict=True):
        rewards = [weighted_reward(scores, params.weights) for scores in both]
        calibrated = calibrated_rewards(rewards, scorer.temperature)
        for side in (0, 1):
            row[f"rca_{side}"] = float(calibrated[side])
            row |= {f"score_{side}_{head}": value for head, value in both[side].items()}


def _split(output: Path, held_out: set[str]) -> None:
    """``unsplit.parquet`` -> ``train.parquet`` and ``validation.parquet``, part by part."""
    whole = output / UNSPLIT
    with ExitStack() as files:
        source = files.enter_context(open_parquet(whole, PAIRS.names))
        write = {s: files.enter_context(table_writer(output / f"{s}.parquet", PAIRS)) for s in ("train", "validation")}
        for batch in source.iter_batches(ROWS_PER_PART):
            part = pa.Table.from_batches([batch])
            held = [prompt in held_out for prompt in part["prompt_id"].to_pylist()]
            for split, wanted in (("train", False), ("validation", True)):
                members = part.filter(pa.array([value == wanted for value in held]))
                if len(members):
                    write[split](members)
    whole.unlink()
