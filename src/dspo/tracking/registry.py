"""The registered model: one version per adapter. Which of them is champion, dspo.tracking.champion says.

A version is the adapter as it was trained, and in MLmodel the base and the sampler that it was evaluated with.
dspo.tracking.tuned_pipeline, of which each version carries a copy, makes a pipeline of these, so that whoever loads or
serves a version gets the images that were judged.
"""

import warnings
from contextlib import suppress
from pathlib import Path

import mlflow
import mlflow.diffusers
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from dspo.data.records import GOLD
from dspo.tracking.champion import (
    ADAPTER_MD5,
    CHAMPION,
    GOLD_DECIDED,
    GOLD_HIGH,
    GOLD_LOW,
    GOLD_RATE,
    describe,
    model_name,
)
from dspo.tracking.description import WIN_RATES, describe_version
from dspo.tracking.record import EVALUATE, EXPERIMENT_NAME, RunRecord, Sampler

# The lower end last: without it the gate is shut, so that it never reads figures of two evaluations.
GOLD_FIGURES = {GOLD_RATE: "win_rate", GOLD_HIGH: "high", GOLD_DECIDED: "n_decided", GOLD_LOW: "low"}


def register(client: MlflowClient, experiment: str, run: str, record: RunRecord, adapter: Path) -> None:
    """Make a version of this adapter; if there is one, bring its figures up to date.

    An experiment leaves the figures of a version that is there as they are: its settings are for trying out, and the
    gate would open for whoever tries often enough.
    """
    version = version_of(client, record)
    description = describe_version(record, run, experiment)
    if version is None:
        _make(client, experiment, run, record, adapter, description)
    elif EXPERIMENT_NAME not in record.tags:
        _judge_anew(client, version, record, description)


def version_of(client: MlflowClient, record: RunRecord) -> ModelVersion | None:
    """The version of this adapter, whose ``run_id`` is the run that it was made by."""
    wanted = f"name = '{model_name(record.world)}' and tags.`{ADAPTER_MD5}` = '{record.adapter_md5}'"
    return next(iter(client.search_model_versions(wanted)), None)


def _make(client: MlflowClient, experiment: str, run: str, record: RunRecord, adapter: Path, description: str) -> None:
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
        description=description,
        model_id=info.model_id,
    )


def _judge_anew(client: MlflowClient, version: ModelVersion, record: RunRecord, description: str) -> None:
    """Replace what the last evaluation left: tags and description. A gold judge that is gone leaves no tags."""
    name, number = model_name(record.world), version.version
    for tag in reversed(GOLD_FIGURES):
        client.delete_model_version_tag(name, number, tag)
    for tag, value in gold_tags(record).items():
        client.set_model_version_tag(name, number, tag, value)
    judged = client.update_model_version(name, number, description)
    if client.get_registered_model(name).aliases.get(CHAMPION) == number:
        client.update_registered_model(name, describe(record.world, judged))


def _log(client: MlflowClient, experiment: str, run: str, record: RunRecord, adapter: Path) -> ModelInfo:
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=experiment)  # where the model's files go
    code = Path(__file__).with_name("tuned_pipeline.py")  # not imported: it needs torch, this does not
    with warnings.catch_warnings():
        # MLflow would make an image of the example at once.
        warnings.filterwarnings("ignore", ".*An input example was not provided")
        return Model.log(
            artifact_path=None,
            name="adapter",
            flavor=mlflow.pyfunc,
            run_id=run,
            loader_module=code.stem,
            code_paths=[str(code)],
            data_path=str(adapter),
            model_config=record.base | {"scheduler": record.sampler.scheduler},
            pip_requirements=mlflow.diffusers.get_default_pip_requirements(),
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
