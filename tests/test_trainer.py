"""The training loop: exact resume, independence of how batches are cut, controls, selection, and the stage."""

import csv
import json
import math
import pickle
import shutil
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from disk import Killed
from safetensors.torch import save_file
from tiny import TEXT_WIDTH, TOKENS, save_tiny_pipeline, tiny_pipeline
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from dspo.data.images import read_table, write_table
from dspo.data.records import PAIRS
from dspo.diffusion import compiled as compiled_module
from dspo.diffusion.base import encode_prompts, load_pipeline
from dspo.diffusion.compiled import Decompositions, compile_blocks
from dspo.errors import UserError
from dspo.params import LossName, TrainParams, load_params
from dspo.preference import trainer
from dspo.preference.checkpoint import load_checkpoint
from dspo.preference.dataset import (
    Batch,
    Draw,
    Pairs,
    epoch_order,
    held_out_draws,
    load_pairs,
    make_batch,
    rows_of,
    training_draw,
    with_random_labels,
)
from dspo.preference.dora import Adapter, add_dora
from dspo.preference.losses import NEEDS, Needs
from dspo.preference.method import Method, References, predict, predict_reference, prepare
from dspo.preference.schedule import NoiseSchedule
from dspo.preference.trainer import CHECKPOINT, LOG, Trained, micro_batches, train

CPU = torch.device("cpu")


def params(**changes: object) -> TrainParams:
    small = {
        "rank": 2,
        "alpha": 2,
        "dropout": 0.1,
        "lr": 1e-3,
        "epochs": 2,
        "batch_size": 3,
        "warmup_steps": 2,
        "checkpoint_every_steps": 2,
        "beta": 30.0,
        "ema_decay": None,
    }
    return load_params(Path("params.yaml")).worlds["shapes"].train.model_copy(update={**small, **changes})


def make_pairs(n: int, seed: int = 0) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    winner = torch.randn(n, 4, 4, 4, generator=g)
    return Pairs(
        ids=[f"pair{seed}-{i}" for i in range(n)],
        latents_w=(0.8 * winner + 0.5).half(),
        latents_l=(0.8 * torch.randn(n, 4, 4, 4, generator=g) - 0.5).half(),
        weight=torch.linspace(0.5, 1.5, n),
        delta=torch.rand(n, generator=g),
        size=torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(n, 1),
        text_row=torch.arange(n) % 2,
        embeds=torch.randn(3, TOKENS, 2 * TEXT_WIDTH, generator=g),
        pooled=torch.randn(3, TEXT_WIDTH, generator=g),
    )


def make_adapter(p: TrainParams, prediction_type: str = "epsilon") -> tuple[Adapter, NoiseSchedule]:
    pipe = tiny_pipeline(prediction_type=prediction_type)
    return add_dora(pipe.unet, p, seed=0), NoiseSchedule.of(pipe.scheduler, CPU)


def run(p: TrainParams, folder: Path, n: int = 7, **keywords: object) -> Trained:
    adapter, schedule = make_adapter(p)
    return train(adapter, schedule, make_pairs(n), make_pairs(2, seed=1), p, 0, folder, **keywords)


def same(a: Trained, b: Trained) -> bool:
    return all(torch.equal(a.adapter[name], b.adapter[name]) for name in a.adapter) and a == replace(
        b, adapter=a.adapter
    )


def test_few_of_many_held_out_pairs_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = params(epochs=1)
    adapter, schedule = make_adapter(p)
    many = make_pairs(9, seed=1)
    monkeypatch.setattr("dspo.preference.trainer.WATCHED", 3)
    watched = sorted(epoch_order(many, 0, 0)[:3])
    trained = train(adapter, schedule, make_pairs(3), many, p, 0, tmp_path / "many")
    adapter, schedule = make_adapter(p)
    assert same(train(adapter, schedule, make_pairs(3), rows_of(many, watched), p, 0, tmp_path / "few"), trained)


