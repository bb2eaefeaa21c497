"""MLflow follows the files: whole, once and only once, and at no cost to the run when it is away."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import get_args

import diffusers
import mlflow
import numpy as np
import pytest
import torch
import yaml
from chromium import Browser
from disk import Killed
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import RESOLUTION, tiny_pipeline

from dspo.data.prompts import Prompt
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, initial_noise, sample, with_scheduler
from dspo.errors import UserError
from dspo.params import BaseModelParams, SamplerParams, Scheduler
from dspo.preference.dora import load_adapter
from dspo.tracking.champion import promote
from dspo.tracking.mlflow_sink import MlflowSink
from dspo.tracking.record import curves, numbers, read_lock
from dspo.tracking.sync import sync
from dspo.tracking.tuned_pipeline import SCHEDULERS

SAMPLER = SamplerParams(scheduler="dpmpp_2m", steps=2, guidance_scale=1.5)
REQUESTS = [SampleRequest(Prompt("p", "a red circle"), 0, 0)]
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
STAGES = """
import json, pathlib, shutil, sys, yaml
params = yaml.safe_load(open("params.yaml"))["worlds"]["shapes"]
def write(path, value):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
if sys.argv[1] == "train":
    shutil.copytree("prepared", "models/adapter", dirs_exist_ok=True)
    write("models/training/log.csv", f"step,loss,note\\n1,{params['train']['lr']},a\\n2,0.5,b\\n")
elif sys.argv[1] == "evaluate":
    low = params["evaluate"]["low"]
    rates = {}
    if low is not None:
        gold = {"win_rate": low + 0.1, "low": low, "high": low + 0.2, "n_decided": 300, "n_prompts": 100}
        rates = {"gold_overall": gold, "second": gold}
    write("data/evaluation/results.json", {"tuned_against_base": {"win_rates": rates}})
else:
    write("reports/summary.json", {"gold": {"win_rate": 0.8, "ci95": [0.7, 0.9], "n": 3, "none": None}})
    pathlib.Path("reports/plots").mkdir(exist_ok=True)
    shutil.copy("grid.png", "reports/plots")
    write("reports/index.html", "<p>figures</p>")
"""
PIPELINE = """
stages:
  train:
    cmd: python stages.py train
    params: [world, seed, "worlds.${world}.base", "worlds.${world}.train", "worlds.${world}.evaluate.sampler"]
    deps: [prepared, data/pairs]
    outs: [models/adapter, models/training]
  evaluate:
    cmd: python stages.py evaluate
    params: [world, "worlds.${world}.evaluate"]
    deps: [models/adapter, data/prompts.csv]
    outs: [data/evaluation]
  report:
    cmd: python stages.py report
    deps: [data/evaluation, models/training]
    outs: [reports/index.html: {cache: false}, reports/plots: {cache: false}]
    metrics: [reports/summary.json: {cache: false}]
artifacts:
  adapter: {path: models/adapter, type: model}
"""


def shell(folder: Path, *command: str) -> str:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    identity = {f"GIT_{who}_{what}": "tests@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), **identity}
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment).stdout


def base_params(models: Path) -> BaseModelParams:
    """A base like SDXL's in all that decides what is loaded: variant, a VAE of its own, bfloat16."""
    return BaseModelParams(
        model=str(models / "base"), revision=None, variant="fp16", vae=str(models / "vae"), vae_revision=None,
        dtype="bfloat16", resolution=RESOLUTION,
    )  # fmt: skip


def set_params(folder: Path, models: Path, lr: float, low: float | None) -> None:
    """``low``: end of the gold judge's interval; None: there is no such judge."""
    world = {
        "base": base_params(models).model_dump(),
        "train": {"lr": lr, "targets": ["to_k", "to_q"], "rank": 4, "loss": "dspo", "epochs": 2},
        "evaluate": {"low": low, "sampler": SAMPLER.model_dump()},
    }
    (folder / "params.yaml").write_text(json.dumps({"world": "shapes", "seed": 0, "worlds": {"shapes": world}}))


