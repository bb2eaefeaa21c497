"""MLflow as a sink: one run per run of the pipeline, with one nested run per stage."""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from dspo.tracking.record import LAST, RunRecord, Series, StageRecord
from dspo.tracking.registry import register
from dspo.tracking.server import patience

Item = TypeVar("Item")
EXPERIMENT = "dspo"
KEY, COMPLETE = "dspo.key", "dspo.complete"
PARAMS_PER_CALL, METRICS_PER_CALL, LONGEST_PARAM = 100, 1000, 6000  # MLflow's limits


class MlflowSink:
    """``uri``: explicit, absolute. ``first_timeout``: seconds that the server has for its first answer.

    Every method raises MlflowException or OSError if the server is dead, slow or refuses.
    """

    def __init__(self, uri: str, first_timeout: int) -> None:
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._first_timeout = first_timeout

    def keys(self) -> set[str]:
        """Keys of the runs that are wholly there. Asks once, without patience."""
        patience(self._first_timeout, retries=0)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        patience(120, retries=1)  # an adapter's upload may be silent for a while
        if experiment is None:
            return set()
        return {run.data.tags[KEY] for run in self._runs(experiment.experiment_id, {COMPLETE: "true"})}

    def send(self, record: RunRecord, folder: Path) -> None:
        """Send a record and the files beside it. What an earlier attempt left unfinished is replaced."""
        experiment = self._experiment()
        for run in self._runs(experiment, {KEY: record.key}):
            self._client.delete_run(run.info.run_id)
        tags = {**record.tags, KEY: record.key, "world": record.world}
        name = record.tags.get("dvc.exp_name") or record.key[:8]
        parent = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        # Runs are compared by their parents: these carry all parameters, and the figures of the report.
        headline = next((stage.metrics for stage in record.stages if stage.name == LAST), {})
        params = {key: value for stage in record.stages for key, value in stage.params.items()}
        self._log_batches(parent, params, headline, {})
        for stage in record.stages:
            self._send_stage(experiment, parent, record.key, stage, folder / "artifacts" / stage.name)
        register(self._client, parent, record, folder / "adapter")
        self._client.set_tag(parent, COMPLETE, "true")
        self._client.set_terminated(parent)

    def _send_stage(self, experiment: str, parent: str, key: str, stage: StageRecord, artifacts: Path) -> None:
        tags = {"mlflow.parentRunId": parent, "dvc.stage": stage.name, KEY: key, **stage.tags}
        run = self._client.create_run(experiment, run_name=stage.name, tags=tags).info.run_id
        self._log_batches(run, stage.params, stage.metrics, stage.series)
        if artifacts.is_dir():
            self._client.log_artifacts(run, str(artifacts))
        self._client.set_terminated(run)

    def _log_batches(
        self, run: str, params: Mapping[str, str], metrics: Mapping[str, float], series: Mapping[str, Series]
    ) -> None:
        now = int(time.time() * 1000)
        points = [(key, 0, value) for key, value in metrics.items()]
        points += [(key, step, value) for key, curve in series.items() for step, value in curve]
        for batch in _batches([Param(key, value[:LONGEST_PARAM]) for key, value in params.items()], PARAMS_PER_CALL):
            self._client.log_batch(run, params=batch)
        for batch in _batches([Metric(_name(key), value, now, step) for key, step, value in points], METRICS_PER_CALL):
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
        database = self.uri.removeprefix("sqlite:///")
        place = (Path(database).parent / "mlartifacts").as_uri() if database != self.uri else None
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=place))


def _name(key: str) -> str:
    """A metric's name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