# Calls of the clipping, one per step: before the first checkpoint, between two, in the first step of an epoch.
@pytest.mark.parametrize(("ema_decay", "at_call"), [(None, 2), (0.9, 6), (None, 9)])
def test_killed_and_resumed_is_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float | None, at_call: int
) -> None:
    p = params(ema_decay=ema_decay, batch_size=2, gradient_accumulation_steps=1, epochs=3)

    def reward_check(unet: torch.nn.Module) -> float:
        return sum(w.double().sum().item() for name, w in unet.named_parameters() if "lora_B" in name)

    whole = run(p, tmp_path / "whole", reward_check=reward_check)
    assert whole.steps == 12
    assert len(whole.epochs) == 4

    calls = 0
    clip = torch.nn.utils.clip_grad_norm_

    def clip_then_die(*args: object, **keywords: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise Killed
        return clip(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_then_die)
        with pytest.raises(Killed):
            run(p, tmp_path / "killed", reward_check=reward_check)
    resumed = run(p, tmp_path / "killed", reward_check=reward_check)
    assert same(resumed, whole)
    for name in (LOG, CHECKPOINT):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_finished_run_called_again_does_nothing_new(tmp_path: Path) -> None:
    first = run(params(), tmp_path)
    assert same(run(params(), tmp_path), first)


@pytest.mark.parametrize("loss", ["dspo", "dpo", "mapo", "sft"])
def test_cutting_the_batch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: LossName) -> None:
    refreshed = []
    refresh = Adapter.refresh
    monkeypatch.setattr(Adapter, "refresh", lambda self: refreshed.append(0) or refresh(self))
    cuts = [(6, 1), (3, 2), (2, 3), (1, 6)]
    results = []
    for batch_size, accumulation in cuts:
        p = params(loss=loss, batch_size=batch_size, gradient_accumulation_steps=accumulation, dropout=0.0, epochs=1)
        # 8 pairs: the epoch's last step has 2.
        refreshed.clear()
        results.append(run(p, tmp_path / f"{batch_size}", n=8))
        assert len(refreshed) == 2 + 1  # after each optimizer step, and with the best epoch's parameters at the end
    for other in results[1:]:
        assert other.steps == results[0].steps == 2
        for row, expected in zip(other.log, results[0].log, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
            if NEEDS[loss].reference:
                assert row["u_std"] == pytest.approx(expected["u_std"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("loss", [loss for loss, needs in NEEDS.items() if needs.reference])
def test_untrained_policy_is_the_reference_whatever_the_batch(loss: LossName, n: int) -> None:
    """On the shipped base, where the last bits depend on how many images a pass has."""
    pipe = load_pipeline(load_params(Path("params.yaml")).worlds["shapes"].base, CPU)
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, n, 4, 8, 8, generator=g).half()
    text = list(encode_prompts(pipe, ["a red circle", "a blue square"]))
    embeds, pooled = torch.stack([one.embeds for one in text]), torch.stack([one.pooled for one in text])
    pairs = replace(make_pairs(n), latents_w=latents[0], latents_l=latents[1], embeds=embeds, pooled=pooled)
    p = params(loss=loss)
    method = Method(add_dora(pipe.unet, p, seed=0), NoiseSchedule.of(pipe.scheduler, CPU), p, False)
    predicted = predict(method.adapter, method.batch(pairs, [Draw(i, 400, i) for i in range(n)]), method.needs)
    assert predicted.r_w is not None and torch.equal(predicted.e_w, predicted.r_w)
    assert predicted.e_l is not None and predicted.r_l is not None and torch.equal(predicted.e_l, predicted.r_l)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, share: float) -> None:
    plain = run(params(), tmp_path / "plain")
    checkpointed = run(params(gradient_checkpointing=share), tmp_path / "checkpointed")
    for a, b in zip(plain.log, checkpointed.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


AROUND = ("proj_in.base_layer", "proj_out.base_layer")  # of transformer blocks; diffusers leaves these layers out


def test_share_of_checkpointed_blocks_is_what_runs_twice() -> None:
    def recomputed(share: float | None) -> list[str]:
        p = params(gradient_checkpointing=share or 0.0, loss="sft")
        adapter, schedule = make_adapter(p)
        if share is None:
            adapter.unet.enable_gradient_checkpointing()  # all, by diffusers itself
        prepare(adapter.unet, p, 1)
        passes = []
        for name, block in adapter.unet.named_modules():
            if isinstance(block, BasicTransformerBlock | ResnetBlock2D) or name.endswith(AROUND):
                block.register_forward_pre_hook(lambda _module, _args, name=name: passes.append(name))
        method = Method(adapter, schedule, p, False)
        losses, _ = method.losses(method.batch(make_pairs(2), [Draw(0, 1, 0), Draw(1, 900, 1)]), method.needs)
        losses.sum().backward()
        return sorted(name for name in set(passes) if passes.count(name) == 2)

    blocks = recomputed(None)  # but the first, which have nothing to train before them
    modules = make_adapter(params())[0].unet.named_modules()
    every = sorted(blocks + [name for name, _ in modules if name.endswith(AROUND)])
    assert recomputed(0.0) == []
    assert recomputed(1.0) == every
    assert len(every) / 4 < len(recomputed(0.5)) < len(every)
    assert set(recomputed(0.5)) < set(every)


class ScalarReads(TorchDispatchMode):
    """Counts what would make a GPU's host wait: `item`, `bool` and the like of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: object, _types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fixed_draws", [None, 1])
def test_nothing_is_read_from_the_device_within_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed_draws: int | None
) -> None:
    at: list[int] = []
    reads = ScalarReads()
    copies = 0

    def marked(name: str) -> None:
        original = getattr(trainer, name)

        def call(*args: object, **keywords: object) -> object:
            at.append(reads.count + copies)
            result = original(*args, **keywords)
            at.append(reads.count + copies)
            return result

        monkeypatch.setattr(trainer, name, call)

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return tensor

    marked("read")
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    p = params(epochs=2, checkpoint_every_steps=4, batch_size=1, loss="dspo_two_sided", fixed_draws=fixed_draws)
    with reads:
        trained = run(p, tmp_path, n=8)
    assert trained.steps == 16
    starts, ends = at[::2], at[1::2]
    assert len(starts) == 4  # after 4, 8, 12 and 16 steps
    assert starts[1] == ends[0]  # nothing in steps 5 to 8
    assert starts[3] == ends[2]
    assert ends[0] > starts[0]  # the counter counts


def test_adamw_is_fused_and_does_not_decay_magnitudes() -> None:
    adapter, _ = make_adapter(params())
    matrices, vectors = trainer.make_optimizer(adapter, params(weight_decay=0.1)).param_groups
    assert matrices["fused"] and vectors["fused"]
    assert matrices["weight_decay"] == 0.1 and {p.ndim for p in matrices["params"]} == {2}
    assert vectors["weight_decay"] == 0 and {p.ndim for p in vectors["params"]} == {1}


def test_eight_bit_optimizer_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="pip install torchao"):
        run(params(optimizer="adamw8bit"), tmp_path)


def test_eight_bit_optimizer_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    large = {"rank": 64, "epochs": 2}  # small tensors keep whole moments
    plain = run(params(**large), tmp_path / "plain")
    trained = run(params(**large, optimizer="adamw8bit"), tmp_path / "whole")
    moments = load_checkpoint(tmp_path / "whole" / CHECKPOINT, plain.adapter).optimizer["state"].values()
    assert any("8bit" in type(one["exp_avg"]).__name__ for one in moments)
    for name, tensor in trained.adapter.items():
        torch.testing.assert_close(tensor, plain.adapter[name], rtol=0, atol=6e-3)  # of at most 6 steps of 1e-3
    assert trained.log[-1]["loss"] == pytest.approx(plain.log[-1]["loss"], rel=1e-2)
    run(params(**large | {"epochs": 1}, optimizer="adamw8bit"), tmp_path / "parts")
    assert same(run(params(**large, optimizer="adamw8bit"), tmp_path / "parts"), trained)


def test_compiled_blocks_train_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: there `train.compile` does it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"loss": "dpo", "epochs": 1, "batch_size": 2, "dropout": 0.0, "gradient_checkpointing": 0.5}
    plain = run(params(**options), tmp_path / "plain", n=6)

    def prepare_compiled(unet: UNet2DConditionModel, p: TrainParams, latent_sizes: int) -> None:
        prepare(unet, p, latent_sizes)
        compile_blocks(unet, latent_sizes)

    monkeypatch.setattr(trainer, "prepare", prepare_compiled)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):  # a user's, or torch's own
        compiled = run(params(**options), tmp_path / "compiled", n=6)
    for a, b in zip(compiled.log, plain.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
    # For all blocks together: the reference, the policy on held-out pairs, the policy with gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_compiled_in_16_bits_the_untrained_policy_is_the_reference() -> None:
    torch._dynamo.reset()
    p = params(loss="dpo", gradient_checkpointing=1.0)
    pipe = tiny_pipeline()
    adapter = add_dora(pipe.unet.to(torch.bfloat16), p, seed=0)
    compile_blocks(adapter.unet, latent_sizes=1)
    adapter.train(True)
    method = Method(adapter, NoiseSchedule.of(pipe.scheduler, CPU), p, False)
    predictions = predict(adapter, method.batch(make_pairs(2), [Draw(0, 1, 0), Draw(1, 900, 1)]), NEEDS["dpo"])
    assert predictions.e_w.requires_grad
    assert torch.equal(predictions.e_w, predictions.r_w)
    assert torch.equal(predictions.e_l, predictions.r_l)


def test_no_layer_norm_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum would be taken in another order with the adapter than without: on a GPU the policy would not start as the
    reference."""
    monkeypatch.setenv("CI", "true")  # where torch takes an operation that it could take apart for an oversight
    torch._dynamo.reset()
    p = params(loss="dpo")
    adapter, schedule = make_adapter(p)
    compile_blocks(adapter.unet, latent_sizes=1)
    method = Method(adapter, schedule, p, False)
    batch = method.batch(make_pairs(2), [Draw(0, 1, 0), Draw(1, 900, 1)])
    _, codes = run_and_get_code(lambda: torch.autograd.backward(method.losses(batch, method.needs)[0].sum()))
    forward = [code for code in codes if "native_layer_norm.default" in code]
    assert len(codes) == 3 and len(forward) == 2  # the reference and the policy; the third is backward


def test_what_stays_whole_is_pickled_by_name() -> None:
    """As part of the key of a compiled graph on disk: what cannot be pickled leaves every graph to be made anew."""
    table = Decompositions()
    assert len(table) > 500 and torch.ops.aten.native_layer_norm.default not in table
    assert pickle.loads(pickle.dumps(table)) == table
    assert len(pickle.dumps(table)) < 200


def test_each_latent_size_has_a_graph_of_its_own_and_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = partialmethod(UNet2DConditionModel.compile_repeated_blocks, backend="eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", eager)
    monkeypatch.setattr(compiled_module, "GRAPHS_PER_LATENT_SIZE", 1)
    adapter, schedule = make_adapter(params())
    method = Method(adapter, schedule, params(), False)

    def predict_at(side: int) -> None:
        latents = torch.zeros(1, 4, side, side, dtype=torch.float16)
        pairs = replace(make_pairs(1), latents_w=latents, latents_l=latents)
        predict_reference(adapter, method.batch(pairs, [Draw(0, 1, 0)]), method.needs)

    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        compile_blocks(adapter.unet, latent_sizes=2)
        for side in (4, 8, 4):
            predict_at(side)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        with pytest.raises(FailOnRecompileLimitHit):
            predict_at(12)


def pairs_of_two_shapes() -> Pairs:
    pairs = make_pairs(7)
    sizes = torch.tensor([[4, 4], [2, 6], [2, 6], [4, 4], [2, 6], [4, 4], [4, 4]])
    inside = torch.arange(16) < sizes.prod(1, keepdim=True)
    g = torch.Generator().manual_seed(5)
    latents = [(torch.randn(7, 4, 16, generator=g).half() * inside[:, None])[:, :, None] for _ in range(2)]
    return replace(pairs, latents_w=latents[0], latents_l=latents[1], latent_sizes=sizes)


def test_batches_hold_latents_of_one_shape(tmp_path: Path) -> None:
    pairs = pairs_of_two_shapes()
    batches = micro_batches(pairs, params(batch_size=2), seed=0, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert sorted(map(len, batches)) == [1, 2, 2, 2]
    assert all(len({pairs.latent_size(row) for row in batch}) == 1 for batch in batches)

    p = params(epochs=2, batch_size=2, gradient_accumulation_steps=3)
    adapter, schedule = make_adapter(p)
    shapes = []
    adapter.unet.register_forward_pre_hook(lambda _module, args: shapes.append(tuple(args[0].shape[2:])))
    trained = train(adapter, schedule, pairs, pairs, p, 0, tmp_path)
    assert trained.steps == 4
    assert set(shapes) == {(4, 4), (2, 6)}


def test_padding_is_never_seen() -> None:
    pairs, schedule = pairs_of_two_shapes(), make_adapter(params())[1]
    batch = make_batch(pairs, [Draw(1, 300, 5), Draw(4, 10, 6)], schedule, torch.float32, CPU)
    wide = [latents[..., :12].reshape(7, 4, 2, 6) for latents in (pairs.latents_w, pairs.latents_l)]
    alone = replace(pairs, latents_w=wide[0], latents_l=wide[1], latent_sizes=None)
    expected = make_batch(alone, [Draw(1, 300, 5), Draw(4, 10, 6)], schedule, torch.float32, CPU)
    assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(expected).values(), strict=True))


@pytest.mark.parametrize("loss", ["dspo_two_sided", "dpo", "dspo"])
def test_cached_reference_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: LossName) -> None:
    p = params(loss=loss, epochs=4, fixed_draws=2, checkpoint_every_steps=1)
    seen = []
    disabled = Adapter.disabled
    monkeypatch.setattr(Adapter, "disabled", lambda self: seen.append(0) or disabled(self))
    cached = run(p, tmp_path / "cached")
    # 3 micro-batches in each of the first 2 epochs of 4, and 3 batches of held-out draws before the training
    assert len(seen) == 2 * 3 + 3

    def always(self: References, _key: object, adapter: Adapter, batch: Batch, needs: Needs) -> torch.Tensor:
        return predict_reference(adapter, batch, needs)

    with monkeypatch.context() as patch:
        patch.setattr(References, "of", always)
        fresh = run(p, tmp_path / "fresh")
    assert same(cached, fresh)
    assert (tmp_path / "cached" / LOG).read_bytes() == (tmp_path / "fresh" / LOG).read_bytes()
    # Resumed in the third epoch, where nothing is cached.
    run(params(loss=loss, epochs=2, fixed_draws=2, checkpoint_every_steps=1), tmp_path / "parts")
    assert same(run(p, tmp_path / "parts"), cached)


