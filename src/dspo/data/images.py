"""Images as bytes, and tables of them as parquet."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dspo.data.files import COMES_FROM, whole_file
from dspo.errors import UserError

Pixels = NDArray[np.uint8]

ROWS_PER_GROUP = 128

Turn = Image.Transpose
TURNS: dict[object, Image.Transpose] = {  # by EXIF orientation
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}


def encode_png(image: Pixels) -> bytes:
    """uint8 [height, width, 3] -> PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_image(data: bytes, where: str) -> Pixels:
    """Bytes of any codec -> uint8 RGB [height, width, 3], turned as its EXIF orientation says, on white where it is
    transparent.

    Raises :class:`UserError` that begins with ``where``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":  # Pillow would cut off what is brighter than 255
                raise ValueError("more than 8 bits per channel; save it with 8")
            image.load()  # of TIFF this turns the image, and forgets the orientation
            # Not by ImageOps.exif_transpose: it writes all of EXIF anew, and fails where any other tag is odd.
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            turned = image if turn is None else image.transpose(turn)
            if image.has_transparency_data:
                white = Image.new("RGBA", turned.size, "white")
                turned = Image.alpha_composite(white, turned.convert("RGBA"))
            return np.asarray(turned.convert("RGB"))
    except (OSError, RuntimeError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{where}: the image does not decode ({why}). Replace or remove it, then run again.") from None


def write_table(table: pa.Table, path: Path) -> None:
    """Canonical parquet: equal rows give equal bytes, and the file appears whole or not at all.

    Raises :class:`UserError` if the disk is full.
    """
    with table_writer(path, table.schema) as write:
        write(table)


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """As :func:`write_table`, for a table that comes in parts: yields the function that appends a part."""
    plain = schema.remove_metadata()
    with whole_file(path) as partial:
        # No statistics: the least and greatest image would stand in the footer.
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(partial, plain, **options) as writer:
            yield lambda part: writer.write_table(part.replace_schema_metadata(None), row_group_size=ROWS_PER_GROUP)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one parquet file. Raises :class:`UserError` if it is missing, damaged or lacks a column."""
    with open_parquet(path, columns or ()) as file:
        return file.read(columns=None if columns is None else list(columns))


@contextmanager
def open_parquet(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """Open a parquet file that has these columns; errors of reading it inside the block are as :func:`read_table`'s."""
    try:
        # Pre-buffering would keep every row group that was read until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            present = file.schema_arrow.names
            missing = [name for name in columns if name not in present]
            if missing:
                raise UserError(f"{path}: no column {', '.join(missing)}; the file has {', '.join(present)}")
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {COMES_FROM}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a whole parquet file ({error}). It was cut short or is of another format: "
            "make it again, or fetch it again with `dvc pull`."
        ) from None


def read_shards(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All parquet files of a folder in the order of their names, as one table. Errors as :func:`read_table`."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise UserError(f"{folder}: no parquet files here. {COMES_FROM}")
    return pa.concat_tables([read_table(shard, columns) for shard in shards])
