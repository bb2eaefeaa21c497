"""The model: its backbone, what an untrained one scores, what each head may see."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from reward_tiny import flat_image, make_clip, reward_params

from dspo.errors import UserError
from dspo.params import Dtype, RewardParams, load_params
from dspo.reward.backbone import check_quick_gelu, load_backbone
from dspo.reward.checkpoint import RewardScorer
from dspo.reward.model import RewardModel, build_model

CPU = torch.device("cpu")
CAPTIONS = ["red a", "blue square on green", "green"]


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def model(clip_name: str) -> RewardModel:
    return build_model(reward_params(clip_name), 0, CPU)


def some_pixels(model: RewardModel) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return model.backbone.preprocess([rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in CAPTIONS])


def randomised(model: RewardModel) -> RewardModel:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in model.trained_parameters().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_stem_and_top_give_open_clips_own_tokens(clip_name: str, unlocked: int) -> None:
    backbone = load_backbone(clip_name, None, 16, unlocked, min(unlocked, 2), CPU)
    pixels, ids = torch.randn(3, 3, 16, 16), backbone.tokenize(CAPTIONS)
    padded = torch.nn.functional.pad(ids, (0, 24 - ids.shape[1]), value=int(ids.max()))
    with torch.no_grad():
        expected = backbone.clip.forward_intermediates(
            pixels,
            padded,
            image_indices=1,
            text_indices=1,
            normalize_intermediates=True,
            image_output_fmt="NLC",
            normalize=False,
        )
        image = backbone.image_top(backbone.image_stem(pixels))
        text = backbone.text_top(backbone.text_stem(ids), ids.argmax(-1))
    torch.testing.assert_close(image.patches, expected["image_intermediates"][-1])
    torch.testing.assert_close(image.embedding, expected["image_features"])
    torch.testing.assert_close(text.tokens, expected["text_intermediates"][-1][:, : ids.shape[1]])
    torch.testing.assert_close(text.embedding, expected["text_features"])


def test_recomputed_blocks_have_the_same_gradients_and_keep_less(clip_name: str) -> None:
    params = reward_params(clip_name, unlocked_image_blocks=3, unlocked_text_blocks=2)
    gradients, kept = [], []
    for recompute in (False, True):
        model = randomised(build_model(params, 0, CPU))
        model.backbone.recompute = recompute
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            scores = model(some_pixels(model), model.backbone.tokenize(CAPTIONS))
        kept.append(sum(saved))
        gradients.append(torch.autograd.grad(scores.square().sum(), list(model.trained_parameters().values())))
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (40, 25), (10, 31)])
def test_preprocessing_is_open_clips(clip_name: str, size: tuple[int, int]) -> None:
    _, _, transform = open_clip.create_model_and_transforms(clip_name)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = load_backbone(clip_name, None, 16, 0, 0, CPU).preprocess([image])[0]
    torch.testing.assert_close(ours, transform(Image.fromarray(image)))


@pytest.mark.parametrize("fusion", [True, False])
def test_an_untrained_model_is_its_backbone(clip_name: str, fusion: bool) -> None:
    model = build_model(reward_params(clip_name, fusion=fusion), 0, CPU)
    pixels, ids = some_pixels(model), model.backbone.tokenizer(CAPTIONS)
    with torch.no_grad():
        scores = model(pixels, ids)
        image, text, scale = model.backbone.clip(pixels, ids)
    expected = scale * (image * text).sum(-1)
    torch.testing.assert_close(scores[:, 0], expected)
    torch.testing.assert_close(scores[:, 1], expected)
    assert not scores[:, 2:].any()


@pytest.mark.parametrize("fusion", [True, False])
def test_prompt_free_heads_do_not_see_the_caption(clip_name: str, fusion: bool) -> None:
    model = randomised(build_model(reward_params(clip_name, fusion=fusion), 0, CPU))
    pixels = some_pixels(model)
    with torch.no_grad():
        one, other = (model(pixels, model.backbone.tokenize([caption] * 3)) for caption in ("red", "blue b c"))
    assert (one[:, :2] != other[:, :2]).all()
    torch.testing.assert_close(one[:, 2:], other[:, 2:], rtol=0, atol=1e-6)
    assert one[:, 2:].std() > 0


def test_padding_does_not_change_a_score(model: RewardModel) -> None:
    randomised(model)
    pixels, ids = some_pixels(model), model.backbone.tokenize(CAPTIONS)
    padded = torch.nn.functional.pad(ids, (0, 5), value=int(ids.max()))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels, padded), model(pixels, ids))
        alone = model(pixels[2:], model.backbone.tokenize(CAPTIONS[2:]))
        torch.testing.assert_close(model(pixels, ids)[2:], alone)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_another_batch_size_changes_the_last_bits_alone(clip_name: str, dtype: Dtype, share: float) -> None:
    params = reward_params(clip_name, dtype=dtype)
    scorer = RewardScorer(randomised(build_model(params, 0, CPU)), params, {}, [])
    rng = np.random.default_rng(2)
    images, captions = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(24)], CAPTIONS * 8
    whole, *parts = (scorer.score(images, captions, size) for size in (24, 7, 1))
    spread = whole.std(axis=0)
    assert all((np.abs(part - whole) < share * spread).all() for part in parts)


def test_heads_keep_the_order_of_the_params(clip_name: str) -> None:
    heads = ["detail", "overall", "aesthetics", "alignment"]
    model = build_model(reward_params(clip_name, heads=heads), 0, CPU)
    with torch.no_grad():
        scores = model(some_pixels(model), model.backbone.tokenize(CAPTIONS))
    assert [bool(column.any()) for column in scores.T] == [False, True, False, True]


def test_only_the_last_blocks_are_trained(model: RewardModel) -> None:
    backbone = {name.removeprefix("backbone.clip.") for name in model.trained_parameters() if name[:8] == "backbone"}
    whole = {name for name in backbone if "resblocks" not in name}
    assert {name.split(".mlp")[0].split(".attn")[0].split(".ln_")[0] for name in backbone - whole} == {
        "visual.transformer.resblocks.2",
        "transformer.resblocks.1",
    }
    norms = {f"{norm}.{part}" for norm in ("visual.ln_post", "ln_final") for part in ("weight", "bias")}
    assert whole == norms | {"visual.proj", "text_projection"}


def test_more_blocks_than_there_are(clip_name: str) -> None:
    with pytest.raises(UserError, match="at most 3 and 2"):
        build_model(reward_params(clip_name, unlocked_image_blocks=4), 0, CPU)


def test_vit_l_336_at_full_size_without_weights() -> None:
    params: RewardParams = load_params(Path("params.yaml")).worlds["sdxl"].reward
    model = build_model(params, 0, torch.device("meta"))
    assert model.backbone.quick_gelu
    assert sum(p.numel() for p in model.backbone.clip.parameters()) == 427_944_193
    assert model.backbone.frozen_image_blocks == 18 and model.backbone.frozen_text_blocks == 6
    pixels, ids = (
        torch.empty(2, 3, 336, 336, device="meta"),
        torch.ones(2, 77, dtype=torch.long, device="meta"),
    )
    assert model(pixels, ids).shape == (2, 5)


def test_openai_weights_without_quick_gelu_are_refused(tmp_path: Path) -> None:
    clip = open_clip.create_model("ViT-L-14-336", device="meta", pretrained=None)
    for pretrained in ("openai", str(tmp_path / "file.safetensors")):
        with pytest.raises(UserError, match="ViT-L-14-336-quickgelu"):
            check_quick_gelu("ViT-L-14-336", pretrained, clip)
        check_quick_gelu("ViT-B-32", "laion2b_s34b_b79k", clip)


def test_backbones_that_cannot_be_had(tmp_path: Path) -> None:
    for name, pretrained in (
        ("local-dir:" + str(tmp_path / "none"), None),
        ("ViT-nothing", "x"),
        ("ViT-B-32", None),
    ):
        with pytest.raises(UserError, match=r"reward\."):
            load_backbone(name, pretrained, 16, 0, 0, CPU)


def test_flat_images_are_scored_alike_whatever_their_size(model: RewardModel) -> None:
    image = flat_image(np.random.default_rng(0))
    large = np.broadcast_to(image[:1, :1], (50, 30, 3)).copy()
    pixels = model.backbone.preprocess([image, large])
    torch.testing.assert_close(pixels[0], pixels[1])