def test_cached_reference_in_sixteen_bits_loses_none() -> None:
    p = params(loss="dpo", fixed_draws=1)
    pipe = tiny_pipeline()
    adapter = add_dora(pipe.unet.to(torch.bfloat16), p, seed=0)
    method = Method(adapter, NoiseSchedule.of(pipe.scheduler, CPU), p, False)
    batch = method.batch(make_pairs(2), [Draw(0, 1, 0), Draw(1, 900, 1)])
    references = References()
    first, second = (references.of("key", adapter, batch, method.needs) for _ in range(2))
    assert first.dtype == second.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(method.losses(batch, method.needs, second)[0], method.losses(batch, method.needs)[0])


def test_fixed_draws_come_again(tmp_path: Path) -> None:
    trained = run(params(epochs=4, fixed_draws=2, lr=1e-12, dropout=0.0), tmp_path)
    gaps = [row["u_std"] is not None and row["loss"] for row in trained.log]
    assert gaps[:6] == pytest.approx(gaps[6:], rel=1e-4)
    assert gaps[:3] != pytest.approx(gaps[3:6], rel=1e-2)


@pytest.mark.parametrize("loss", NEEDS)
def test_every_loss_trains(tmp_path: Path, loss: LossName) -> None:
    trained = run(params(loss=loss, epochs=1), tmp_path)
    first, start = trained.log[0], trained.epochs[0]
    assert trained.steps == 3
    assert len(trained.epochs) == 2
    assert trained.best_epoch == 1
    assert start["u_std"] == start["margin"] == 0
    assert start["implicit_accuracy"] == 0.5
    assert trained.epochs[1]["margin"] != 0
    assert (first["u_std"] is not None) == NEEDS[loss].reference
    if loss == "dpo":
        assert start["loss"] == pytest.approx(np.log(2), rel=1e-6)


