import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from dspo.data.files import read_json, write_json
from dspo.data.images import decode_image, encode_png, read_shards, read_table, table_writer, write_table
from dspo.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def test_png_is_exact_and_deterministic():
    assert encode_png(IMAGE) == encode_png(IMAGE.copy())
    assert np.array_equal(decode_image(encode_png(IMAGE), "here"), IMAGE)


def test_images_are_read_as_people_see_them():
    turned, grey = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by whoever shows it
    Image.fromarray(IMAGE).save(turned, "PNG", exif=exif)
    assert np.array_equal(decode_image(turned.getvalue(), "here"), np.rot90(IMAGE, -1))
    Image.fromarray(np.full((8, 6), 30000, np.uint16)).save(grey, "PNG")
    with pytest.raises(UserError, match=r"here: the image does not decode \(16 bits per channel"):
        decode_image(grey.getvalue(), "here")


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
