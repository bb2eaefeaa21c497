"""How a version of the registered model is loaded: the pipeline that was evaluated, with the adapter in its UNet.

MLflow keeps a copy of this file in each version and calls it wherever that version is loaded, so it imports nothing of
this project.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from mlflow.environment_variables import MLFLOW_DEFAULT_PREDICTION_DEVICE
from peft import PeftModel

# Where a single file takes its configuration from.
SDXL, SDXL_REVISION = "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
}


class TunedPipeline:
    """What MLflow asks for images, and for the pipeline behind them."""

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self._pipe = pipe

    def get_raw_model(self) -> StableDiffusionXLPipeline:
        return self._pipe

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any]) -> list[bytes]:
        """A PNG per prompt of the column ``prompt``, whose cells hold one prompt or several."""
        prompts = data["prompt"].explode().tolist()
        # None is what the judged images were made with; an empty text is a text, which another embedding stands for.
        settings = {**params, "negative_prompt": params["negative_prompt"] or None}
        return [_png(image) for image in self._pipe(prompts, **settings).images]


def load(adapter: Path, base: Mapping[str, Any]) -> StableDiffusionXLPipeline:
    """``adapter``: folder in PEFT's format. ``base``: model, revision, variant, vae, vae_revision, dtype, scheduler."""
    model, revision, dtype = base["model"], base["revision"], {"dtype": getattr(torch, base["dtype"])}
    parts = {}
    if base["vae"] is not None:
        parts["vae"] = AutoencoderKL.from_pretrained(
            base["vae"], revision=base["vae_revision"], use_safetensors=True, **dtype
        )
    if model.endswith(".safetensors"):
        pipe = StableDiffusionXLPipeline.from_single_file(
            model, config=SDXL, revision=revision or SDXL_REVISION, **dtype, **parts
        )
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(
            model, revision=revision, variant=base["variant"], use_safetensors=True, **dtype, **parts
        )
    pipe.watermark = None  # diffusers adds one wherever the package for it happens to be installed
    name, changed = SCHEDULERS[base["scheduler"]]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changed)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, adapter).eval()
    return pipe.to(MLFLOW_DEFAULT_PREDICTION_DEVICE.get() or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any]) -> TunedPipeline:
    return TunedPipeline(load(Path(data_path), model_config))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