def test_learning_lowers_the_held_out_loss(tmp_path: Path) -> None:
    strong = params(loss="dpo", beta=1000.0, lr=5e-3, epochs=4, batch_size=4, dropout=0.0)
    trained = run(strong, tmp_path, n=12)
    assert trained.epochs[-1]["loss"] < trained.epochs[0]["loss"] - 0.1
    assert trained.epochs[-1]["implicit_accuracy"] > 0.7


def test_v_prediction_trains(tmp_path: Path) -> None:
    p = params(epochs=1)
    adapter, schedule = make_adapter(p, "v_prediction")
    assert schedule.prediction_type == "v_prediction"
    trained = train(adapter, schedule, make_pairs(6), make_pairs(2, 1), p, 0, tmp_path)
    assert trained.steps == 2


@pytest.mark.parametrize(
    ("loss", "passes"),
    [
        ("sft", [(2, True)]),
        ("mapo", [(4, True)]),
        ("dspo", [(2, False)] * 3 + [(2, True)]),  # the reference of winner and loser, then loser and winner
        ("dpo", [(4, False), (4, True)]),
    ],
)
def test_no_forward_pass_is_wasted(loss: LossName, passes: list[tuple[int, bool]]) -> None:
    """For two pairs: images through the UNet, and whether with a graph. The reference comes while there is none yet."""
    p = params(loss=loss)
    adapter, schedule = make_adapter(p)
    seen = []
    adapter.unet.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    batch = Method(adapter, schedule, p, False).batch(make_pairs(2), [Draw(0, 1, 0), Draw(1, 900, 1)])
    predictions = predict(adapter, batch, NEEDS[loss])
    assert seen == passes
    assert predictions.e_w.requires_grad
    if predictions.e_l is not None:
        assert predictions.e_l.requires_grad == (NEEDS[loss].loser == "gradient")


