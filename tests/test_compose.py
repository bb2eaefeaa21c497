"""The services of compose.yaml in their own wiring, end to end and without Docker.

A network namespace with names of its own stands in for the containers' network: in it the services' names and ports are
those of compose.yaml, and every command, environment and health check is read from there. PostgreSQL is the system's
own; moto takes the place of the S3 server. What this does not try is the images.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import ROOT, tiny_run

__all__ = ["tiny_run"]  # a fixture
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
AS_ROOT = os.geteuid() == 0
ONE_WORKER = {"MLFLOW_WORKERS": "1"}  # the others are like it, and each imports MLflow
NEW_NETWORK = ["unshare", "--net", "--mount", *([] if AS_ROOT else ["--user", "--map-current-user", "--keep-caps"])]
LOOPBACK = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))"
UPLOADED = """
import json, mlflow
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("dspo")
runs = {run.data.tags.get("dvc.stage", "whole"): run for run in client.search_runs([experiment.experiment_id])}
(version,) = client.search_model_versions("name = 'dspo-adapter-shapes'")
print(json.dumps({
    "stages": sorted(runs),
    "uri": runs["report"].info.artifact_uri,
    "images": runs["whole"].data.metrics["summary.evaluation.gold.n_images"],
    "report": [file.path for file in client.list_artifacts(runs["report"].info.run_id)],
    "page": client.download_artifacts(runs["report"].info.run_id, "index.html"),
    "adapter": version.tags["dvc.adapter_md5"],
    "description": version.description,
}))
"""
IN_STORAGE = """
import boto3, hashlib, json, os
bucket = boto3.resource("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"]).Bucket("mlflow")
print(json.dumps({item.key: hashlib.md5(item.get()["Body"].read()).hexdigest() for item in bucket.objects.all()}))
"""
ASK_AS = """
import sys, urllib.error, urllib.request
url = "http://mlflow:5000/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
try:
    print(urllib.request.urlopen(urllib.request.Request(url, headers={"Host": sys.argv[1]})).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def why_not() -> str | None:
    if POSTGRES is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if importlib.util.find_spec("psycopg") is None:
        return "MLflow's driver of PostgreSQL is not installed: psycopg[binary]"
    if not shutil.which("unshare") or subprocess.run([*NEW_NETWORK, "true"], capture_output=True).returncode:
        return "no network namespaces here (unshare --net)"
    return None


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None and "CI" not in os.environ, reason=str(REASON))


