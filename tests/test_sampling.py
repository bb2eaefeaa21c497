"""Sampling against diffusers' own pipeline, its keys, and what loading says when something is missing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny import RESOLUTION, TEXT_WIDTH, TOKENS, save_tiny_pipeline, tiny_pipeline, tiny_vae

from dspo.data.keys import prompt_id
from dspo.data.prompts import Prompt
from dspo.diffusion import files
from dspo.diffusion.base import encode_null, encode_prompts, load_pipeline, load_text_encoders, local_files
from dspo.diffusion.sampling import Sample, SampleRequest, initial_noise, sample, sample_groups, with_scheduler
from dspo.errors import UserError
from dspo.params import BaseModelParams, SamplerParams, Scheduler

CPU = torch.device("cpu")
SHAPE = (4, RESOLUTION // 8, RESOLUTION // 8)


def prompt(text: str) -> Prompt:
    return Prompt(prompt_id(text), text)


RED, BLUE = prompt("a red circle"), prompt("a blue square on green")
DDIM = SamplerParams(scheduler="ddim", steps=3, guidance_scale=2.5)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return tiny_pipeline()


def base_params(model: Path | str, **changes: str | int | None) -> BaseModelParams:
    fields: dict[str, object] = {
        "model": str(model),
        "revision": None,
        "variant": None,
        "vae": None,
        "vae_revision": None,
        "dtype": "float32",
        "resolution": RESOLUTION,
    }
    return BaseModelParams.model_validate(fields | changes)


def draw(pipe: StableDiffusionXLPipeline, requests: list[SampleRequest], batch_size: int = 8) -> list[Sample]:
    return list(sample(pipe, requests, DDIM, RESOLUTION, seed=0, batch_size=batch_size))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddim", DDIMScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler), ("euler", EulerDiscreteScheduler)],
)
def test_sample_is_what_the_pipeline_draws_from_the_same_noise(
    pipe: StableDiffusionXLPipeline, name: Scheduler, kind: type
) -> None:
    sampler = SamplerParams(scheduler=name, steps=3, guidance_scale=2.5)
    requests = [SampleRequest(RED, 0, 5), SampleRequest(BLUE, 1, 6)]
    ours = list(sample(pipe, requests, sampler, RESOLUTION, seed=0, batch_size=2))
    plain = with_scheduler(pipe, name)
    assert isinstance(plain.scheduler, kind)
    common = {
        "prompt": [RED.text, BLUE.text],
        "height": RESOLUTION,
        "width": RESOLUTION,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
    }
    images = plain(**common, latents=initial_noise(requests, 0, SHAPE), output_type="pil").images
    latents = plain(**common, latents=initial_noise(requests, 0, SHAPE), output_type="latent").images
    for one, image, latent in zip(ours, images, latents, strict=True):
        assert np.array_equal(one.image, np.asarray(image))
        assert np.array_equal(one.latent, latent.to(torch.float16).numpy())


def test_samples_do_not_depend_on_the_number_of_threads(pipe: StableDiffusionXLPipeline) -> None:
    requests = [SampleRequest(one, index, index) for one in (RED, BLUE) for index in range(3)]
    threads = torch.get_num_threads()
    drawn = []
    for number in (1, 3):
        torch.set_num_threads(number)
        drawn.append(draw(pipe, requests, batch_size=2))
    torch.set_num_threads(threads)
    for alone, beside in zip(*drawn, strict=True):
        assert alone.request == beside.request
        assert np.array_equal(alone.image, beside.image)
        assert np.array_equal(alone.latent, beside.latent)


def test_keys_and_values_of_a_text_are_computed_once(
    pipe: StableDiffusionXLPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {layer for name, layer in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    computed: list[torch.nn.Module] = []
    plain = torch.nn.Linear.forward

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if layer in layers:
            computed.append(layer)
        return plain(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    latents = [one.latent for one in draw(pipe, [SampleRequest(p, 0, 0) for p in (RED, BLUE, RED)], batch_size=1)]
    assert len(computed) == 3 * len(layers) > 0
    assert np.array_equal(latents[0], latents[2]) and not np.array_equal(latents[0], latents[1])


def test_groups_are_sampled_as_if_each_were_alone(pipe: StableDiffusionXLPipeline) -> None:
    euler = SamplerParams(scheduler="euler", steps=2, guidance_scale=1.5)
    groups = [([SampleRequest(RED, i, i) for i in range(3)], DDIM), ([SampleRequest(BLUE, 0, 0)], euler)]
    together = list(sample_groups(pipe, groups, RESOLUTION, seed=0, batch_size=2))
    alone = [one for group in groups for one in sample(pipe, *group, RESOLUTION, seed=0, batch_size=2)]
    for one, other in zip(together, alone, strict=True):
        assert (one.request, one.sampler) == (other.request, other.sampler)
        assert np.array_equal(one.image, other.image)


def test_two_samplings_of_one_pipeline_side_by_side(pipe: StableDiffusionXLPipeline) -> None:
    requests = [SampleRequest(RED, i, i) for i in range(3)]
    samplers = DDIM, SamplerParams(scheduler="euler", steps=2, guidance_scale=1.5)
    both = zip(*(sample(pipe, requests, sampler, RESOLUTION, 0, 1) for sampler in samplers), strict=True)
    for beside, sampler in zip(zip(*both, strict=True), samplers, strict=True):
        alone = sample(pipe, requests, sampler, RESOLUTION, 0, 1)
        assert all(np.array_equal(one.latent, other.latent) for one, other in zip(beside, alone, strict=True))


def test_sample_leaves_the_pipeline_as_it_was(pipe: StableDiffusionXLPipeline) -> None:
    scheduler, config = pipe.scheduler, dict(pipe.config)
    draw(with_scheduler(pipe, "euler"), [SampleRequest(RED, 0, 0)])
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_scheduler_keeps_the_noise_schedule_of_the_base() -> None:
    pipe = tiny_pipeline(prediction_type="v_prediction")
    for name in ("ddim", "dpmpp_2m", "euler"):
        config = with_scheduler(pipe, name).scheduler.config
        assert config.prediction_type == "v_prediction"
        assert config.beta_end == pipe.scheduler.config.beta_end
        assert config.beta_schedule == "scaled_linear"


def test_ddim_does_not_clip_latents_when_the_base_names_another_scheduler() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert not with_scheduler(pipe, "ddim").scheduler.config.clip_sample


def test_image_does_not_depend_on_its_place_in_the_batch(pipe: StableDiffusionXLPipeline) -> None:
    requests = [SampleRequest(RED, 0, 0), SampleRequest(BLUE, 0, 0), SampleRequest(RED, 1, 1)]
    forward, backward = draw(pipe, requests), draw(pipe, requests[::-1])[::-1]
    alone = [draw(pipe, [request])[0] for request in requests]
    for a, b, c in zip(forward, backward, alone, strict=True):
        np.testing.assert_allclose(a.latent, b.latent, atol=2e-3)
        np.testing.assert_allclose(a.latent, c.latent, atol=2e-3)


def test_equal_batches_give_equal_bytes(pipe: StableDiffusionXLPipeline) -> None:
    requests = [SampleRequest(p, i, i) for p in (RED, BLUE) for i in range(3)]
    whole = draw(pipe, requests, batch_size=2)
    for start in range(0, len(requests), 2):
        again = draw(pipe, requests[start : start + 2], batch_size=2)
        for a, b in zip(whole[start : start + 2], again, strict=True):
            assert a.image.tobytes() == b.image.tobytes()
            assert a.latent.tobytes() == b.latent.tobytes()


def test_noise_is_keyed_by_prompt_and_noise_index() -> None:
    first = initial_noise([SampleRequest(RED, 0, 3), SampleRequest(RED, 9, 3), SampleRequest(RED, 0, 4)], 0, SHAPE)
    other = initial_noise([SampleRequest(BLUE, 0, 3)], 0, SHAPE)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], initial_noise([SampleRequest(RED, 0, 3)], 1, SHAPE)[0])
    many = initial_noise([SampleRequest(RED, 0, i) for i in range(500)], 0, SHAPE)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_guidance_of_1_samples_without_the_null_prompt(pipe: StableDiffusionXLPipeline) -> None:
    sampler = SamplerParams(scheduler="ddim", steps=2, guidance_scale=1.0)
    (one,) = sample(pipe, [SampleRequest(RED, 0, 0)], sampler, RESOLUTION, seed=0, batch_size=1)
    assert one.image.shape == (RESOLUTION, RESOLUTION, 3)
    assert one.image.dtype == np.uint8
    assert one.latent.shape == SHAPE


def test_prompts_are_encoded_in_their_order_whatever_the_batch(pipe: StableDiffusionXLPipeline) -> None:
    texts = [RED.text, BLUE.text, "a"]
    small, large = (list(encode_prompts(pipe, texts, batch_size=size)) for size in (1, 64))
    assert large[0].embeds.shape == (TOKENS, 2 * TEXT_WIDTH)
    assert large[0].pooled.shape == (TEXT_WIDTH,)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a.embeds, b.embeds)
        torch.testing.assert_close(a.pooled, b.pooled)
    assert list(encode_prompts(pipe, [])) == []


def test_null_is_what_guidance_uses() -> None:
    pipe = tiny_pipeline()
    assert not encode_null(pipe).embeds.any()
    assert not encode_null(pipe).pooled.any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    null, empty = encode_null(pipe), next(encode_prompts(pipe, [""]))
    assert torch.equal(null.embeds, empty.embeds)
    assert torch.equal(null.pooled, empty.pooled)


def test_folder_loads_frozen_and_in_evaluation_mode(tmp_path: Path, pipe: StableDiffusionXLPipeline) -> None:
    base = base_params(save_tiny_pipeline(tmp_path / "base"), dtype="bfloat16")
    loaded = load_pipeline(base, CPU)
    for part in (loaded.unet, loaded.vae, loaded.text_encoder, loaded.text_encoder_2):
        assert part.dtype == torch.bfloat16
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert loaded.watermark is None
    assert local_files(base) == [tmp_path / "base"]


def test_large_images_are_decoded_one_by_one(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "base")
    assert not load_pipeline(base_params(folder), CPU).vae.use_slicing
    assert load_pipeline(base_params(folder, resolution=1024), CPU).vae.use_slicing


def test_float32_adapter_in_a_bfloat16_base_starts_from_the_same_noise(tmp_path: Path) -> None:
    pipe = load_pipeline(base_params(save_tiny_pipeline(tmp_path / "base"), dtype="bfloat16"), CPU)
    (before,) = draw(pipe, [SampleRequest(RED, 0, 0)])
    pipe.unet.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    (after,) = draw(pipe, [SampleRequest(RED, 0, 0)])
    assert after.latent.tobytes() == before.latent.tobytes()


def test_text_encoders_alone_see_the_same(tmp_path: Path, pipe: StableDiffusionXLPipeline) -> None:
    text_only = load_text_encoders(base_params(save_tiny_pipeline(tmp_path / "base")), CPU)
    assert text_only.unet is None
    assert text_only.vae is None
    ours, whole = (next(encode_prompts(one, [RED.text])) for one in (text_only, pipe))
    assert torch.equal(ours.embeds, whole.embeds)
    assert torch.equal(ours.pooled, whole.pooled)
    assert torch.equal(encode_null(text_only).embeds, encode_null(pipe).embeds)


def test_vae_can_be_another(tmp_path: Path) -> None:
    torch.manual_seed(7)
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    base = base_params(save_tiny_pipeline(tmp_path / "base"), vae=str(tmp_path / "vae"))
    weight = load_pipeline(base, CPU).vae.decoder.conv_out.weight
    assert torch.equal(weight, vae.decoder.conv_out.weight)
    assert local_files(base) == [tmp_path / "base", tmp_path / "vae"]


def test_missing_folder_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder.*git checkout.*base\.revision"):
        load_pipeline(base_params(tmp_path / "nothing"), CPU)


def test_a_folder_in_another_place_is_looked_for_there(tmp_path: Path, pipe: StableDiffusionXLPipeline) -> None:
    """Its revision, left in params.yaml, does not count; weights saved in parts are there."""
    base = base_params(tmp_path / "base", revision="0" * 40)
    (absent,) = files.missing(base)
    assert "base: missing: all of" in absent.what and absent.remedy.startswith("copy the whole model there")
    pipe.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    assert (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert files.missing(base) == []
    loaded = load_pipeline(base, CPU).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in pipe.unet.state_dict().items())


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"base\.model: .*base: cannot be loaded"):
        load_pipeline(base_params(folder), CPU)


def test_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match=r"cannot be loaded .* diffusers' layout"):
        load_pipeline(base_params(tmp_path), CPU)


def test_single_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be loaded .* whole SDXL checkpoint"):
        load_pipeline(base_params(tmp_path / "model.safetensors"), CPU)


def test_hub_model_that_cannot_be_fetched_says_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(UserError, match=r"hf download nobody/nothing --revision 0123abc"):
        load_pipeline(base_params("nobody/nothing", revision="0123abc"), CPU)