def test_best_epoch_is_the_one_with_the_highest_reward(tmp_path: Path) -> None:
    rewards = iter([9.0, 0.2, 0.8, 0.8])  # the untrained adapter's is never chosen, the first of equals is
    states = []

    def reward_check(unet: torch.nn.Module) -> float:
        states.append({n: w.detach().clone() for n, w in unet.named_parameters() if "lora_" in n})
        return next(rewards)

    p = params(epochs=3)
    adapter, schedule = make_adapter(p)
    trained = train(adapter, schedule, make_pairs(6), make_pairs(2, 1), p, 0, tmp_path, reward_check)
    assert trained.best_epoch == 2
    assert [row["reward"] for row in trained.epochs] == [9.0, 0.2, 0.8, 0.8]
    for name, tensor in states[2].items():
        assert torch.equal(trained.adapter[name], tensor)
        assert torch.equal(adapter.parameters[name], tensor)


def test_average_is_what_is_checked_and_kept(tmp_path: Path) -> None:
    raw = run(params(epochs=1), tmp_path / "raw")
    averaged = run(params(epochs=1, ema_decay=0.5), tmp_path / "ema")
    assert averaged.log == raw.log
    assert averaged.epochs[1] != raw.epochs[1]
    name = next(name for name in raw.adapter if "lora_B" in name)
    assert averaged.adapter[name].norm() < raw.adapter[name].norm()


