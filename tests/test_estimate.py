"""The estimates of ``--dry-run``: memory is what the same pass takes. Its counts: tests/test_cli.py."""

from pathlib import Path

import pytest
import torch
from tiny import TEXT_WIDTH, tiny_unet

from dspo import estimate
from dspo.errors import UserError
from dspo.params import load_params
from dspo.preference.dora import add_dora
from dspo.preference.method import Method, checkpoint_blocks
from dspo.preference.schedule import NoiseSchedule

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("loss", "checkpointing"), [("dpo", 0.0), ("dpo", 0.5), ("dspo", 1.0), ("sft", 0.0)])
def test_memory_on_the_meta_device_is_that_of_the_pass_itself(loss: str, checkpointing: float) -> None:
    """The same count over the same micro-batch with real tensors on the CPU."""
    params = load_params(ROOT / "params.yaml").active.train
    params = params.model_copy(update={"loss": loss, "batch_size": 3, "rank": 4})
    counted = []
    for device in (torch.device("cpu"), estimate.META):
        adapter = add_dora(tiny_unet().to(device), params, seed=0)
        method = Method(adapter, NoiseSchedule(torch.full((1000,), 0.5, device=device), "epsilon"), params, False)
        if checkpointing:
            checkpoint_blocks(adapter.unet, checkpointing)
        config = adapter.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes = type("Shapes", (), {"text_shape": (7, config.cross_attention_dim, pooled), "unet": adapter.unet})()
        batch = estimate._batch(shapes, params.batch_size, 8)
        batch = type(batch)(**{k: torch.zeros_like(v, device=device) for k, v in vars(batch).items()})
        adapter.train(True)
        with estimate.fused_attention(), estimate.Peak() as peak:
            losses, _ = method.losses(batch, method.needs)
            losses.sum().backward()
        counted.append(peak.bytes)
    assert counted[0] == pytest.approx(counted[1], rel=0.02)


def test_the_more_blocks_are_computed_again_the_less_memory_a_step_takes() -> None:
    peaks = []
    for share in (0.0, 0.5, 1.0):
        params = load_params(ROOT / "params.yaml").active.train
        params = params.model_copy(update={"batch_size": 3, "rank": 4, "gradient_checkpointing": share})
        unet = tiny_unet().to(estimate.META)
        adapter = add_dora(unet, params, seed=0)
        shapes = type("Shapes", (), {"text_shape": (7, 2 * TEXT_WIDTH, TEXT_WIDTH), "unet": unet})()
        peaks.append(estimate.training_peak(adapter, shapes, params, resolution=128))
    assert peaks[0] > 1.1 * peaks[1] > 1.2 * peaks[2]


def test_the_counter_knows_what_is_freed() -> None:
    with estimate.Peak() as peak:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1  # old and new at once
        view = x.view(10, 100)
        y = torch.zeros(500)
        del x, view, y
    assert peak.bytes == 2 * 4000


def test_a_model_that_is_not_there_is_named_with_its_remedy(tmp_path: Path) -> None:
    base = load_params(ROOT / "params.yaml").active.base
    with pytest.raises(UserError, match=r"unet/config\.json is missing.*copy the whole model there"):
        estimate.load_base(base.model_copy(update={"model": str(tmp_path)}))