def defaults(value: Any) -> Any:
    """A value of compose.yaml as it is without a .env: every ``${NAME:-default}`` is its default."""
    if isinstance(value, dict):
        return {key: defaults(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [defaults(inner) for inner in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


SERVICES: dict[str, dict[str, Any]] = defaults(
    yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
)


@dataclass
class Network:
    """What the services run in. ``folder`` is every process's home and, unless said, where it works."""

    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(SERVICES)}\n")
        prepare = (
            f'{sys.executable} -c "{LOOPBACK}" && mount --bind {hosts} /etc/hosts && echo ready && exec sleep 3600'
        )
        holder = subprocess.Popen([*NEW_NETWORK, "sh", "-c", prepare], stdout=subprocess.PIPE, start_new_session=True)
        self.started.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"

    def _enter(self, command: Sequence[str], cwd: Path) -> list[str]:
        user = [] if AS_ROOT else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self.started[0].pid}", "--net", "--mount", *user, f"--wd={cwd}", *command]

    def _environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{POSTGRES}:{os.defpath}"
        given = {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        return given | dict(environment)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    self._enter(command, self.folder), env=self._environment(environment),
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._enter(command, cwd or self.folder), env=self._environment(environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip

    def until(self, name: str, check: Sequence[str], seconds: float = 300.0) -> None:
        """Wait for a service until its check holds."""
        end = time.monotonic() + seconds
        while (done := self.run(check, SERVICES[name].get("environment", {}))).returncode:
            log = (self.folder / f"{name}.log").read_text()
            assert self.started[-1].poll() is None and time.monotonic() < end, f"{name}: {done.stdout}\n{log}"
            time.sleep(0.5)

    def stop(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def start_postgres(network: Network) -> None:
    """As the image does it from POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB; the server refuses to run as root."""
    settings = SERVICES["postgres"]["environment"]
    user, password, data = settings["POSTGRES_USER"], network.folder / "password", network.folder / "database"
    password.write_text(settings["POSTGRES_PASSWORD"])
    data.mkdir(0o700)
    as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if AS_ROOT else []
    if AS_ROOT:
        shutil.chown(data, "postgres", "postgres")
    access = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--username={user}", f"--pwfile={password}"]
    made = network.run([*as_owner, "initdb", f"--pgdata={data}", "--encoding=UTF8", "--no-sync", *access], {})
    assert made.returncode == 0, made.stdout
    network.start("postgres", [*as_owner, "postgres", "-D", str(data), "-k", str(data), "-h", "*"], {})
    network.until("postgres", ["env", f"PGHOST={data}", "pg_isready", "-U", user])
    made = network.run(["env", f"PGHOST={data}", "createdb", "-U", user, settings["POSTGRES_DB"]], {})
    assert made.returncode == 0, made.stdout
    network.until("postgres", ["env", f"PGHOST={data}", *health("postgres")])


def health(name: str) -> list[str]:
    kind, *command = SERVICES[name]["healthcheck"]["test"]
    assert kind == "CMD"
    return command


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """`docker compose up`: all services, each started when what it depends on is healthy."""
    assert REASON is None, REASON  # under CI all of it is there
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        network = Network(Path(name))
        try:
            start_postgres(network)
            network.start("storage", ["moto_server", "-H", "0.0.0.0", "-p", "9000"], {})
            reachable = "import socket; socket.create_connection(('storage', 9000)).close()"
            network.until("storage", ["python", "-c", reachable])
            for _ in range(2):  # the second time as after `docker compose down`
                done = network.run(SERVICES["bucket"]["command"], SERVICES["bucket"]["environment"])
                assert done.returncode == 0, done.stdout
            network.start("mlflow", SERVICES["mlflow"]["command"], SERVICES["mlflow"]["environment"] | ONE_WORKER)
            network.until("mlflow", health("mlflow"))
            yield network
        finally:
            network.stop()


def python(network: Network, service: str, code: str, *arguments: str) -> str:
    done = network.run(["python", "-c", code, *arguments], SERVICES[service]["environment"])
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "status"), [("mlflow:5000", "200"), ("localhost:5000", "200"), ("127.0.0.1:5000", "200"), ("evil", "403")]
)
def test_the_server_answers_to_its_names_and_no_other(network: Network, name: str, status: str) -> None:
    assert python(network, "pipeline", ASK_AS, name) == status


def test_the_one_off_sends_its_run_to_the_database_and_the_storage(
    network: Network, tiny_run: Path, tmp_path: Path
) -> None:
    """`docker compose run --rm pipeline` after a sync that found no server, and what is then in each service."""
    workspace = Path(shutil.copytree(tiny_run, tmp_path / "workspace"))
    code = {"PYTHONPATH": f"{workspace}/src", "DSPO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    pipeline = SERVICES["pipeline"]
    away = {"MLFLOW_TRACKING_URI": "http://mlflow:9"}  # nothing listens there
    done = network.run(["dspo", "sync"], pipeline["environment"] | code | away, cwd=workspace)
    (waiting,) = (workspace / "scratch/unsent").iterdir()
    assert done.returncode == 2
    said = f"error: http://mlflow:9: MLflow did not take the runs; `dspo sync` sends what waits in {waiting.parent}."
    assert said in done.stdout
    done = network.run(pipeline["command"], pipeline["environment"] | code, cwd=workspace)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("runs sent: 1\n")
    assert network.run(["dspo", "sync"], pipeline["environment"] | code, cwd=workspace).stdout == "runs sent: 0\n"
    assert not (workspace / "mlflow.db").exists()

    there = json.loads(python(network, "pipeline", UPLOADED))
    stages = yaml.safe_load((workspace / "dvc.lock").read_text())["stages"]
    assert there["stages"] == sorted([*stages, "whole"])
    summary = json.loads((workspace / "reports/summary.json").read_text())
    assert there["images"] == summary["evaluation"]["gold"]["n_images"]
    assert "index.html" in there["report"]
    assert Path(there["page"]).read_bytes() == (workspace / "reports/index.html").read_bytes()
    adapter = next(out["md5"] for out in stages["train"]["outs"] if out["path"] == "models/adapter")
    assert there["adapter"] == adapter

    gold = json.loads((workspace / "data/evaluation/results.json").read_text())
    gold = gold["tuned_against_base"]["win_rates"]["gold_overall"]
    figures = f"{gold['win_rate']:.3f} | {gold['low']:.3f} to {gold['high']:.3f}"
    base = next(dep["md5"] for dep in stages["train"]["deps"] if dep["path"] == "models/shapes-sdxl")
    for line in (
        f"DoRA adapter of rank 2 for the UNet of `models/shapes-sdxl` (a folder of this repository, md5 `{base}`)",
        f"| win rate over base, gold | {figures} |",
        f"The gold judge decided {gold['n_decided']} images.",
        "**Load it** from the repository's root, which holds the base",
        'load_model("models:/dspo-adapter-shapes@champion")',
        "dict(num_inference_steps=1, guidance_scale=1, height=64, width=64)",
        "`models/shapes-sdxl` in float32, sampled by `ddim`",
    ):
        assert line in there["description"]
    done = network.run(["dspo", "promote"], pipeline["environment"] | code, cwd=workspace)
    assert done.returncode == 2
    assert f"version 1 is not promoted. The gold judge decided {gold['n_decided']} images" in done.stdout

    # Clients know of the server alone; the files are in the storage, byte for byte.
    assert there["uri"].startswith("mlflow-artifacts:/")
    stored = json.loads(python(network, "mlflow", IN_STORAGE))
    page = f"{there['uri'].removeprefix('mlflow-artifacts:/')}/index.html"
    assert stored[page] == hashlib.md5((workspace / "reports/index.html").read_bytes()).hexdigest()
    assert any(key.endswith(".safetensors") for key in stored)

    settings = SERVICES["postgres"]["environment"]
    count = ["psql", "-h", "postgres", "-U", settings["POSTGRES_USER"], "-d", settings["POSTGRES_DB"], "-Atc"]
    password = {"PGPASSWORD": settings["POSTGRES_PASSWORD"]}
    assert network.run([*count, "select count(*) from runs"], password).stdout.strip() == str(len(stages) + 1)
    assert "password authentication failed" in network.run([*count, "select 1"], {"PGPASSWORD": "guessed"}).stdout