def test_warm_up_is_linear_then_constant(tmp_path: Path) -> None:
    trained = run(params(warmup_steps=4), tmp_path)
    assert [row["lr"] for row in trained.log] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_draws_depend_on_the_pair_and_not_on_its_place() -> None:
    pairs = make_pairs(6)
    turned = replace(pairs, ids=pairs.ids[::-1])
    for epoch in (0, 1):
        order = [pairs.ids[row] for row in epoch_order(pairs, 0, epoch)]
        assert order == [turned.ids[row] for row in epoch_order(turned, 0, epoch)]
        for row in range(6):
            a = training_draw(pairs, row, 0, epoch, 1000, 0.5)
            b = training_draw(turned, 5 - row, 0, epoch, 1000, 0.5)
            assert a == replace(b, row=row)
            assert 0 <= a.t < 1000
    assert epoch_order(pairs, 0, 0) != epoch_order(pairs, 0, 1)


def test_winner_and_loser_share_noise_and_timestep() -> None:
    pairs, schedule = make_pairs(3), make_adapter(params())[1]
    pairs = replace(pairs, size=torch.tensor([[80.0, 96, 4, 0, 40, 48]]).repeat(3, 1))
    batch = make_batch(pairs, [Draw(1, 300, 5), Draw(2, 10, 6, drop_prompt=True)], schedule, torch.float32, CPU)
    assert torch.equal(batch.target_w, batch.target_l)
    a = schedule.alphas_cumprod[batch.t].view(-1, 1, 1, 1)
    for noisy, latents in ((batch.noisy_w, pairs.latents_w), (batch.noisy_l, pairs.latents_l)):
        torch.testing.assert_close(noisy, a.sqrt() * latents[1:].float() + (1 - a).sqrt() * batch.target_w)
    assert torch.equal(batch.embeds, torch.stack([pairs.embeds[1], pairs.embeds[-1]]))
    assert torch.equal(batch.pooled, torch.stack([pairs.pooled[1], pairs.pooled[-1]]))
    assert batch.time_ids.tolist() == [[80, 96, 4, 0, 40, 48]] * 2


def test_held_out_draws_cover_the_quartiles() -> None:
    draws = held_out_draws(make_pairs(5), 0, 1000)
    assert [draw.t * 4 // 1000 for draw in draws] == [0, 1, 2, 3] * 5
    assert draws == held_out_draws(make_pairs(5), 0, 1000)
    assert not any(draw.drop_prompt for draw in draws)


def test_random_labels_swap_whole_pairs() -> None:
    pairs = make_pairs(40)
    coin = with_random_labels(pairs, 0)
    swapped = [not torch.equal(a, b) for a, b in zip(coin.latents_w, pairs.latents_w, strict=True)]
    assert 8 < sum(swapped) < 32
    for row, swap in enumerate(swapped):
        source = pairs.latents_l if swap else pairs.latents_w
        assert torch.equal(coin.latents_w[row], source[row])
        assert coin.delta[row] == (-pairs.delta[row] if swap else pairs.delta[row])


def test_a_training_that_is_no_number_any_more_stops(tmp_path: Path) -> None:
    """Seven pairs are three steps. The first one ruins the adapter: the second is no number."""
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 2; lower train\.lr or train\.beta"):
        run(params(lr=1e30, warmup_steps=0, checkpoint_every_steps=3), tmp_path / "steps")
    assert [json.loads(line)["step"] for line in (tmp_path / "steps" / LOG).read_text().splitlines()] == [1]
    assert not (tmp_path / "steps" / CHECKPOINT).exists()
    with pytest.raises(UserError, match=r"the loss on held-out pairs is (nan|inf) at step 1; lower"):  # no second step
        run(params(lr=1e30, warmup_steps=0, epochs=1), tmp_path / "epoch", n=3)
    assert not (tmp_path / "epoch" / CHECKPOINT).exists()
    adapter, schedule = make_adapter(params())
    overflown = replace(make_pairs(2), embeds=torch.full((3, TOKENS, 2 * TEXT_WIDTH), math.nan))
    with pytest.raises(UserError, match=r"the loss on held-out pairs is nan at step 0; set base\.dtype"):
        train(adapter, schedule, make_pairs(2), overflown, params(), 0, tmp_path / "base")


def test_weights_of_zero_are_a_users_mistake(tmp_path: Path) -> None:
    adapter, schedule = make_adapter(params())
    nothing = replace(make_pairs(4), weight=torch.zeros(4))
    with pytest.raises(UserError, match="weight 0"):
        train(adapter, schedule, nothing, make_pairs(2, 1), params(), 0, tmp_path)


def test_checkpoint_of_another_adapter_is_a_users_mistake(tmp_path: Path) -> None:
    run(params(epochs=1), tmp_path)
    with pytest.raises(UserError, match="another model or adapter"):
        run(params(epochs=1, rank=3), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:500])
    with pytest.raises(UserError, match="not a training checkpoint"):
        run(params(epochs=1), tmp_path)


