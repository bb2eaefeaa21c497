"""The bench at a tiny size: files, keys, rows, and figures that come from the rows. No clock is judged."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from dspo.diffusion.compiled import compile_blocks
from dspo.estimate import META, fused_attention
from dspo.params import TrainParams
from dspo.preference.method import prepare

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

KEYS = (
    "device", "dora_vs_lora_time", "dora_vs_lora_memory", "step_vs_stock", "matrix_rate_share", "peak_memory_gb",
    "pairs_per_second", "rows",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m bench` writes, without the start of another Python."""
    output, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", "--size", "tiny", "--rounds", "2", "--output", str(output)])
        runpy.run_module("bench", run_name="__main__")
    torch.set_num_threads(threads)
    return output


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def only(found: dict[str, Any], group: str, **labels: Any) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["group"] == group and all(row[k] == v for k, v in labels.items())]


def test_files_and_keys(folder: Path, found: dict[str, Any]) -> None:
    assert all(found[key] is not None for key in KEYS)
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (table,) = folder.glob("*.md")
    assert table.read_text().count("\n| ") > len(found["rows"])


def test_every_comparison_has_its_rows(found: dict[str, Any]) -> None:
    adapters = {"lora", "lora, peft", "dora, peft", "dora, ours"}
    for checkpointing in (False, True):
        assert {row["variant"] for row in only(found, "adapter", checkpointing=checkpointing)} == adapters
    assert {row["variant"] for row in only(found, "recipe")} == {
        "stock, disable_adapter", "stock, second UNet", "ours", "ours, loss dspo"
    }  # fmt: skip
    assert [row["pairs"] for row in only(found, "batch")] == [1, 2]
    assert [row["rank"] for row in only(found, "rank")] == [2, 4]
    assert [row["resolution"] for row in only(found, "resolution")] == [32, 64]
    assert {row["variant"] for row in only(found, "images")} == {"pipeline, one by one", "ours, together", "scoring"}
    assert all(row["flops"] > 0 and row["memory_gb"] > 0 for row in found["rows"])


def test_figures_come_from_the_rows(found: dict[str, Any]) -> None:
    def seconds(group: str, **labels: Any) -> list[float]:
        return [median(row["seconds"]) for row in only(found, group, **labels)]

    def memory(**labels: Any) -> list[float]:
        return [row["memory_gb"] for row in only(found, "adapter", checkpointing=True, **labels)]

    (ours,) = seconds("adapter", variant="dora, ours", checkpointing=False)
    loras = [seconds("adapter", variant=name, checkpointing=False)[0] for name in ("lora", "lora, peft")]
    assert found["dora_vs_lora_time"] == pytest.approx(ours / min(loras))
    leanest = min(memory(variant="lora") + memory(variant="lora, peft"))
    assert found["dora_vs_lora_memory"] == pytest.approx(memory(variant="dora, ours")[0] / leanest)
    stock = seconds("recipe", variant="stock, disable_adapter") + seconds("recipe", variant="stock, second UNet")
    fast = min(seconds("recipe", variant="ours"))
    assert found["step_vs_stock"] == pytest.approx(min(stock) / fast)
    assert found["pairs_per_second"] == pytest.approx(4 / fast)
    assert found["peak_memory_gb"] == memory(variant="dora, ours")[0]
    (needed,) = {row["flops"] for row in only(found, "adapter", variant="lora", checkpointing=False)}
    product = only(found, "matrix")[0]
    rate = product["flops"] / median(product["seconds"])
    assert found["matrix_rate_share"] == pytest.approx(needed / ours / rate)


def test_flops_say_what_each_way_computes(found: dict[str, Any]) -> None:
    """peft's DoRA multiplies by the base weights twice; the stock recipe also encodes; checkpointing recomputes."""
    flops = {
        (row["variant"], row["checkpointing"]): row["flops"] / row["pairs"]
        for row in only(found, "adapter") + only(found, "recipe", checkpointing=False)
    }
    assert flops["dora, ours", False] < 1.01 * flops["lora", False]
    assert flops["dora, peft", False] > 1.1 * flops["lora", False]
    assert flops["stock, disable_adapter", False] > flops["dora, peft", False]
    assert flops["ours, loss dspo", False] < flops["ours", False]
    assert flops["lora", True] > 1.1 * flops["lora", False]


def test_memory_knows_the_second_unet(found: dict[str, Any]) -> None:
    from bench.models import SIZES, build_pipeline  # from the repository's root

    unet = build_pipeline(SIZES["tiny"], torch.device("cpu")).unet
    weights = sum(p.numel() * p.element_size() for p in unet.parameters()) / 1e9
    (toggled,) = only(found, "recipe", variant="stock, disable_adapter", checkpointing=False)
    (second,) = only(found, "recipe", variant="stock, second UNet", checkpointing=False)
    assert second["memory_gb"] - toggled["memory_gb"] == pytest.approx(weights, rel=0.05)


