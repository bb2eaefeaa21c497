"""One process or several, killed or not: the same candidates, pairs, images and scores, and the same adapter."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from disk import contents
from safetensors.torch import load_file

from dspo.data.codecs import encode, encoder
from dspo.data.images import Pixels, decode_image, read_shards
from dspo.params import ImageFormat, load_params

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# What docs/scaling.md promises: the order in which gradients are summed is all that differs.
ADAPTER_TOLERANCE = 1e-2  # of the learning rate, for each parameter
LOSS_TOLERANCE = 1e-5  # relative


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, `two` (processes), `killed` and `batch` that several.py fills."""
    folder = tmp_path_factory.mktemp("several")
    python(TESTS / "several.py", folder)
    return folder


def python(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    places = {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | places | (env or {}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("what", ["candidates", "pairs", "images"])
def test_two_processes_write_the_bytes_of_one(runs: Path, what: str) -> None:
    alone = contents(runs / "one" / what)
    assert len(alone) == {"candidates": 5, "pairs": 6, "images": 4}[what]
    assert contents(runs / "two" / what) == alone


def test_two_processes_judge_as_one(runs: Path) -> None:
    alone, together = (json.loads((runs / name / "scores.json").read_text()) for name in ("one", "two"))
    assert together == alone
    whole, few = alone["base"]["reward_overall"], alone["few"]["reward_overall"]
    assert len(set(whole)) == 7
    assert few == whole[4:5]


def assert_same_training(runs: Path, name: str) -> None:
    ours, alone = (load_file(runs / place / "adapter" / "adapter_model.safetensors") for place in (name, "one"))
    lr = load_params(runs / "params.yaml").active.train.lr
    assert ours.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=ADAPTER_TOLERANCE * lr)
    moved = [tensor.abs().max().item() for key, tensor in alone.items() if "lora_B" in key]
    assert min(moved) > lr  # what is compared is no adapter that stayed where it began
    for table in ("log.csv", "epochs.csv"):
        for row, expected in zip(
            rows(runs / name / "training" / table), rows(runs / "one" / "training" / table), strict=True
        ):
            assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=LOSS_TOLERANCE)
            assert row.keys() == expected.keys()
    chosen = [json.loads((runs / place / "training" / "metrics.json").read_text()) for place in (name, "one")]
    assert chosen[0]["best_epoch"] == chosen[1]["best_epoch"]
    assert chosen[0]["reward"] == pytest.approx(chosen[1]["reward"], abs=1e-3)


def test_two_processes_train_the_adapter_of_one(runs: Path) -> None:
    assert_same_training(runs, "two")


def test_process_killed_in_training_goes_on_with_another_number(runs: Path) -> None:
    """Rank 1 of 2 dies in step 3 of 4; one process takes up the checkpoint of step 2."""
    assert json.loads((runs / "step.json").read_text()) == 2
    assert_same_training(runs, "killed")


def test_process_killed_while_sampling_costs_the_shard_it_was_at(runs: Path) -> None:
    """Rank 1 of 2 dies in its second shard, of 1 and 3; three processes go on."""
    left = json.loads((runs / "left.json").read_text())
    assert "00001.parquet" in left
    assert "00003.parquet" not in left
    assert contents(runs / "killed" / "candidates") == contents(runs / "one" / "candidates")


def test_batch_size_shows_in_the_last_bits_alone(runs: Path) -> None:
    twos, threes = (read_shards(runs / name / "candidates").to_pylist() for name in ("one", "batch"))
    for a, b in zip(twos, threes, strict=True):
        assert (a["prompt_id"], a["sample_index"]) == (b["prompt_id"], b["sample_index"])
        images = [decode_image(row["image"], "row").astype(int) for row in (a, b)]
        assert np.abs(images[0] - images[1]).max() <= 1
        latents = [np.frombuffer(row["latent"], "<f2").astype(np.float32) for row in (a, b)]
        np.testing.assert_allclose(*latents, atol=2e-3)


def test_launcher_of_the_environment_starts_the_processes(tmp_path: Path) -> None:
    """As a user does: `DSPO_LAUNCH=… python -m …`, by accelerate's own launcher."""
    launch = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    env = {"DSPO_LAUNCH": launch, "DSPO_SCRATCH": str(tmp_path / "scratch"), "DSPO_DEVICE": "cpu"}
    output = tmp_path / "output"
    python("-m", "launched", output, env=env)
    (written,) = (json.loads(path.read_text()) for path in output.iterdir())
    assert written == {"all": [0, 1, 2, 3, 4, 5, 6], "own": [0, 1, 4, 5], "sum": 3.0, "processes": 2}
    assert not list((tmp_path / "scratch").rglob("*.json"))


STAND_INS = {
    "dvc": f"""#!/bin/sh
exec {sys.executable} -c 'import os
from dspo.environment import launcher
command = [*launcher(), "--module", "dspo.stages.train", "--params", "a file"]
os.execvp(command[0], command)'
""",
    "scontrol": "#!/bin/sh\necho node-a\necho node-b\n",
    "srun": '#!/bin/sh\nSLURM_NODEID=3 exec "$@"\n',
    "accelerate": '#!/bin/sh\nprintf "%s\\n" "$@"\n',
}


@pytest.mark.parametrize(("start", "processes", "machines"), [("DSPO_LAUNCH=", 8, 1), ("#!/bin/bash", 32, 4)])
def test_commands_of_the_page_are_ones_that_the_launcher_takes(
    tmp_path: Path, start: str, processes: int, machines: int
) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    command = page[page.index(start) : page.index("`", page.index(start))]
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}", "PYTHONPATH": str(ROOT / "src"), "SLURM_JOB_NODELIST": "node-[a-b]"}
    given = subprocess.run(["bash", "-c", command], env=env, check=True, capture_output=True, text=True).stdout
    name, *arguments = given.splitlines()
    parsed = launch_command_parser().parse_args(arguments)
    assert (name, parsed.num_processes, parsed.multi_gpu, parsed.module) == ("launch", processes, True, True)
    assert [parsed.training_script, *parsed.training_script_args] == ["dspo.stages.train", "--params", "a file"]
    if machines > 1:
        assert (parsed.num_machines, parsed.machine_rank, parsed.main_process_ip) == (machines, 3, "node-a")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_workers_encode_large_images_to_the_same_bytes(image_format: ImageFormat) -> None:
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    alone = encode(smooth, image_format)
    decoded = decode_image(alone, "here")
    assert np.abs(decoded.astype(int) - smooth).mean() < {"png": 1e-9, "jpeg": 2, "webp": 2}[image_format]
    with encoder(image_format, 64) as inline:
        assert inline.submit(smooth).result() == alone


def test_workers_give_the_same_bytes_in_another_process() -> None:
    image: Pixels = np.arange(600 * 8 * 3, dtype=np.uint8).reshape(600, 8, 3)
    with encoder("webp", 1024) as workers:
        futures = [workers.submit(image), workers.submit(image[::-1])]
        assert workers._pool is not None
        assert os.getpid() not in workers._pool._processes
        assert [future.result() for future in futures] == [encode(image, "webp"), encode(image[::-1], "webp")]