def test_checkpoint_loads_without_running_code(tmp_path: Path) -> None:
    trained = run(params(epochs=1, ema_decay=0.9), tmp_path)
    assert isinstance(torch.load(tmp_path / CHECKPOINT, weights_only=True), dict)
    state = load_checkpoint(tmp_path / CHECKPOINT, trained.adapter)
    assert state.step == trained.steps
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == trained.log


def write_pairs_folder(folder: Path, n: int = 4) -> None:
    """What the stage `score` leaves, of random latents."""
    pairs = make_pairs(n)
    for name, rows in (("train", range(n - 1)), ("validation", range(n - 1, n))):
        columns: dict[str, list[object]] = {field.name: [None] * len(rows) for field in PAIRS}
        columns |= {
            "pair_id": [pairs.ids[i] for i in rows],
            "prompt_id": [f"prompt{i % 2}" for i in rows],
            "weight": [float(pairs.weight[i]) for i in rows],
            "rca_0": [0.8 for _ in rows],
            "rca_1": [0.3 for _ in rows],
            "width": [32 for _ in rows],
            "height": [24 for _ in rows],
            "latent_0": [pairs.latents_w[i].numpy().tobytes() for i in rows],
            "latent_1": [pairs.latents_l[i].numpy().tobytes() for i in rows],
            "latent_shape": [[4, 4, 4] for _ in rows],
        }
        write_table(pa.table(columns, schema=PAIRS), folder / f"{name}.parquet")
    (folder / "text").mkdir()
    for i, name in enumerate(("prompt0", "prompt1", "null")):
        text = {f"{name}.embeds": pairs.embeds[i].clone(), f"{name}.pooled": pairs.pooled[i].clone()}
        save_file(text, folder / "text" / f"{name}.safetensors")


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_pairs_folder(tmp_path)
    pairs, held_out = load_pairs(tmp_path)
    expected = make_pairs(4)
    assert (len(pairs), len(held_out)) == (3, 1)
    assert torch.equal(pairs.latents_w, expected.latents_w[:3])
    assert torch.equal(pairs.latents_l, expected.latents_l[:3])
    assert pairs.size.tolist() == [[24, 32, 0, 0, 24, 32]] * 3
    torch.testing.assert_close(pairs.delta, torch.full((3,), 0.5))
    assert pairs.text_row.tolist() == [0, 1, 0]
    assert torch.equal(torch.stack([*pairs.embeds]), torch.stack([*expected.embeds]))
    assert torch.equal(torch.stack([*pairs.pooled]), torch.stack([*expected.pooled]))


