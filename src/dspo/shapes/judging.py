"""The gold judge over many pictures, spread over processes."""

import multiprocessing
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspo.data.codecs import end_with_parent
from dspo.data.images import decode_image
from dspo.progress import progress
from dspo.shapes.gold import GoldScore, judge

Item = tuple[bytes | NDArray[np.uint8], str, str]


def judge_all(
    images: Sequence[bytes | NDArray[np.uint8]], prompts: Sequence[str], where: Sequence[str], processes: int
) -> list[GoldScore]:
    """Judge pictures, encoded or uint8 [64, 64, 3], each by its prompt; the result does not depend on ``processes``.

    ``where`` names each picture in error messages. Raises :class:`~dspo.errors.UserError` if a picture does not decode
    or a prompt is not of the grammar.
    """
    items = list(zip(images, prompts, where, strict=True))
    if processes == 1 or len(items) < 64:  # below that, starting processes costs more than it saves
        return list(progress(map(_judge_one, items), len(items), "gold judge"))
    # "spawn": a fork would copy locks that torch's threads may hold
    with multiprocessing.get_context("spawn").Pool(processes, initializer=end_with_parent) as pool:
        return list(progress(pool.imap(_judge_one, items, chunksize=16), len(items), "gold judge"))


def _judge_one(item: Item) -> GoldScore:
    image, prompt, where = item
    return judge(decode_image(image, where) if isinstance(image, bytes) else image, prompt)
