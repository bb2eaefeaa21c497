"""Training of the small CLIP: it runs from the base's samples to open_clip's folder, and what it says there is so."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from dspo.data.files import read_json
from dspo.shapes import train_clip
from dspo.shapes.tokenizer import CONTEXT_LENGTH

BASE = Path(__file__).parent.parent / "models" / "shapes-sdxl"


def test_from_the_base_to_a_model_that_open_clip_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("WEB_PICTURES", 12), ("SAMPLED_PICTURES", 20), ("HELD_OUT_PICTURES", 10)):
        monkeypatch.setattr(train_clip, name, number)
    (tmp_path / "work").mkdir()
    made = []
    for _ in range(2):  # the second time all steps are done already
        train_clip.train(BASE, tmp_path / "work", tmp_path / "clip", steps=3, batch_size=8, lr=1e-3, seed=0)
        made.append((tmp_path / "clip" / "open_clip_model.safetensors").read_bytes())
    assert made[0] == made[1]
    model = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(["a small red ring on a blue background"])
    assert tokens.shape == (1, CONTEXT_LENGTH) and model.encode_text(tokens).isfinite().all()
    report = read_json(tmp_path / "clip" / "report.json")
    assert 0 < report["pictures"] <= 10 and report["both"] <= min(report["changed"], report["confused"])


def test_every_parameter_has_one_optimizer() -> None:
    model = open_clip.model.CLIP(**train_clip.model_config(640))
    probes = train_clip.Probes(model.visual.transformer.width, model.visual.output_dim)
    muon, adamw = train_clip.new_optimizers(model, probes, 1e-3)
    trained = [[p for group in one.param_groups for p in group["params"]] for one in (muon, adamw)]
    assert sorted(map(id, [*trained[0], *trained[1]])) == sorted(map(id, [*model.parameters(), *probes.parameters()]))
    assert {p.ndim for p in trained[0]} == {2} and len(trained[0]) == 4 * 9


def test_wrong_captions_are_negatives() -> None:
    image = torch.nn.functional.normalize(torch.tensor(np.eye(3, 8), dtype=torch.float32), dim=-1)
    loss, found = train_clip.contrastive_loss(image, image, torch.zeros(6, 8), torch.tensor(100.0))
    assert found == 1 and loss < 1e-3
    loss, found = train_clip.contrastive_loss(image, image.roll(1, 0), image.repeat(2, 1), torch.tensor(100.0))
    assert found == 0 and loss > 10