def test_a_row_that_did_not_fit_leaves_its_figure_open() -> None:
    from bench.report import figures, table, training_line

    labels = {"group": "adapter", "pairs": 4, "micro_batch": 2, "rank": 2, "resolution": 64, "checkpointing": False}
    fits = labels | {"flops": 10, "memory_gb": 1.0}
    rows = [
        {"group": "matrix", "variant": "product", "flops": 10, "memory_gb": 1.0, "seconds": [1.0, 2.0, 4.0]},
        fits | {"variant": "lora", "seconds": [2.0, 4.0, 6.0]},
        fits | {"variant": "dora, ours", "seconds": [3.0, 5.0, 6.0]},
        labels | {"variant": "dora, peft", "out_of_memory": True},
    ]
    found = figures(rows)
    assert found["dora_vs_lora_time"] == 5 / 4
    assert found["spread"]["dora_vs_lora_time"] == (1.0, 1.5)
    assert found["peft_dora_vs_lora_time"] is None
    assert found["step_vs_stock"] is None
    assert figures([row for row in rows if row["variant"] != "lora"])["matrix_rate_share"] is None
    lines = table({"device": "d", "size": "tiny", "dtype": "float32"}, found, rows, "d.png").splitlines()
    titles = next(line for line in lines if "GB a pair of the batch" in line)
    assert any("out of memory" in line for line in lines)
    assert {training_line(row).count("|") for row in rows[1:]} == {titles.count("|")}
    assert "| 1 | 0.5 |" in training_line(rows[1])  # two pairs in a batch


def test_the_dtype_of_a_gpu_runs_every_step() -> None:
    """bfloat16 takes the casts and the autocast that float32 does not."""
    from bench import groups
    from bench.models import SIZES, build_pipeline

    size = replace(SIZES["tiny"], dtype=torch.bfloat16, recipe_settings=((4, True),))
    pipe = build_pipeline(size, torch.device("cpu"))
    rows = [*groups.adapters(pipe, size, rounds=1), *groups.recipes(pipe, size, rounds=1)]
    assert pipe.unet.dtype == torch.bfloat16
    assert all(len(row["seconds"]) == 1 for row in rows)


def test_what_a_gpu_compiles_is_compiled_once_and_leaves_the_pipeline_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import groups, steps
    from bench.measure import Case, measure
    from bench.models import SIZES, build_pipeline

    def prepare_as_on_a_gpu(unet: UNet2DConditionModel, params: TrainParams, latent_sizes: int) -> None:
        prepare(unet, params, latent_sizes)
        unet.to(memory_format=torch.channels_last)
        compile_blocks(unet, latent_sizes)

    counted = torch._dynamo.utils.counters
    compiled: list[int] = []

    def peak_of_a_compiled_run(run: Callable[[], object], _device: torch.device) -> int:
        compiled.append(counted["stats"]["unique_graphs"])
        run()
        compiled.append(counted["stats"]["unique_graphs"])
        return 0

    torch._dynamo.reset()
    counted.clear()
    eager = partialmethod(UNet2DConditionModel.compile_repeated_blocks, backend="eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", eager)
    monkeypatch.setattr(steps, "prepare", prepare_as_on_a_gpu)
    monkeypatch.setattr("bench.measure.peak_bytes", peak_of_a_compiled_run)
    size = replace(SIZES["tiny"], dtype=torch.bfloat16)
    pipe = build_pipeline(size, torch.device("cpu"))
    before = [(p.data_ptr(), p.stride()) for p in pipe.unet.parameters()]
    params = groups.settings(size, micro_batch=2, pairs=2, checkpointing=True)
    cases = []
    for put in (steps.our_dora, steps.plain_lora):
        ours = steps.Ours(pipe, params, size.resolution, put)
        cases.append(Case({}, ours.step, ours.tensors))
    rows = measure(cases, rounds=2, device=torch.device("cpu"))

    assert all(row["flops"] > 0 and len(row["seconds"]) == 2 for row in rows)
    assert compiled[0] == 0  # FLOPs are counted before anything is compiled
    assert compiled[0] < compiled[1] == compiled[2] < compiled[3]
    assert counted["stats"]["unique_graphs"] == compiled[3]
    assert [(p.data_ptr(), p.stride()) for p in pipe.unet.parameters()] == before


@torch.no_grad()
def flops(run: Callable[[], object]) -> int:
    from bench.measure import Flops

    with fused_attention(), Flops() as counted:
        run()
    return counted.total


@pytest.mark.parametrize(("name", "column"), [("full", 0), ("small", 1)])
def test_the_documents_table_of_sizes(name: str, column: int) -> None:
    """Of the real networks on the meta device: one image's forward pass, and what the stock recipe encodes."""
    from bench.models import SIZES
    from tools.random_sdxl import builders

    side = SIZES[name].resolution
    with META:
        parts = {part: build().eval() for part, build in builders(name).items()}
        unet, config = parts["unet"], parts["unet"].config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        noisy, t = torch.empty(1, 4, side // 8, side // 8), torch.empty(1)
        text, ids = torch.empty(1, 77, config.cross_attention_dim), torch.zeros(1, 77, dtype=torch.int64)
        image = torch.empty(1, 3, side, side)
    forward = flops(lambda: unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added))
    encoded = flops(lambda: parts["vae"].encode(image))
    read = sum(flops(lambda part=part: parts[part](ids)) for part in ("text_encoder", "text_encoder_2"))
    counted = {
        "UNet forward, one image": f"{forward / 1e9:,.{0 if forward > 1e12 else 2}f} G",
        "VAE encoding, against it": f"{encoded / forward:.2f}",
        "text encoders, against it": f"{read / forward:.2g}",
        "parameters of the UNet": f"{sum(p.numel() for p in unet.parameters()) / 1e6:,.0f} M",
    }
    lines = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8").splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert {row[0]: row[1 + column] for row in rows if row[0] in counted} == counted