def dora_adapter(folder: Path) -> Path:
    """An adapter of the tiny UNet whose every tensor was moved away from its start; alpha is not the rank."""
    generator = torch.Generator().manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, use_dora=True, target_modules=TARGETS)
    model = get_peft_model(tiny_pipeline().unet, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after `dvc repro`; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("tracking")
    tiny_pipeline().save_pretrained(folder / "base", variant="fp16")
    tiny_pipeline(seed=1).vae.save_pretrained(folder / "vae")
    root = folder / "root"
    root.mkdir()
    dora_adapter(root / "prepared")
    set_params(root, folder, lr=0.1, low=0.6)
    (root / "data/pairs").mkdir(parents=True)
    (root / "data/pairs/pairs.csv").write_text("winner,loser\n")
    (root / "data/prompts.csv").write_text("prompt\na red circle\n")
    Image.new("RGB", (8, 8), "red").save(root / "grid.png")
    (root / "stages.py").write_text(STAGES)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / ".gitignore").write_text("/models/\n/data/evaluation\n/scratch/\n/mlflow.db*\n/mlartifacts/\n")
    shell(root, "git", "init", "--quiet")
    shell(root, "dvc", "init", "--quiet")
    shell(root, "dvc", "repro", "--quiet")
    MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_experiments()  # the tables, which take seconds to make
    shell(root, "git", "add", ".")
    shell(root, "git", "commit", "--quiet", "--message", "run")
    return root


@pytest.fixture
def root(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "root"))


@pytest.fixture
def uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def runs(uri: str) -> list[mlflow.entities.Run]:
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("dspo")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def parents(uri: str) -> list[mlflow.entities.Run]:
    return [run for run in runs(uri) if "mlflow.parentRunId" not in run.data.tags]


def test_a_run_is_mirrored_whole_and_only_once(root: Path, uri: str) -> None:
    assert shell(root / "models", "dspo", "sync") == "runs sent: 1\n"  # to mlflow.db at the root
    assert sync(uri, root) == []
    (parent,) = parents(uri)
    stages = {run.data.tags["dvc.stage"]: run for run in runs(uri) if run.info.run_id != parent.info.run_id}
    assert sorted(stages) == ["evaluate", "report", "train"]

    assert parent.data.params["train.lr"] == "0.1"
    assert parent.data.params["train.targets"] == '["to_k", "to_q"]'
    gold = {"win_rate": 0.8, "ci95.low": 0.7, "ci95.high": 0.9, "n": 3.0}
    assert parent.data.metrics == {f"summary.gold.{name}": value for name, value in gold.items()}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    tags = parent.data.tags
    assert tags["git.commit"] == head.strip()
    assert tags["git.dirty"] == "false"
    assert len(tags["dvc.lock_md5"]) == len(tags["dvc.params_md5"]) == 32

    client = MlflowClient(uri, uri)
    train = stages["train"]
    assert train.data.tags["dvc.dep.prepared"].endswith(".dir")
    curve = client.get_metric_history(train.info.run_id, "log.loss")
    assert [(point.step, point.value) for point in curve] == [(1, 0.1), (2, 0.5)]
    assert [item.path for item in client.list_artifacts(train.info.run_id)] == ["adapter_config.json", "log.csv"]
    artifacts = {item.path for item in client.list_artifacts(stages["report"].info.run_id)}
    assert artifacts == {"index.html", "summary.json", "grid.png"}
    assert list((root / "scratch/unsent").iterdir()) == []


