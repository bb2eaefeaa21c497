"""Images as bytes, encoded by worker processes while the device goes on sampling."""

import io
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from PIL import Image

from dspo.data.images import Pixels, encode_png
from dspo.params import ImageFormat

# Encoding one image of 1024 px takes a tenth of its sampling time, so that two keep up with a device.
WORKERS = 2
# Pixels per side from which on encoding is worth a worker; starting one takes seconds.
LARGE = 512


class Encoder:
    """Encodes images; a :class:`Future`'s result is the image's bytes."""

    def __init__(self, image_format: ImageFormat, pool: ProcessPoolExecutor | None) -> None:
        self._format, self._pool = image_format, pool

    def submit(self, image: Pixels) -> "Future[bytes]":
        if self._pool:
            return self._pool.submit(encode, image, self._format)
        done: Future[bytes] = Future()
        done.set_result(encode(image, self._format))
        return done


@contextmanager
def encoder(image_format: ImageFormat, resolution: int) -> Iterator[Encoder]:
    """An encoder for images of this many pixels per side; large ones go to worker processes, with the same bytes."""
    if resolution < LARGE:
        yield Encoder(image_format, None)
        return
    # "spawn": a fork would copy locks that torch's threads may hold
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=spawn, initializer=end_with_parent) as pool:
        yield Encoder(image_format, pool)


def encode(image: Pixels, image_format: ImageFormat) -> bytes:
    """uint8 [height, width, 3] -> bytes; equal pixels give equal bytes. PNG loses nothing."""
    match image_format:
        case "png":
            return encode_png(image)
        case "jpeg":
            return _encode(image, "JPEG", quality=95, subsampling=0)
        case "webp":
            return _encode(image, "WEBP", quality=95, method=4)


def _encode(image: Pixels, name: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=name, **options)
    return buffer.getvalue()


def end_with_parent() -> None:
    """For a worker process: if its parent was killed it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