def own_memory() -> int:
    """Bytes of this process that no file holds."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the process's memory")
def test_latents_and_text_stay_on_the_disk(tmp_path: Path) -> None:
    n, side = 512, 64
    columns: dict[str, list[object]] = {field.name: [None] * n for field in PAIRS}
    columns |= {name: [1.0] * n for name in ("weight", "rca_0", "rca_1")}
    columns |= {name: [8 * side] * n for name in ("width", "height")}
    columns |= {"pair_id": [str(i) for i in range(n)], "prompt_id": ["prompt0"] * n}
    columns |= {"latent_shape": [[4, side, side]] * n}
    latent = [np.full(4 * side**2, i, "<f2").tobytes() for i in range(n)]
    columns |= {"latent_0": latent, "latent_1": latent[::-1]}
    write_pairs_folder(tmp_path)
    write_table(pa.table(columns, schema=PAIRS), tmp_path / "train.parquet")
    text = {f"prompt0.{part}": torch.zeros(2**22) for part in ("embeds", "pooled")}
    save_file(text, tmp_path / "text" / "prompt0.safetensors")
    before = own_memory()
    pairs, _ = load_pairs(tmp_path)
    latents, text_bytes = pairs.latents_w.nbytes + pairs.latents_l.nbytes, 2 * 4 * 2**22
    assert own_memory() - before < min(latents, text_bytes) / 2
    assert (pairs.latents_w.flatten(1) == torch.arange(n)[:, None]).all()
    assert (pairs.latents_l.flatten(1) == torch.arange(n).flip(0)[:, None]).all()


def test_bad_pairs_are_a_users_mistake(tmp_path: Path) -> None:
    write_pairs_folder(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "a")
    write_table(pa.table({f.name: [] for f in PAIRS}, schema=PAIRS), tmp_path / "a" / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: no pairs"):
        load_pairs(tmp_path / "a")
    table = read_table(tmp_path / "train.parquet")
    overflown = table["latent_1"].to_pylist()
    overflown[2] = np.full(64, np.inf, np.float16).tobytes()
    column = table.schema.get_field_index("latent_1")
    write_table(
        table.set_column(column, table.schema.field(column), pa.array(overflown, table.schema.field(column).type)),
        tmp_path / "a" / "train.parquet",
    )
    with pytest.raises(UserError, match=r"train\.parquet, row 3: latent_1 holds values that are no numbers.*base\.vae"):
        load_pairs(tmp_path / "a")
    (tmp_path / "text" / "prompt0.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"prompt0\.safetensors: not a whole safetensors"):
        load_pairs(tmp_path)
    (tmp_path / "text" / "prompt0.safetensors").unlink()
    with pytest.raises(UserError, match=r"train\.parquet: no text embedding of prompt prompt0"):
        load_pairs(tmp_path)
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(UserError, match=r"text: no embedding of the empty prompt"):
        load_pairs(tmp_path)


def test_unknown_prediction_type_is_a_users_mistake() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(UserError, match="'sample'"):
        NoiseSchedule.of(pipe.scheduler, CPU)


class FakeScorer:
    heads = ("alignment", "overall")

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def score(self, images: list[np.ndarray], captions: list[str], batch_size: int) -> np.ndarray:
        assert len(images) == len(captions)
        return np.array([[0.0, image.mean() / 255] for image in images], dtype=np.float32)


def test_only_the_unet_is_on_the_device_between_reward_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspo.stages import train as stage

    monkeypatch.setattr(stage, "device", lambda: torch.device("meta"))
    pipe, scorer = tiny_pipeline(), FakeScorer()
    unet = pipe.unet.to("meta")
    check = stage.RewardCheck(pipe, scorer, [], load_params(Path("params.yaml")))
    waiting = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, scorer.model)
    assert {next(part.parameters()).device.type for part in waiting} == {"cpu"}
    moves = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda part, place: moves.append((part, place.type)))
    with check.on_device():
        assert moves == [(part, "meta") for part in waiting]
        moves.clear()
    assert moves == [(part, "cpu") for part in waiting]
    assert unet.device.type == "meta"


@pytest.mark.parametrize("kill", [False, True])
def test_stage_writes_adapter_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool) -> None:
    from dspo.stages import train as stage

    params_file = tmp_path / "params.yaml"
    params = yaml.safe_load(Path("params.yaml").read_text())
    world = params["worlds"]["shapes"]
    world["base"] |= {"model": str(save_tiny_pipeline(tmp_path / "base")), "resolution": 32}
    world["train"] |= {"epochs": 2, "batch_size": 16, "checkpoint_every_steps": 1, "validation_prompts": 2}
    world["evaluate"]["sampler"]["steps"] = 2
    params_file.write_text(yaml.safe_dump(params))
    (tmp_path / "pairs").mkdir()
    write_pairs_folder(tmp_path / "pairs", n=20)
    (tmp_path / "reward").mkdir()
    (tmp_path / "prompts.csv").write_text("prompt_id,prompt,weight\na,a red ball,1.0\nb,a blue box,1.0\nc,x,1.0\n")
    monkeypatch.setattr(stage, "load_reward", lambda _folder, _device: FakeScorer())

    def go(name: str) -> Path:
        monkeypatch.setenv("DSPO_SCRATCH", str(tmp_path / f"scratch-{name}"))
        out = tmp_path / name
        places = {"params": params_file, "pairs": tmp_path / "pairs", "reward": tmp_path / "reward"}
        places |= {"validation-prompts": tmp_path / "prompts.csv", "output": out / "adapter", "log": out / "training"}
        stage.main([part for key, place in places.items() for part in (f"--{key}", str(place))])
        return out

    first = go("first")
    if kill:
        saves = 0
        save = trainer.save_checkpoint

        def save_then_die(*args: object) -> None:
            nonlocal saves
            save(*args)
            saves += 1
            if saves == 1:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "save_checkpoint", save_then_die)
            with pytest.raises(Killed):
                go("second")
        assert not (tmp_path / "second").exists()
    second = go("second")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    names = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert [str(file) for file in files] == [
        *names,
        *(f"training/{n}" for n in ("epochs.csv", "log.csv", "metrics.json")),
    ]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()

    metrics = json.loads((first / "training" / "metrics.json").read_text())
    assert metrics["pairs"] == 19
    assert metrics["steps"] == 4
    with (first / "training" / "epochs.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert [row["epoch"] for row in epochs] == ["0", "1", "2"]
    assert metrics["reward"] == max(float(row["reward"]) for row in epochs[1:])
    assert metrics["reward_base"] == float(epochs[0]["reward"])
    assert float(epochs[0]["margin"]) == 0
