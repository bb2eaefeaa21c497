"""MLflow as a sink: one run per run of the pipeline, with one nested run per stage."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from dspo.data.parts import in_parts
from dspo.tracking.description import NOTE, SAMPLE_GRID, describe_experiment, describe_run, run_name
from dspo.tracking.record import LAST, Dataset, RunRecord, Series, StageRecord
from dspo.tracking.registry import register, version_of
from dspo.tracking.server import ARTIFACTS, connect, patience

EXPERIMENT = "dspo"
KEY, CONTENT, COMPLETE = "dspo.key", "dspo.content", "dspo.complete"
GRID = f"{LAST}/grid.png"
PARAMS_PER_CALL, METRICS_PER_CALL, LONGEST_PARAM = 100, 1000, 6000  # MLflow's limits


class MlflowSink:
    """``first_timeout``: seconds that the server has for its first answer.

    Every method raises one of ``REFUSALS`` if the server is dead, slow or refuses.
    """

    def __init__(self, uri: str, first_timeout: int) -> None:
        self.uri = uri
        self._first_timeout = first_timeout

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self.uri, create=True)

    def keys(self) -> set[str]:
        """Keys and contents of the runs that are wholly there. Asks once, without patience."""
        patience(self._first_timeout, retries=0)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        patience(120, retries=1)  # an adapter's upload may be silent for a while
        if experiment is None:
            return set()
        whole = self._runs(experiment.experiment_id, {COMPLETE: "true"})
        return {tag for run in whole for key in (KEY, CONTENT) if (tag := run.data.tags.get(key))}

    def send(self, record: RunRecord, folder: Path) -> None:
        """Send a record and the files beside it. What an earlier attempt left unfinished is replaced.

        A version of the registered model is made last and stays: if there is one of this run, all else is there.
        """
        experiment = self._experiment()
        begun = {run.info.run_id for run in self._runs(experiment, {KEY: record.key})}
        version = version_of(self._client, record)
        if version is not None and version.run_id in begun:
            self._finish(version.run_id)
            return
        for run in begun:
            self._delete(experiment, run)
        self._finish(self._send(experiment, record, folder))

    def _send(self, experiment: str, record: RunRecord, folder: Path) -> str:
        tags = {**record.tags, KEY: record.key, CONTENT: record.content, "world": record.world}
        parent = str(self._client.create_run(experiment, run_name=run_name(record), tags=tags).info.run_id)
        # Runs are compared by their parents: these carry all parameters, and the figures of the report.
        params = {key: value for stage in record.stages for key, value in stage.params.items()}
        self._log_batches(parent, params, record.metrics(LAST), {})
        self._log_datasets(parent, record.datasets)
        for stage in record.stages:
            self._send_stage(experiment, parent, record.key, stage, folder / "artifacts" / stage.name)
        if (folder / "artifacts" / GRID).exists():
            grid = Path(shutil.copyfile(folder / "artifacts" / GRID, folder / SAMPLE_GRID))
            self._client.log_artifact(parent, str(grid))
        self._client.set_tag(parent, NOTE, describe_run(record, parent))
        self._client.set_experiment_tag(experiment, NOTE, describe_experiment(record, parent))
        register(self._client, experiment, parent, record, folder / "adapter")
        return parent

    def _finish(self, run: str) -> None:
        self._client.set_terminated(run)
        self._client.set_tag(run, COMPLETE, "true")

    def _send_stage(self, experiment: str, parent: str, key: str, stage: StageRecord, artifacts: Path) -> None:
        tags = {"mlflow.parentRunId": parent, "dvc.stage": stage.name, KEY: key, **stage.tags}
        run = self._client.create_run(experiment, run_name=stage.name, tags=tags).info.run_id
        self._log_batches(run, stage.params, stage.metrics, stage.series)
        self._log_datasets(run, [(dataset, stage.name) for dataset in stage.datasets])
        if artifacts.is_dir():
            self._client.log_artifacts(run, str(artifacts))
        self._client.set_terminated(run)

    def _delete(self, experiment: str, run: str) -> None:
        for model in self._client.search_logged_models([experiment], f"source_run_id = '{run}'"):
            self._client.delete_logged_model(model.model_id)
        self._client.delete_run(run)

    def _log_datasets(self, run: str, datasets: Sequence[tuple[Dataset, str]]) -> None:
        """``datasets`` with the stages that read them."""
        inputs = [
            DatasetInput(
                MlflowDataset(
                    name=dataset.path,
                    digest=dataset.md5,
                    source_type="local",
                    source=json.dumps({"uri": dataset.path}),
                    profile=json.dumps({"bytes": dataset.size, "files": dataset.files}),
                ),
                [InputTag(MLFLOW_DATASET_CONTEXT, readers)],
            )
            for dataset, readers in datasets
        ]
        if inputs:
            self._client.log_inputs(run, inputs)

    def _log_batches(
        self, run: str, params: Mapping[str, str], metrics: Mapping[str, float], series: Mapping[str, Series]
    ) -> None:
        now = int(time.time() * 1000)
        points = [(key, 0, value) for key, value in metrics.items()]
        points += [(key, step, value) for key, curve in series.items() for step, value in curve]
        for batch in in_parts([Param(key, value[:LONGEST_PARAM]) for key, value in params.items()], PARAMS_PER_CALL):
            self._client.log_batch(run, params=batch)
        for batch in in_parts([Metric(_name(key), value, now, step) for key, step, value in points], METRICS_PER_CALL):
            self._client.log_batch(run, metrics=batch)

    def _runs(self, experiment: str, tags: Mapping[str, str]) -> Iterator[Run]:
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        token = None
        while True:
            page = self._client.search_runs([experiment], wanted, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _experiment(self) -> str:
        """The experiment's id. A database file has its artifacts beside it, wherever this process was started."""
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        uri = self._client.tracking_uri
        database = uri.removeprefix("sqlite:///")
        place = (Path(database).parent / ARTIFACTS).as_uri() if database != uri else None
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=place))


def _name(key: str) -> str:
    """A metric's name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key)