def test_datasets_are_inputs_with_the_digest_that_dvc_gave_them(root: Path, uri: str) -> None:
    sync(uri, root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    md5 = {dep["path"]: dep["md5"] for stage in lock.values() for dep in stage["deps"]}
    by_stage = {run.data.tags.get("dvc.stage", "all"): run for run in runs(uri)}
    found = {
        stage: {one.dataset.name: (one.dataset.digest, one.tags[0].value) for one in run.inputs.dataset_inputs}
        for stage, run in by_stage.items()
    }
    assert md5["data/pairs"].endswith(".dir")
    expected = {"data/pairs": "train", "data/prompts.csv": "evaluate", "data/evaluation": "report"}
    assert found["all"] == {path: (md5[path], stage) for path, stage in expected.items()}
    assert found["train"] == {"data/pairs": (md5["data/pairs"], "train")}
    (pairs,) = (one.dataset for one in by_stage["train"].inputs.dataset_inputs)
    assert json.loads(pairs.profile) == {"bytes": len("winner,loser\n"), "files": 1}


def test_the_pages_say_what_a_person_wants_to_know(root: Path, uri: str, finished_run: Path) -> None:
    sync(uri, root)
    client = MlflowClient(uri, uri)
    (parent,) = parents(uri)
    run, experiment = parent.info.run_id, client.get_experiment(parent.info.experiment_id)
    picture = client.download_artifacts(run, "sample_grid.png", str(root))
    assert Path(picture).read_bytes() == (root / "grid.png").read_bytes()
    version = client.get_model_version("dspo-adapter-shapes", "1")
    for text in (experiment.tags["mlflow.note.content"], parent.data.tags["mlflow.note.content"], version.description):
        assert f"DoRA adapter of rank 4 for the UNet of `{finished_run.parent / 'base'}`" in text
        assert "| win rate over base, gold | 0.700 | 0.600 to 0.800 |" in text
        assert "| win rate over base, second judge | 0.700 | 0.600 to 0.800 |" in text
        assert f"(get-artifact?path=sample_grid.png&run_uuid={run})" in text
        assert all(parent.data.tags[name] in text for name in ("git.commit", "dvc.lock_md5", "dvc.params_md5"))
        assert version.tags["dvc.adapter_md5"] in text
    assert f"(#/experiments/{experiment.experiment_id}/runs/{run})" in version.description
    code = version.description.split("```")[1].removeprefix("python")
    compile(code, "description", "exec")
    assert 'load_model("models:/dspo-adapter-shapes@champion")' in code
    assert "height=32, width=32" in code

    said = client.get_registered_model("dspo-adapter-shapes").description
    assert "No version is `champion` yet." in said
    promote(uri, "shapes")
    said = client.get_registered_model("dspo-adapter-shapes").description
    assert said.endswith(version.description)
    assert "Champion: version 1" in said
    assert len(said) < 4000  # PostgreSQL holds 5000


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """MLflow's server over a folder, as `make mlflow` starts it; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "mlartifacts"]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *places]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes for jobs that nobody sends
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder.parent, env=environment, start_new_session=True, **output) as process:
        try:
            said = iter(process.stdout.readline, "")
            assert any("Application startup complete" in line for line in said), "the server ended"
            Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_the_pages_in_a_browser_after_the_folder_moved(
    root: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between a container and its host: what one wrote, the other shows."""
    sync(uri, root)
    promote(uri, "shapes")
    root = root.rename(tmp_path / "moved")
    monkeypatch.chdir(root)
    assert sync("sqlite:///mlflow.db", root) == []
    uri = f"sqlite:///{root / 'mlflow.db'}"
    (parent,) = parents(uri)
    picture = MlflowClient(uri).download_artifacts(parent.info.run_id, "sample_grid.png", str(tmp_path))
    assert Path(picture).read_bytes() == (root / "grid.png").read_bytes()

    browser = Browser(tmp_path / "profile")
    with closing(browser), served(root) as address:
        browser.open(address)
        for text in ("Model training", "Model registry", "dspo-adapter-shapes"):
            browser.click(text)
        browser.until("document.body.innerText.includes('Champion: version 1')")
        browser.until("[...document.images].some(one => one.src.includes('sample_grid.png') && one.naturalWidth)")
        browser.until("document.body.innerText.includes('@\\u00a0champion')")
        browser.picture(tmp_path / "model.png")
        cells = browser.js("[...document.querySelectorAll('td')].map(cell => cell.innerText)")
        assert {"win rate over base, gold", "0.700", "0.600 to 0.800"} <= set(cells)
        code = 'load_model("models:/dspo-adapter-shapes@champion")'
        assert code in browser.js("document.body.innerText")
        browser.click("Version 1")
        browser.until("document.body.innerText.includes('Registered At')")
        browser.until("document.body.innerText.includes('@\\u00a0champion')")
        assert browser.js("location.hash") == "#/models/dspo-adapter-shapes/versions/1"
        judged = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
        assert judged in browser.js("[...document.links].map(link => link.getAttribute('href'))")


def test_whoever_loads_the_champion_gets_the_images_that_were_judged(
    root: Path, uri: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(uri, root)
    promote(uri, "shapes")
    version = MlflowClient(uri, uri).get_model_version_by_alias("dspo-adapter-shapes", "champion")
    assert {"git.commit", "dvc.lock_md5", "dvc.params_md5", "dvc.adapter_md5"} <= version.tags.keys()
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which MLflow adds the version's own code
    mlflow.set_tracking_uri(uri)
    pipe = mlflow.pyfunc.load_model("models:/dspo-adapter-shapes@champion").get_raw_model()

    evaluated = load_pipeline(base_params(finished_run.parent), torch.device("cpu"))
    plain = next(sample(evaluated, REQUESTS, SAMPLER, RESOLUTION, seed=0, batch_size=1)).image
    evaluated.unet = load_adapter(evaluated.unet, root / "models/adapter")
    judged = next(sample(evaluated, REQUESTS, SAMPLER, RESOLUTION, seed=0, batch_size=1)).image
    assert (judged != plain).any()
    noise = initial_noise(REQUESTS, 0, (4, 4, 4)).bfloat16()
    size = {"height": RESOLUTION, "width": RESOLUTION}
    loaded = pipe("a red circle", latents=noise, num_inference_steps=2, guidance_scale=1.5, **size).images[0]
    assert (np.asarray(loaded) == judged).all()
    for name, (scheduler, options) in SCHEDULERS.items():
        ours = getattr(diffusers, scheduler).from_config(evaluated.scheduler.config, **options)
        assert with_scheduler(evaluated, name).scheduler.config == ours.config
    assert SCHEDULERS.keys() == set(get_args(Scheduler))


def test_only_an_adapter_that_the_gold_judge_prefers_becomes_champion(root: Path, uri: str) -> None:
    sync(uri, root)
    client = MlflowClient(uri, uri)
    assert client.get_registered_model("dspo-adapter-shapes").aliases == {}  # sending moves nothing
    assert promote(uri, "shapes").champion == 1
    set_params(root, root.parent, lr=0.2, low=0.4)
    config = root / "prepared/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout": 0.1', '"lora_dropout": 0.2'))
    shell(root, "dvc", "repro", "--quiet")
    assert len(sync(uri, root)) == 1
    with pytest.raises(UserError, match=r"version 2 is not promoted.*from 0.400, which is not above 0.5"):
        promote(uri, "shapes")
    assert client.get_model_version_by_alias("dspo-adapter-shapes", "champion").version == 1
    dirty = {run.data.params["train.lr"]: run.data.tags["git.dirty"] for run in parents(uri)}
    assert dirty == {"0.1": "false", "0.2": "true"}


def test_experiments_are_mirrored_under_their_names(root: Path, uri: str, finished_run: Path) -> None:
    sync(uri, root)
    revision = ("-S", "worlds.shapes.base.revision=v1.0")
    changed = ("-S", "worlds.shapes.train.lr=0.7", "-S", "worlds.shapes.evaluate.low=0.9", *revision)
    shell(root, "dvc", "exp", "run", "--quiet", "--temp", "-n", "hot", *changed)
    assert len(sync(uri, root)) == 1
    assert sync(uri, root) == []
    by_lr = {run.data.params["train.lr"]: run for run in parents(uri)}
    assert by_lr["0.7"].info.run_name == by_lr["0.7"].data.tags["dvc.exp_name"] == "hot"
    assert by_lr["0.7"].data.tags["dvc.baseline_rev"] == by_lr["0.1"].data.tags["git.commit"]
    said = by_lr["0.7"].data.tags["mlflow.note.content"]
    assert f"for the UNet of `{finished_run.parent / 'base'}` (revision `v1.0`)" in said
    assert "loss `dspo`, learning rate 0.7, 2 epochs, seed 0." in said
    # The same adapter from another learning rate: one version, and what an experiment says of it moves no gate.
    (version,) = MlflowClient(uri, uri).search_model_versions("name = 'dspo-adapter-shapes'")
    assert version.tags["gold.low"] == "0.6"


def test_an_adapter_that_is_judged_anew_has_the_new_figures(root: Path, uri: str, finished_run: Path) -> None:
    client, name = MlflowClient(uri, uri), "dspo-adapter-shapes"
    sync(uri, root)
    promote(uri, "shapes")
    made_by = client.get_model_version(name, "1").run_id
    for low, figure, refused in ((0.4, "| 0.500 |", "from 0.400"), (None, "No judge gave figures", "no win rate")):
        set_params(root, finished_run.parent, lr=0.1, low=low)
        shell(root, "dvc", "repro", "--quiet")
        assert len(sync(uri, root)) == 1
        (version,) = client.search_model_versions(f"name = '{name}'")
        assert version.run_id == made_by
        assert version.tags.get("gold.low") == (None if low is None else f"{low:g}")
        assert len([tag for tag in version.tags if tag.startswith("gold.")]) == (0 if low is None else 4)
        assert figure in version.description
        assert version.description in client.get_registered_model(name).description
        with pytest.raises(UserError, match=refused):
            promote(uri, "shapes", 1)


def test_an_experiment_in_the_workspace_is_one_run_and_keeps_its_name(root: Path, uri: str) -> None:
    shell(root, "dvc", "exp", "run", "--quiet", "-n", "here", "-S", "worlds.shapes.train.lr=0.7")
    sync(uri, root)
    assert [run.info.run_name for run in parents(uri)] == ["here"]
    shell(root, "dvc", "exp", "remove", "here")
    assert sync(uri, root) == []  # the workspace still holds that run


def test_two_experiments_with_equal_outcome_are_two_runs(root: Path, uri: str) -> None:
    shell(root, "dvc", "exp", "run", "--quiet", "-n", "one", "-S", "worlds.shapes.train.lr=0.7")
    tips = shell(root, "git", "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps/*/*/one").split()
    shell(root, "git", "update-ref", tips[0].replace("/one", "/other"), tips[1])
    assert len(sync(uri, root)) == 2
    assert sync(uri, root) == []
    assert sorted(run.info.run_name for run in parents(uri)) == ["one", "other"]
    of = {name: [run for run in runs(uri) if run.data.tags["dspo.key"] == key] for name, key in (
        (run.info.run_name, run.data.tags["dspo.key"]) for run in parents(uri))}  # fmt: skip
    assert [len(of[name]) for name in ("one", "other")] == [4, 4]


def test_what_a_silent_server_did_not_get_is_sent_later(root: Path, uri: str, silent_server: str) -> None:
    with pytest.raises(UserError, match="dspo sync"):
        sync(silent_server, root, first_timeout=1)
    set_params(root, root.parent, lr=0.3, low=0.6)  # the workspace moves on
    shell(root, "dvc", "repro", "--quiet")
    with pytest.raises(UserError, match="dspo sync"):
        sync("http://127.0.0.1:9", root, first_timeout=1)  # nothing listens there
    assert len(sync(uri, root)) == 2
    assert sorted(run.data.params["train.lr"] for run in parents(uri)) == ["0.1", "0.3"]


def test_a_dead_database_server_is_asked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.time.sleep", lambda _: pytest.fail("MLflow tries again"))
    with pytest.raises(UserError, match="dspo sync"):
        sync("postgresql+psycopg://mlflow:mlflow@127.0.0.1:9/mlflow", root)  # nothing listens there


@pytest.mark.parametrize(
    ("place", "method", "after", "missing"),
    [
        (MlflowSink, "_log_batches", False, 1),  # a run without anything
        (MlflowClient, "log_artifacts", True, 1),  # the first stage is there
        (MlflowClient, "create_model_version", False, 1),  # the model's files are there, and nothing points to them
        (MlflowClient, "create_model_version", True, 1),  # all is there but the mark
        (MlflowSink, "_finish", True, 0),  # all is there, and the copy waits still
    ],
)
def test_a_sync_that_died_and_is_repeated_leaves_one_of_each(
    root: Path, uri: str, monkeypatch: pytest.MonkeyPatch, place: type, method: str, after: bool, missing: int
) -> None:
    """``after``: it died right after the call of ``method``, else right before."""
    real = getattr(place, method)

    def die(*arguments: object, **named: object) -> None:
        if after:
            real(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, method, die)
        with pytest.raises(Killed):
            sync(uri, root)
    assert len(sync(uri, root)) == missing
    one_of_each(uri, root)


def test_a_sync_that_was_killed_and_is_repeated_leaves_one_of_each(root: Path, uri: str) -> None:
    """As a process, by a signal, in the middle of a transfer."""
    code = f"""
import os, signal
from pathlib import Path
from mlflow import MlflowClient
from dspo.tracking.sync import sync
from dspo.tracking.tuned_pipeline import SCHEDULERS
MlflowClient.create_model_version = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sync({uri!r}, Path({str(root)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(sync(uri, root)) == 1
    one_of_each(uri, root)


def one_of_each(uri: str, root: Path) -> None:
    """One run with its stages, one model, one version; nothing waits, and nothing more is sent."""
    assert sync(uri, root) == []
    (parent,) = parents(uri)
    assert len(runs(uri)) == 4
    assert {run.info.status for run in runs(uri)} == {"FINISHED"}
    client = MlflowClient(uri, uri)
    (version,) = client.search_model_versions("name = 'dspo-adapter-shapes'")
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert version.run_id == model.source_run_id == parent.info.run_id
    assert list((root / "scratch/unsent").iterdir()) == []


def test_outputs_that_are_not_those_of_the_lock_are_not_sent(root: Path, uri: str) -> None:
    log = root / "models/training/log.csv"
    log.unlink()
    log.write_text("step,loss\n1,0.0\n")
    assert sync(uri, root) == []


def test_without_a_run_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro"):
        sync(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)


def test_a_lock_whose_stages_ran_on_different_outputs_is_no_run() -> None:
    lock = """
stages:
  train: {outs: [{path: adapter, md5: new}]}
  report: {deps: [{path: adapter, md5: OLD}]}
"""
    assert read_lock(lock.encode()) is None
    assert read_lock(lock.replace("OLD", "new").encode()) is not None
    assert read_lock(b"") is None


def test_numbers_and_curves_of_files(tmp_path: Path) -> None:
    values = {"a": {"b": 1, "flag": True, "missing": None}, "text": "x", "list": [1, 2], "nan": float("nan")}
    assert dict(numbers(values)) == {"a.b": 1.0, "a.flag": 1.0}
    assert dict(numbers({"gold": {"ci95": [0.5, 0.7]}})) == {"gold.ci95.low": 0.5, "gold.ci95.high": 0.7}
    table = tmp_path / "table.csv"
    table.write_text("epoch,reward,name\n0,0.5,x\n1,,y\n2,0.7,z\n")
    assert curves(table) == {"reward": [(0, 0.5), (2, 0.7)]}
    table.write_text("epoch,part,reward\n0,1,0.5\n0,2,0.6\n")
    assert curves(table) == {}
