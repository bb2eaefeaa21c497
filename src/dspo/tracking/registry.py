"""The registered model: one version per adapter. Which of them is champion, dspo.tracking.champion says.

Adapters are logged with MLflow's own flavour for diffusion adapters, ``mlflow.diffusers``: ``load_model(uri)`` names
the base model and ``.load_pipeline()`` gives the pipeline with the adapter. A DoRA adapter survives that, if

- the file has diffusers' key names (peft's, with ``unet.`` before the module; magnitudes are passed on unchanged);
- the LoRA metadata in it gives alpha, since diffusers takes the rank for it otherwise, and dropout 0: diffusers
  injects the adapter in training mode, so that the pipeline's images would be random with any other value.

The flavour would pin the hub's newest commit of the base model; ours is the one that was tuned.
"""

import json
from contextlib import suppress
from pathlib import Path

import mlflow
import mlflow.diffusers
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from safetensors.torch import load_file, save_file

from dspo.data.files import read_json
from dspo.evaluation.compare import GOLD
from dspo.tracking.champion import GOLD_DECIDED, GOLD_HIGH, GOLD_LOW, GOLD_RATE, describe, model_name
from dspo.tracking.description import WIN_RATES, describe_version
from dspo.tracking.record import EVALUATE, RunRecord, Sampler

GOLD_FIGURES = {GOLD_RATE: "win_rate", GOLD_LOW: "low", GOLD_HIGH: "high", GOLD_DECIDED: "n_decided"}
ADAPTER_MD5 = "dvc.adapter_md5"
PEFT_PREFIX = "base_model.model."
ADAPTER_METADATA = "lora_adapter_metadata"  # the key that diffusers looks for
ADAPTER_KEYS = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias")


def register(client: MlflowClient, experiment: str, run: str, record: RunRecord, adapter: Path) -> None:
    """Make a version of this adapter unless there is one."""
    if run_of_version(client, record) is not None:
        return
    name = model_name(record.world)
    with suppress(MlflowException):  # there is one
        client.create_registered_model(name, description=describe(record.world))
    info = _log(client, experiment, run, record, adapter)
    # In one call: a version without its tags would be taken for none, and made again.
    client.create_model_version(
        name,
        info.model_uri,
        run_id=run,
        tags={**record.tags, **gold_tags(record), ADAPTER_MD5: record.adapter_md5},
        description=describe_version(record, run, experiment),
        model_id=info.model_id,
    )


def run_of_version(client: MlflowClient, record: RunRecord) -> str | None:
    """The run that the version of this adapter was made by; None: there is no version."""
    wanted = f"name = '{model_name(record.world)}' and tags.`{ADAPTER_MD5}` = '{record.adapter_md5}'"
    versions = client.search_model_versions(wanted)
    return str(versions[0].run_id) if versions else None


def _log(client: MlflowClient, experiment: str, run: str, record: RunRecord, adapter: Path) -> ModelInfo:
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=experiment)  # where the model's files go
    weights = as_diffusers(adapter, adapter.with_name("diffusers") / "pytorch_lora_weights.safetensors")
    return Model.log(
        artifact_path=None,
        name="adapter",
        flavor=_AdapterOfPinnedBase,
        run_id=run,
        adapter_path=str(weights),
        base_model=record.base_model,
        base_revision=record.base_revision,
        signature=signature(record.sampler),
    )


def signature(sampler: Sampler) -> ModelSignature:
    """A prompt in, a PNG out; made as the judged images were unless the caller says otherwise."""
    defaults = [
        ParamSpec("num_inference_steps", DataType.integer, sampler.steps),
        ParamSpec("guidance_scale", DataType.double, sampler.guidance_scale),
        ParamSpec("height", DataType.integer, sampler.resolution),
        ParamSpec("width", DataType.integer, sampler.resolution),
        ParamSpec("negative_prompt", DataType.string, ""),
    ]
    prompt, image = ColSpec(DataType.string, "prompt"), ColSpec(DataType.binary, "image")
    return ModelSignature(Schema([prompt]), Schema([image]), ParamSchema(defaults))


def gold_tags(record: RunRecord) -> dict[str, str]:
    """The gold judge's win rate of tuned over base, which the gate reads; nothing in a world without that judge."""
    metrics = record.metrics(EVALUATE)
    figures = {tag: f"{WIN_RATES}.{GOLD}.{name}" for tag, name in GOLD_FIGURES.items()}
    if not all(key in metrics for key in figures.values()):
        return {}
    return {tag: f"{metrics[key]:g}" for tag, key in figures.items()}


class _AdapterOfPinnedBase:
    """``mlflow.diffusers``, with the base model's reference as it is."""

    @staticmethod
    def save_model(
        path: str,
        mlflow_model: Model,
        adapter_path: str,
        base_model: str,
        base_revision: str | None,
        signature: ModelSignature,
    ) -> None:
        # An absolute path keeps the flavour from asking the hub for the newest commit.
        reference = str(Path("/", base_model))
        mlflow.diffusers.save_model(adapter_path, path, reference, mlflow_model=mlflow_model, signature=signature)
        mlflow_model.flavors["diffusers"]["base_model"] = base_model
        if base_revision is not None:
            mlflow_model.flavors["diffusers"]["base_model_revision"] = base_revision
        mlflow_model.save(str(Path(path) / "MLmodel"))


def as_diffusers(adapter: Path, target: Path) -> Path:
    """Write a PEFT adapter folder as the one file that ``pipe.load_lora_weights`` reads; return its path."""
    config = read_json(adapter / "adapter_config.json")
    weights = load_file(adapter / "adapter_model.safetensors")
    metadata = {f"unet.{key}": config[key] for key in ADAPTER_KEYS} | {"unet.lora_dropout": 0.0}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"unet.{key.removeprefix(PEFT_PREFIX)}": value for key, value in weights.items()},
        target,
        metadata={ADAPTER_METADATA: json.dumps(metadata, sort_keys=True)},  # one key: two come out in random order
    )
    return target
