"""Small rating sets in the layouts in which the public ones are published, written by what publishes them."""

import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image


def picture(value, codec="PNG"):
    """Bytes of a 6 x 4 picture; equal values give equal bytes, and others others."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, codec, lossless=True)
    return buffer.getvalue()


def worked_example(heading, folder):
    """Run the commands below a heading of docs/data.md, as they stand there, in a folder."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    section = page[page.index(f"# {heading}\n") :]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "DSPO_DEVICE": "cpu",
    }
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pickapic(path, rows):
    """Rows of (caption, value, value, label_0), with all of the set's columns, by pandas as the hub writes them."""
    frame = [
        {
            "are_different": True,
            "best_image_uid": f"uid-{first if label else second}",
            "caption": caption,
            "created_at": pd.Timestamp("2023-04-23 17:29:41"),
            "has_label": True,
            "image_0_uid": f"uid-{first}",
            "image_0_url": f"https://example.org/{first}.png",
            "image_1_uid": f"uid-{second}",
            "image_1_url": f"https://example.org/{second}.png",
            "jpg_0": picture(first, "JPEG"),
            "jpg_1": picture(second, "JPEG"),
            "label_0": label,
            "label_1": 1 - label,
            "model_0": "a",
            "model_1": "b",
            "ranking_id": number,
            "user_id": 7,
            "num_example_per_prompt": 1,
            "__index_level_0__": number,
        }
        for number, (caption, first, second, label) in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(frame).to_parquet(path)
    return path


def hpdv2(folder, train=(), test=()):
    """train: (prompt, value, value, [1, 0]); test: (prompt, values, averaged ranks)."""
    rows = []
    for prompt, first, second, preferred in train:
        for value in (first, second):
            put(folder / "train" / f"{value:08}.jpg", picture(value, "JPEG"))
        names = [f"{first:08}.jpg", f"{second:08}.jpg"]
        rows.append({"prompt": prompt, "file_path": names, "human_preference": preferred, "user_hash": "1a"})
    (folder / "train.json").write_text(json.dumps(rows))
    rows = []
    for prompt, values, ranks in test:
        for value in values:
            put(folder / "test" / f"{value:05}.jpg", picture(value, "JPEG"))
        raw = [{"rank": ranks, "user_hash": str(rater)} for rater in range(10)]
        names = [f"{value:05}.jpg" for value in values]
        rows.append({"prompt": prompt, "image_path": names, "rank": ranks, "raw_annotations": raw})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def hpdv3(folder, rows):
    """Rows of (prompt, preferred value, other value, choice_dist)."""
    table = []
    for prompt, first, second, counts in rows:
        for value in (first, second):
            put(folder / "images" / f"{value}.jpg", picture(value, "JPEG"))
        table.append(
            {
                "prompt": prompt,
                "path1": f"images/{first}.jpg",
                "path2": f"images/{second}.jpg",
                "confidence": max(counts) / sum(counts) if counts else None,
                "choice_dist": counts,
                "model1": "flux",
                "model2": "kolors",
            }
        )
    (folder / "train.json").write_text(json.dumps(table, indent=4, ensure_ascii=False))
    return folder


def imagerewarddb(folder, rows, zipped=True):
    """Rows of (prompt_id, prompt, value, rank, overall, alignment, fidelity): parquet and the zip of webp images."""
    frame = [
        {
            "image_path": f"images/train/train_1/{value}.webp",
            "prompt_id": prompt_id,
            "prompt": prompt,
            "classification": "Outdoor Scenes",
            "image_amount_in_total": 3,
            "rank": rank,
            "overall_rating": overall,
            "image_text_alignment_rating": alignment,
            "fidelity_rating": fidelity,
        }
        for prompt_id, prompt, value, rank, overall, alignment, fidelity in rows
    ]
    small = ("image_amount_in_total", "rank", "overall_rating", "image_text_alignment_rating", "fidelity_rating")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(frame).astype(dict.fromkeys(small, "int8")).to_parquet(folder / "metadata-train.parquet")
    images = {row["image_path"]: picture(value[2], "WEBP") for row, value in zip(frame, rows, strict=True)}
    if not zipped:
        for name, data in images.items():
            put(folder / name, data)
        return folder
    (folder / "images/train").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images/train/train_1.zip", "w") as archive:
        for name, data in images.items():
            archive.writestr(name.rsplit("/", 1)[1], data)
    return folder


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def example_class():
    """tf.train.Example as Google's own protobuf library builds it from the published field numbers."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    repeated, optional = kind.LABEL_REPEATED, kind.LABEL_OPTIONAL

    def message(parent, name, *fields):
        made = parent.add(name=name)
        for number, (field, label, value) in enumerate(fields, start=1):
            known = {"type": value} if isinstance(value, int) else {"type": kind.TYPE_MESSAGE, "type_name": value}
            made.field.add(name=field, number=number, label=label, **known)
        return made

    message(file.message_type, "BytesList", ("value", repeated, kind.TYPE_BYTES))
    message(file.message_type, "FloatList", ("value", repeated, kind.TYPE_FLOAT))
    message(file.message_type, "Int64List", ("value", repeated, kind.TYPE_INT64))
    feature = message(
        file.message_type,
        "Feature",
        ("bytes_list", optional, ".t.BytesList"),
        ("float_list", optional, ".t.FloatList"),
        ("int64_list", optional, ".t.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(file.message_type, "Features", ("feature", repeated, ".t.Features.FeatureEntry"))
    entry = message(
        features.nested_type, "FeatureEntry", ("key", optional, kind.TYPE_STRING), ("value", optional, ".t.Feature")
    )
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", optional, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def slow_crc32c(data):
    """Bit by bit, as RFC 3720 defines it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def tfrecord(path, messages):
    """Records by hand."""

    def masked(data):
        crc = slow_crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    lengths = [struct.pack("<Q", len(message)) for message in messages]
    pairs = zip(lengths, messages, strict=True)
    return put(path, b"".join(length + masked(length) + m + masked(m) for length, m in pairs))


def richhf(path, rows):
    """Rows of (uid, overall, alignment, aesthetics, artifact)."""
    Example, messages = example_class(), []
    for uid, overall, alignment, aesthetics, artifact in rows:
        example = Example()
        scores = {
            "overall_score": overall,
            "misalignment_score": alignment,
            "aesthetics_score": aesthetics,
            "artifact_score": artifact,
        }
        for name, value in scores.items():
            example.features.feature[name].float_list.value.append(value)
        texts = {
            "filename": f"train/{uid}.png".encode(),
            "prompt_misalignment_label": b"1 1 0",
            "artifact_map": bytes(700),
            "misalignment_map": bytes(range(256)) * 5,
        }
        for name, value in texts.items():
            example.features.feature[name].bytes_list.value.append(value)
        messages.append(example.SerializeToString())
    return tfrecord(path, messages)
