import io
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image, ImageOps

from dspo.data.files import read_json, write_json
from dspo.data.images import decode_image, encode_png, read_shards, read_table, table_writer, write_table
from dspo.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def test_png_is_exact_and_deterministic():
    assert encode_png(IMAGE) == encode_png(IMAGE.copy())
    assert np.array_equal(decode_image(encode_png(IMAGE), "here"), IMAGE)


def saved(image, codec, **options):
    file = io.BytesIO()
    image.save(file, codec, **options)
    return file.getvalue()


@pytest.mark.parametrize("codec", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(codec, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.fromarray(IMAGE), codec, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, "here"), np.asarray(expected))


def test_an_odd_tag_beside_the_orientation_costs_nothing():
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "maker", 6
    odd = exif.tobytes().replace(b"\x01\x0f", b"\x01\x29")  # a text as the page number
    data = saved(Image.fromarray(IMAGE), "PNG", exif=odd)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, "here"), np.rot90(IMAGE, -1))


def test_what_is_transparent_is_on_white():
    coloured = Image.fromarray(np.concatenate([IMAGE, np.full((8, 6, 1), 255, np.uint8)], axis=2))
    coloured.putpixel((0, 0), (255, 0, 0, 0))
    indexed = Image.fromarray(np.zeros((8, 6), np.uint8), "P")
    indexed.putpalette([255, 0, 0])
    seen = decode_image(saved(coloured, "PNG"), "here")
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(seen[1:], IMAGE[1:])
    assert (decode_image(saved(indexed, "PNG", transparency=0), "here") == 255).all()


@pytest.mark.parametrize(
    ("pixels", "codec"), [(np.full((8, 6), 30000, np.uint16), "PNG"), (np.ones((8, 6), np.float32), "TIFF")]
)
def test_a_single_channel_of_more_than_8_bits_is_refused(pixels, codec):
    with pytest.raises(UserError, match=r"here: the image does not decode \(more than 8 bits per channel"):
        decode_image(saved(Image.fromarray(pixels), codec), "here")


def test_a_damaged_image_of_any_codec_is_one_error():
    for codec in ("PNG", "JPEG", "WEBP", "AVIF"):
        whole = io.BytesIO()
        Image.fromarray(IMAGE).save(whole, codec)
        damaged = whole.getvalue()[: len(whole.getvalue()) // 2]
        with pytest.raises(UserError, match="here: the image does not decode"):
            decode_image(damaged, "here")


def test_table_bytes_depend_on_the_rows_alone(tmp_path):
    table = pa.table({"id": ["a", "b", "c"], "image": [b"1", b"2", b"3"]})
    write_table(table, tmp_path / "one.parquet")
    described = table.replace_schema_metadata({"pandas": "when and where it was made"})
    write_table(pa.concat_tables([described[:1], described[1:]]), tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert read_table(tmp_path / "two.parquet").equals(table)
    assert read_table(tmp_path / "two.parquet", ["image"]).column_names == ["image"]


def test_shards_come_in_the_order_of_their_names(tmp_path):
    for name in ("00001", "00000"):
        write_table(pa.table({"x": [name]}), tmp_path / f"{name}.parquet")
    assert read_shards(tmp_path)["x"].to_pylist() == ["00000", "00001"]


def test_a_table_in_parts_is_not_there_before_its_end(tmp_path):
    path, part = tmp_path / "t.parquet", pa.table({"x": [1]})
    with pytest.raises(KeyboardInterrupt), table_writer(path, part.schema) as write:
        write(part)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with table_writer(path, part.schema) as write:
        write(part)
        write(part)
        assert not path.exists()
    assert pq.read_table(path)["x"].to_pylist() == [1, 1]


def test_json_is_canonical(tmp_path):
    write_json({"b": 1, "a": "ü"}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == '{\n  "a": "ü",\n  "b": 1\n}\n'
    assert read_json(tmp_path / "x.json") == {"b": 1, "a": "ü"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(float("nan"), tmp_path / "y.json")
    assert not (tmp_path / "y.json").exists()


def test_missing_column_names_what_is_there(tmp_path):
    write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: no column y; the file has x"):
        read_table(tmp_path / "t.parquet", ["y"])
