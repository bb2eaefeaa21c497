"""`mlflow models serve` of the champion: a prompt by HTTP, an image back, as docs/registry.md tells it."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from test_tracking import dora_adapter
from tiny import RESOLUTION, save_tiny_pipeline

from dspo.tracking.champion import promote
from dspo.tracking.record import EVALUATE, TRAIN, RunRecord, StageRecord
from dspo.tracking.registry import register

PATIENCE = 300  # seconds until the server answers; it imports torch and diffusers first
GOLD = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "n_decided": 300.0}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database whose champion is an adapter of ``base``, a folder beside it with a relative name."""
    root = tmp_path_factory.mktemp("serving")
    save_tiny_pipeline(root / "base")
    sampler = {
        "base.model": "base",
        "base.dtype": "float32",
        "base.resolution": str(RESOLUTION),
        "evaluate.sampler.scheduler": "ddim",
        "evaluate.sampler.steps": "2",
        "evaluate.sampler.guidance_scale": "1.5",
    }
    settings = {"train.rank": "4", "train.loss": "dspo", "train.lr": "0.1", "train.epochs": "1", "seed": "0"}
    judged = {f"results.tuned_against_base.win_rates.gold_overall.{name}": value for name, value in GOLD.items()}
    hashes = {"git.commit": "0", "git.dirty": "false", "dvc.lock_md5": "0", "dvc.params_md5": "0"}
    record = RunRecord(
        "key", "content", "shapes", "base", None, "md5", hashes,
        [StageRecord(TRAIN, sampler | settings, {}, {}, {}), StageRecord(EVALUATE, {}, judged, {}, {})],
    )  # fmt: skip
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("dspo", artifact_location=(root / "mlartifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    register(client, experiment, run, record, dora_adapter(root / "adapter"))
    promote(uri, "shapes")
    return root


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[str]:
    """The address of the server that docs/registry.md starts, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (registry / "elsewhere").mkdir()  # a version is served where this project is not installed
    (registry / "elsewhere/dspo.py").write_text("raise ModuleNotFoundError('dspo')")
    environment = {
        "PYTHONPATH": str(registry / "elsewhere"),
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{registry / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(PATIENCE),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(registry),
    }
    program = Path(sys.executable).with_name("mlflow")
    champion = "models:/dspo-adapter-shapes@champion"
    said = (registry / "server.log").open("w")
    process = subprocess.Popen(
        [program, "models", "serve", "-m", champion, "--env-manager", "local", "--port", str(port)],
        cwd=registry, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + PATIENCE
    while True:
        try:
            urlopen(f"{address}/ping", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (registry / "server.log").read_text()
            assert time.monotonic() < end, (registry / "server.log").read_text()
            time.sleep(0.5)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)
    said.close()


def ask(server: str, question: object) -> list[str]:
    body = json.dumps(question).encode()
    request = Request(f"{server}/invocations", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=PATIENCE) as answer:
        return list(json.load(answer)["predictions"])


def test_the_champion_answers_a_prompt_with_an_image(server: str) -> None:
    """Of the size that the judged images had; another one where the caller wants that."""
    (answer,) = ask(server, {"inputs": {"prompt": ["a red circle"]}})
    image = Image.open(io.BytesIO(base64.b64decode(answer)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (RESOLUTION, RESOLUTION))
    assert np.asarray(image).std() > 1
    params = {"num_inference_steps": 1, "width": 2 * RESOLUTION, "guidance_scale": 1.0}
    two = ask(server, {"inputs": {"prompt": ["a red circle", "a blue star"]}, "params": params})
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in two]
    assert sizes == [(2 * RESOLUTION, RESOLUTION)] * 2


def test_a_question_without_a_prompt_is_refused(server: str) -> None:
    with pytest.raises(HTTPError) as refused:
        ask(server, {"inputs": {"text": ["a red circle"]}})
    assert refused.value.code == 400
    assert "prompt" in refused.value.read().decode()
