"""The registered model: one version per adapter, and the alias ``champion`` for the last that passed its gate.

Adapters are logged with MLflow's own flavour for diffusion adapters, ``mlflow.diffusers``: ``load_model(uri)`` names
the base model and ``.load_pipeline()`` gives the pipeline with the adapter. A DoRA adapter survives that, if

- the file has diffusers' key names (peft's, with ``unet.`` before the module; magnitudes are passed on unchanged);
- the LoRA metadata in it gives alpha, since diffusers takes the rank for it otherwise, and dropout 0: diffusers
  injects the adapter in training mode, so that the pipeline's images would be random with any other value.

The flavour would pin the hub's newest commit of the base model; ours is the one that was tuned.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import mlflow.diffusers
from mlflow import MlflowClient
from mlflow.models import Model
from safetensors.torch import load_file, save_file

from dspo.data.files import read_json
from dspo.evaluation.compare import GOLD
from dspo.tracking.record import RunRecord

CHAMPION = "champion"
ADAPTER_MD5 = "dvc.adapter_md5"
PEFT_PREFIX = "base_model.model."
ADAPTER_METADATA = "lora_adapter_metadata"  # the key that diffusers looks for
ADAPTER_KEYS = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias")


def model_name(world: str) -> str:
    return f"dspo-adapter-{world}"


def improved(record: RunRecord) -> bool:
    """The gate: the lower end of the gold judge's win rate of tuned over base is above one half.

    Worlds without the gold judge never pass: their champion is named by a person.
    """
    metrics = next((stage.metrics for stage in record.stages if stage.name == "evaluate"), {})
    return metrics.get(f"results.verdict.improved.{GOLD}") == 1.0


def register(client: MlflowClient, run: str, record: RunRecord, adapter: Path) -> None:
    """Make a version of this adapter unless there is one, and let ``champion`` point to it if the gate holds."""
    name = model_name(record.world)
    version = _version(client, name, record.adapter_md5) or _log(client, name, run, record, adapter)
    if improved(record):
        client.set_registered_model_alias(name, CHAMPION, version)


def _version(client: MlflowClient, name: str, md5: str) -> str | None:
    versions = client.search_model_versions(f"name = '{name}' and tags.`{ADAPTER_MD5}` = '{md5}'")
    return str(versions[0].version) if versions else None


def _log(client: MlflowClient, name: str, run: str, record: RunRecord, adapter: Path) -> str:
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=client.get_run(run).info.experiment_id)  # where the model's files go
    weights = as_diffusers(adapter, adapter.with_name("diffusers") / "pytorch_lora_weights.safetensors")
    info = Model.log(
        artifact_path=None,
        name="adapter",
        flavor=_AdapterOfPinnedBase,
        run_id=run,
        registered_model_name=name,
        adapter_path=str(weights),
        base_model=record.base_model,
        base_revision=record.base_revision,
    )
    version = str(info.registered_model_version)
    for key, value in {**record.tags, ADAPTER_MD5: record.adapter_md5}.items():
        client.set_model_version_tag(name, version, key, value)
    return version


class _AdapterOfPinnedBase:
    """``mlflow.diffusers``, with the base model's reference as it is."""

    @staticmethod
    def save_model(
        path: str, mlflow_model: Model, adapter_path: str, base_model: str, base_revision: str | None
    ) -> None:
        # An absolute path keeps the flavour from asking the hub for the newest commit.
        mlflow.diffusers.save_model(adapter_path, path, str(Path("/", base_model)), mlflow_model=mlflow_model)
        reference: dict[str, Any] = {"base_model": base_model}
        if base_revision is not None:
            reference["base_model_revision"] = base_revision
        mlflow_model.flavors["diffusers"].update(reference)
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
