"""The commands, as a shell sees them and from inside."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from chromium import Browser, clean
from disk import Killed, contents
from gallery import assert_page
from peft import PeftModel
from PIL import Image
from reward_tiny import make_clip, reward_params
from safetensors.torch import save_file
from tiny import RESOLUTION, save_tiny_pipeline, tiny_unet
from typer.testing import CliRunner

from dspo import estimate, quick_train
from dspo.check import check_setup
from dspo.cli import app, main
from dspo.diffusion import candidates, sampling
from dspo.dry_run import size
from dspo.errors import UserError
from dspo.params import load_params
from dspo.preference import trainer
from dspo.preference.dora import add_dora
from dspo.quick_train import with_pairs_per_prompt
from dspo.reward.backbone import weights_sha256
from dspo.reward.checkpoint import save_reward
from dspo.reward.model import build_model
from dspo.reward.training import Trained, current_weights
from dspo.stages import train as train_stage

SHIPPED = Path(__file__).parents[1] / "params.yaml"
PROMPTS = ["a red circle", "../../x", "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base model and an adapter of it that changes images."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pipeline(folder / "base")
    write_adapter(folder / "adapter", str(folder / "base"), value=0.05)
    return folder


def write_adapter(folder, base, value, unet=None):
    adapter = add_dora(unet or tiny_unet(), load_params(SHIPPED).active.train, seed=0)
    state = adapter.state()
    adapter.load({name: t + value if "lora_B" in name else t for name, t in state.items()})
    adapter.save(folder, base)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """An untrained reward model, whose overall score is its tiny CLIP's cosine."""
    folder = tmp_path_factory.mktemp("reward")
    params = reward_params(make_clip(folder / "clip"))
    model = build_model(params, seed=0, device=torch.device("cpu"))
    weights = current_weights(model)
    temperatures = dict.fromkeys(model.heads, 1.0)
    trained = Trained(ema=weights, raw=weights, curve=[])
    save_reward(folder / "reward", model, trained, params, temperatures, [], weights_sha256(model.backbone.clip))
    return folder / "reward"


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    """A working folder whose params.yaml has the tiny base model and two sampling steps."""
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(SHIPPED.read_text())
    world = raw["worlds"]["shapes"]
    world["base"] |= {"model": str(models / "base"), "resolution": RESOLUTION}
    sampler = {"scheduler": "ddim", "steps": 2, "guidance_scale": 2.0}
    world["generate"] |= {"samplers": [sampler], "candidates_per_sampler": 2}
    world["train"] |= {"rank": 4, "alpha": 4, "batch_size": 2, "epochs": 2, "checkpoint_every_steps": 1}
    world["evaluate"] |= {"sampler": sampler, "batch_size": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    lines = "".join(f'"{prompt}"\n' for prompt in PROMPTS)
    (tmp_path / "prompts.csv").write_text("prompt\n" + lines)
    return tmp_path


def call(*argv):
    return CliRunner().invoke(app, list(map(str, argv)), catch_exceptions=False)


def generate(model, output="out", *more):
    return call("batch-generate", "--model", model, "--prompts", "prompts.csv", "--output", output, *more)


COMMANDS = {
    "check": "Begin",
    "train": "Train",
    "import-pairs": "Train",
    "batch-generate": "Use what was trained",
    "export": "Use what was trained",
    "compare": "Look closely",
    "explain": "Look closely",
    "sync": "Keep records",
    "promote": "Keep records",
    "rollback": "Keep records",
}
ASKED = """
import sys
from dspo.cli import app
try:
    app()
finally:
    print("costly:", sorted({"torch", "numpy", "diffusers", "mlflow", "pandas", "dvc"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train"]])
def test_help_and_mistakes_import_nothing_that_takes_long(words):
    done = subprocess.run([sys.executable, "-c", ASKED, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "costly: []"
    assert done.returncode == (0 if "--help" in words else 2)


def test_help_has_groups_and_examples_and_whole_names_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = call("--help").stdout
    place = [told.index(f"─ {group} ─") for group in dict.fromkeys(COMMANDS.values())]
    rows = {name: told.index(f"\n│ {name} ") for name in COMMANDS}
    groups = list(dict.fromkeys(COMMANDS.values()))
    for name, group in COMMANDS.items():
        assert sum(start < rows[name] for start in place) - 1 == groups.index(group)
    assert "Examples:" in told and "dspo train --prompts prompts.csv --dry-run" in told
    for name in COMMANDS:
        told = call(name, "--help").stdout
        assert f"Example: dspo {name}" in told and "…" not in told


BASH = """
dspo --install-completion >/dev/null
source ~/.bashrc
complete -p dspo
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dspo_completion dspo "${@: -1}"; echo "${COMPREPLY[@]}"; }
ask dspo ""
ask dspo tr
ask dspo train --gr
ask dspo explain --
ask dspo train --prompts pr
"""


def test_bash_completes_commands_and_options_once_it_is_installed(tmp_path):
    """As a new shell would; where nothing is offered, bash completes names of files."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", BASH], capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path), "PATH": path}
    )
    how, *told = done.stdout.split("\n")[:-1]
    assert how.startswith("complete -o default ") and done.stderr == ""
    commands, *rest = (line.split() for line in told)
    assert set(commands) == set(COMMANDS)
    assert rest == [["train"], ["--gradient-accumulation-steps"], ["--output", "--reward-model", "--help"], []]


@pytest.mark.parametrize(("shell", "words"), [("zsh", "dspo train --dry"), ("fish", "dspo train --dry")])
def test_the_other_shells_are_answered_in_their_form(shell, words):
    """As the installed script asks: typer's own protocol, through the environment."""
    asked = {"_DSPO_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
    asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    program = Path(sys.executable).with_name("dspo")
    done = subprocess.run([program], capture_output=True, text=True, env=os.environ | asked)
    assert "--dry-run" in done.stdout and "--epochs" not in done.stdout


def test_one_image_per_prompt_and_seed_with_a_manifest(folder, models):
    assert generate(models / "adapter", "out", "--seeds", 2).exit_code == 0
    rows = [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert sorted(str(p.relative_to(folder / "out")) for p in (folder / "out" / "images").iterdir()) == sorted(
        row["file_name"] for row in rows
    )
    sizes = {Image.open(folder / "out" / row["file_name"]).size for row in rows}
    assert sizes == {(RESOLUTION, RESOLUTION)}
    assert {p.name for p in folder.iterdir()} == {"params.yaml", "prompts.csv", "out"}


def test_run_again_makes_the_missing_images_alone_and_the_same_bytes(folder, models):
    generate(models / "adapter")
    whole = contents(folder / "out")
    _kept, *removed = sorted((folder / "out" / "images").iterdir())
    for path in (*removed, folder / "out" / "manifest.jsonl"):
        path.unlink()
    generate(models / "adapter")
    assert contents(folder / "out") == whole
    modified = {p: p.stat().st_mtime_ns for p in (folder / "out" / "images").iterdir()}
    generate(models / "adapter")
    assert {p: p.stat().st_mtime_ns for p in modified} == modified


def test_the_adapter_is_used(folder, models, tmp_path):
    generate(models / "adapter", "tuned")
    write_adapter(tmp_path / "untrained", str(models / "base"), value=0.0)
    generate(tmp_path / "untrained", "base")
    tuned, base = (contents(folder / name / "images") for name in ("tuned", "base"))
    assert tuned.keys() == base.keys()
    assert all(tuned[name] != base[name] for name in tuned)


def test_output_of_another_adapter_or_setting_is_refused(folder, models, tmp_path):
    generate(models / "adapter")
    write_adapter(tmp_path / "other", str(models / "base"), value=0.0)
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"out: holds images made with another adapter\. Give another --output"):
            generate(tmp_path / "other", "out", *more)
    text = (folder / "params.yaml").read_text().replace("steps: 2", "steps: 3")
    (folder / "params.yaml").write_text(text)
    with pytest.raises(UserError, match="made with another sampler"):
        generate(models / "adapter")


def test_adapter_of_another_base_is_refused(folder, models, tmp_path):
    write_adapter(tmp_path / "named", "stabilityai/stable-diffusion-xl-base-1.0", value=0.0)
    with pytest.raises(
        UserError, match=r"was trained on 'stabilityai/stable-diffusion-xl-base-1.0', the base model here"
    ):
        generate(tmp_path / "named")
    assert generate(tmp_path / "named", "out", "--model-name", models / "base").exit_code == 0
    raw = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    for wrong in ({"target_modules": ["to_k"]}, {"r": raw["r"] + 1}):
        (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(raw | wrong))
        with pytest.raises(UserError, match="does not fit the base model's UNet"):
            generate(tmp_path / "named", "other", "--model-name", models / "base")
    generate(models / "adapter", "other")  # the folder is still nobody's


@pytest.mark.parametrize("name", ["none", "someone/some-model"])
def test_model_name_that_is_no_model(folder, models, name):
    with pytest.raises(
        UserError, match=f"--model-name {name}: no such folder or file; for a hub model give HUB_ID@COMMIT"
    ):
        generate(models / "adapter", "out", "--model-name", name)


def test_folder_without_an_adapter(folder):
    with pytest.raises(UserError, match=r"adapter_config\.json and adapter_model\.safetensors.*`make repro`"):
        generate(folder)


def test_mistakes_end_with_exit_code_2(folder):
    command = [
        sys.executable,
        "-m",
        "dspo.cli",
        "batch-generate",
        "--model",
        ".",
        "--prompts",
        "none.csv",
        "--output",
        "o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.csv: no such file. It should be a CSV with the header prompt,weight\n"
    assert not (folder / "o").exists()


def test_too_little_memory_is_told_with_what_to_do(folder, models, monkeypatch, capsys):
    """Noise for an image of this size has 2^48 bytes, more than a process can address."""
    text = (folder / "params.yaml").read_text().replace(f"resolution: {RESOLUTION}", f"resolution: {2**25}")
    (folder / "params.yaml").write_text(text)
    command = ["batch-generate", "--model", str(models / "adapter"), "--prompts", "prompts.csv", "--output", "out"]
    monkeypatch.setattr(sys, "argv", ["dspo", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert said.startswith("error: out of memory (") and "lower the batch_size" in said and "base.resolution" in said


@pytest.mark.parametrize(
    "command",
    [
        "train --prompts prompts.csv",
        "batch-generate --model mine --prompts prompts.csv --output images",
        "explain red picture.png",
        "promote",
    ],
)
def test_outside_a_clone_a_command_says_where_to_run_it(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-m", "dspo.cli", *command.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert re.match(r"error: (params\.yaml: no such file|models/reward: no reward model here)", done.stderr)
    assert "a clone of the repository" in done.stderr
    assert not list(tmp_path.iterdir())


def test_outside_a_clone_check_and_sync_say_so_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("check")
    assert done.exit_code == 1
    assert "MISSING  parameters: params.yaml: no such file\n         -> run this at the root of a clone" in done.stdout
    with pytest.raises(UserError, match=r"dvc\.lock: no such file.*inside a clone of the repository"):
        call("sync")
    assert not list(tmp_path.iterdir())


def test_check_names_what_is_missing_and_its_remedy(folder):
    done = call("check", "--prompts", "none.csv", "--reward-model", "models/reward")
    assert done.exit_code == 1
    assert "MISSING  prompts: none.csv: no such file" in done.stdout
    assert "MISSING  ratings: data/raw/shapes-rated.parquet: no such file or folder" in done.stdout
    assert "dvc pull models/reward" in done.stdout
    assert "ok       base model" in done.stdout


def test_check_passes_where_all_is_there(folder):
    reward = folder / "models" / "reward"
    reward.mkdir(parents=True)
    backbone = yaml.safe_load(SHIPPED.read_text())["worlds"]["shapes"]["reward"]["backbone"]
    (reward / "config.json").write_text(json.dumps({"untrained": ["detail"], "params": {"backbone": backbone}}))
    save_file({"weight": torch.zeros(2**18)}, reward / "model.safetensors")
    done = call("check", "--prompts", "prompts.csv")
    assert (done.exit_code, done.stdout.count("\nok")) == (0, 6)
    assert "1 MiB, untrained heads: detail" in done.stdout
    (reward / "config.json").write_text("{}")
    assert "config.json: not the config of a reward model" in call("check", "--prompts", "prompts.csv").stdout
    (reward / "config.json").write_text('{"untrained": [], "params": {"backbone": "ViT-L-14-336-quickgelu"}}')
    done = call("check", "--prompts", "prompts.csv")
    assert "MISSING  reward model: models/reward: on ViT-L-14-336-quickgelu, where this world has" in done.stdout
    (reward / "model.safetensors").write_bytes(b"")
    done = call("check", "--prompts", "prompts.csv")
    assert "MISSING  reward model: models/reward/model.safetensors: not a whole safetensors file" in done.stdout


def test_check_of_the_hub_world(folder):
    text = (folder / "params.yaml").read_text().replace("world: shapes", "world: sdxl")
    (folder / "params.yaml").write_text(text)
    found = {check.name: check for check in check_setup(Path("params.yaml"), Path("prompts.csv"), Path("reward"))}
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0 --revision" in (found["base model"].remedy or "")


def test_check_stops_at_params_with_mistakes(folder):
    (folder / "params.yaml").write_text("world: 1\n")
    done = call("check")
    assert done.exit_code == 1
    assert "MISSING  parameters: params.yaml: world: Input should be a valid string" in done.stdout


def train(reward, output, *more, prompts="prompts.csv"):
    return call("train", "--prompts", prompts, "--output", output, "--reward-model", reward, "--num-pairs", 6, *more)


@pytest.fixture
def plain_prompts(folder):
    lines = [
        f"{colour} {letter},{weight}"
        for colour, letter, weight in zip(["red", "green", "blue", "pink"], "abcd", (1, 2, 3, 1), strict=True)
    ]
    (folder / "prompts.csv").write_text("\n".join(["prompt,weight", *lines]))
    return folder


def test_train_leaves_what_was_promised(plain_prompts, models, reward):
    done = train(reward, "out", "--epochs", 1, "--lr", 1e-3)
    assert done.exit_code == 0
    out = plain_prompts / "out"
    assert {p.name for p in out.iterdir()} == {"dora_weights", "training_state.pt", "preference_pairs", "logs"}
    assert {p.name for p in (out / "dora_weights").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.load(out / "training_state.pt", weights_only=True)["step"] > 0
    assert isinstance(PeftModel.from_pretrained(tiny_unet(), out / "dora_weights"), PeftModel)
    pairs = [len(pq.read_table(out / "preference_pairs" / f"{split}.parquet")) for split in ("train", "validation")]
    assert 0 < sum(pairs) <= 6
    told = json.loads((out / "logs" / "before_after.json").read_text())
    assert told["reward_base"] != told["reward_tuned"]
    assert Image.open(out / "logs" / "base_and_tuned.png").size == (2 * RESOLUTION, len(told["prompts"]) * RESOLUTION)
    assert not list((plain_prompts / "scratch").rglob("*.*"))
    assert generate("out", "images").exit_code == 0


def test_train_goes_on_after_a_kill_and_ends_in_the_same_bytes(plain_prompts, reward, monkeypatch):
    train(reward, "whole")

    append, steps = trainer.append_row, []

    def dying(path, row):
        append(path, row)
        steps.append(row["step"])
        if len(steps) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "append_row", dying)
        with pytest.raises(Killed):
            train(reward, "resumed")
    assert not (plain_prompts / "resumed").exists()
    gc.collect()  # lets go of the lock that the end of a process would let go of
    train(reward, "resumed")
    whole, resumed = contents(plain_prompts / "whole"), contents(plain_prompts / "resumed")
    assert whole.keys() == resumed.keys()
    # pickle writes an object that is shared once: the state's bytes depend on more than its contents
    assert [name for name in whole if whole[name] != resumed[name]] in ([], ["training_state.pt"])
    one, other = (torch.load(f"{name}/training_state.pt", weights_only=True) for name in ("whole", "resumed"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_more_pairs_than_the_candidates_give_means_more_candidates(plain_prompts, reward):
    world = load_params(plain_prompts / "params.yaml").active
    for wanted in (1, 2, 7):
        changed = with_pairs_per_prompt(world, wanted)
        k = changed.generate.candidates_per_sampler
        assert k * (k - 1) // 2 >= wanted == changed.score.max_pairs_per_prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "--lr 0.0: expected a number above 0"),
        (["--lr", "nan"], "--lr nan: expected"),
        (["--model-name", "none"], "--model-name none: no such folder or file"),
    ],
)
def test_train_mistakes(plain_prompts, reward, options, message):
    with pytest.raises(UserError, match=message):
        train(reward, "out", *options)
    assert not (plain_prompts / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--prompts", "prompts.csv"),
        ("train", "--prompts", "prompts.csv", "--dry-run"),
        ("compare", "a", "b", "--prompts", "prompts.csv", "--output", "out"),
        ("explain", "a cat", "cat.png"),
        ("import-pairs", "--input", "pairs.csv", "--layout", "csv"),
    ],
)
def test_without_a_reward_model_the_command_that_makes_one_is_named(plain_prompts, command):
    with pytest.raises(UserError, match=r"^none: no reward model here\. `dvc repro train_reward` makes"):
        call(*command, "--reward-model", "none")


def test_train_needs_two_prompts(plain_prompts, reward):
    (plain_prompts / "one.csv").write_text("prompt,weight\na cat,1\na dog,0\n")  # nothing is learnt from the dog
    with pytest.raises(UserError, match=r"one\.csv: at least 2 prompts with a weight above 0 are needed"):
        train(reward, "out", prompts="one.csv")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--output", "prompts.csv"], r"--output prompts.csv: nothing can be written in .*Not a directory"),
        (
            ["train", "--output", "prompts.csv/out"],
            r"--output prompts.csv/out: nothing can be written in .*prompts.csv ",
        ),
        (["train", "--output", "/proc/out"], r"--output /proc/out: nothing can be written in /proc "),
        (["batch-generate", "--model", "none", "--output", "prompts.csv"], "--output prompts.csv: nothing"),
        (["compare", "none", "none", "--output", "prompts.csv/out"], "--output prompts.csv/out: nothing"),
        (["import-pairs", "--input", "none", "--output", "prompts.csv"], "--output prompts.csv: nothing"),
        (["explain", "a red star", "none.png", "--output", "."], r"--output \.: a folder. Give the path of a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(folder, command, message):
    prompts = [] if command[0] in ("import-pairs", "explain") else ["--prompts", "prompts.csv"]
    with pytest.raises(UserError, match=message):
        call(*command, *prompts)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompts", ".", "is a directory"),
        ("--params", ".", "is a directory"),
        ("--config", ".", "is a directory"),
        ("--reward-model", "prompts.csv", "is a file"),
    ],
)
def test_a_folder_for_a_file_and_a_file_for_a_folder(folder, option, value, message):
    done = call("train", "--prompts", "prompts.csv", option, value)
    assert done.exit_code == 2 and option in done.stderr and message in done.stderr


def plan_of(text):
    after = text.split("\n\n", 1)[1]
    return {line[:12].strip(): line[13:] for line in after.splitlines() if line[:12].strip()}


def first_numbers(text):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_the_plan_of_a_training_is_what_the_training_does(plain_prompts, reward, monkeypatch, caplog):
    before = contents(plain_prompts)
    done = train(reward, "out", "--dry-run", "--epochs", 1)
    assert done.exit_code == 0 and contents(plain_prompts) == before
    assert not caplog.records  # open_clip would warn that it loaded no weights
    plan = plan_of(done.stdout)
    resolved = yaml.safe_load(done.stdout.split("\n\n", 1)[0])
    assert resolved["train"]["epochs"] == 1 and resolved["world"] == "shapes"

    sampled = count_samples(monkeypatch)
    assert train(reward, "out", "--epochs", 1).exit_code == 0
    out = plain_prompts / "out"
    table = {split: len(pq.read_table(out / f"preference_pairs/{split}.parquet")) for split in ("train", "validation")}
    assert first_numbers(plan["images"])[0] == sum(sampled)
    assert first_numbers(plan["pairs"]) == [table["train"], table["validation"]]
    assert first_numbers(plan["steps"])[0] == json.loads((out / "logs" / "metrics.json").read_text())["steps"]
    state = torch.load(out / "training_state.pt", weights_only=True)
    assert first_numbers(plan["parameters"])[0] == sum(tensor.numel() for tensor in state["adapter"].values())
    parts = dict(re.findall(r"(training state|adapter) ([\d.]+ kB)", plan["disk"]))
    kept = [*state["adapter"].values(), *state["ema"].values(), *state["best"]["adapter"].values()]
    kept += [tensor for of_one in state["optimizer"]["state"].values() for tensor in of_one.values() if tensor.ndim]
    assert parts["training state"] == size(sum(tensor.nbytes for tensor in kept))
    assert parts["adapter"] == size(sum(tensor.nbytes for tensor in state["adapter"].values()))
    memory, disk = (amounts(plan[row]) for row in ("memory", "disk"))
    assert memory[0] == max(memory[1:]) and len(memory) == 4
    assert disk[0] == pytest.approx(sum(disk[1:]), rel=0.01) and len(disk) == 5

    world = load_params(Path("params.yaml")).active
    base = estimate.load_base(world.base)
    peak = estimate.training_peak(add_dora(base.unet, world.train, seed=0), base, world.train, RESOLUTION)
    step = estimate.parameter_bytes(base.unet) + sum(tensor.nbytes for tensor in kept) + peak
    assert f"a training step {size(step)}" in plan["memory"]


def amounts(text):
    """Every size in bytes."""
    return [
        float(number) * 1000 ** " kMG".index(unit or " ") for number, unit in re.findall(r"([\d.]+) ([kMG]?)B\b", text)
    ]


def count_samples(monkeypatch):
    """How many images each call that samples makes."""
    made = []

    def counted(*args):
        made.append(len(args[1]))
        return sampling.sample(*args)

    def counted_groups(*args):
        made.append(sum(len(requests) for requests, _ in args[1]))
        return sampling.sample_groups(*args)

    for module in (quick_train, train_stage):
        monkeypatch.setattr(module, "sample", counted)
    monkeypatch.setattr(candidates, "sample_groups", counted_groups)
    return made


def test_the_plan_of_a_generation_counts_what_is_missing(folder, models):
    command = ("batch-generate", "--model", models / "adapter", "--prompts", "prompts.csv", "--output", "out")
    plan = plan_of(call(*command, "--seeds", 2, "--dry-run").stdout)
    assert plan["images"] == "6" and plan["UNet passes"].startswith("24 to sample them, 2 steps each")
    assert not (folder / "out").exists()
    call(*command, "--seeds", 2)
    next((folder / "out" / "images").iterdir()).unlink()
    plan = plan_of(call(*command, "--seeds", 2, "--dry-run").stdout)
    assert (
        plan["images"] == "2; 4 of 6 are there"
    )  # the whole batch of two is made again, so that its bytes are the same


def test_every_option_comes_from_a_file_or_the_command_line_which_wins(plain_prompts, models, reward):
    """All of the design's flags, seen in the resolved configuration."""
    (plain_prompts / "other.csv").write_text("prompt\nred\nblue\n")
    in_file = {
        "prompts": "other.csv",
        "output": "there",
        "reward_model": str(reward),
        "model-name": str(models),
        "num-pairs": 2,
        "epochs": 5,
        "lr": "1e-4",
        "gradient_accumulation_steps": 3,
        "dry_run": True,
    }
    given = {
        "--prompts": "prompts.csv",
        "--output": "here",
        "--reward-model": "./reward",
        "--model-name": f"{models / 'base'}/",
        "--num-pairs": 6,
        "--epochs": 4,
        "--lr": 1e-3,
        "--gradient-accumulation-steps": 2,
    }
    (plain_prompts / "reward").symlink_to(reward)
    told = []
    for options in (in_file | {"model-name": str(models / "base")}, in_file):
        (plain_prompts / "mine.yaml").write_text(yaml.safe_dump(options))
        done = call("train", "--config", "mine.yaml", *(word for pair in given.items() for word in pair if told))
        said = yaml.safe_load(done.stdout.split("\n\n", 1)[0])
        training = [said["train"][name] for name in ("epochs", "lr", "gradient_accumulation_steps")]
        places = [said[name] for name in ("prompts", "output", "reward_model")]
        counted = first_numbers(plan_of(done.stdout)["prompts"])[0]
        told.append([*places, said["base"]["model"], said["num_pairs"], *training, counted])
    assert told == [
        ["other.csv", "there", str(reward), str(models / "base"), 2, 5, 1e-4, 3, 2],
        ["prompts.csv", "here", "reward", f"{models / 'base'}/", 6, 4, 1e-3, 2, 3],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("epoch: 3", "epoch: no option of this command. It has: dry-run, epochs, "),
        ("epochs: [3]", r"epochs: expected a text or a number, not \[3\]"),
        ("epochs: true", "epochs: expected a text or a number, not True"),
        ("dry-run: 1", "dry-run: expected true or false, not 1"),
        ("- epochs", "expected lines of `option: value`"),
        ("a: b: c", "not a YAML file"),
    ],
)
def test_config_mistakes(plain_prompts, text, message):
    if text is not None:
        (plain_prompts / "none.yaml").write_text(text)
    with pytest.raises(UserError, match=f"--config none.yaml.*{message}"):
        call("train", "--config", "none.yaml")


def test_a_wrong_value_in_a_config_is_told_as_on_the_command_line(plain_prompts):
    (plain_prompts / "mine.yaml").write_text("prompts: prompts.csv\nepochs: many\n")
    done = call("train", "--config", "mine.yaml")
    assert done.exit_code == 2 and "--epochs" in done.stderr and "valid integer" in done.stderr


def compare(reward, a, b, output, *more):
    return call("compare", a, b, "--prompts", "prompts.csv", "--output", output, "--reward-model", reward, *more)


@pytest.fixture
def judged_by_reward_alone(folder):
    raw = yaml.safe_load((folder / "params.yaml").read_text())
    raw["worlds"]["shapes"]["evaluate"]["judges"] = []
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return folder


def pairs_on(page):
    """(scores of A, scores of B) of every image pair on a page."""
    found = re.findall(r'data-first="([^"]*)" data-second="([^"]*)"', page.read_text())
    return [tuple([float(score) for score in side.split()] for side in pair) for pair in found]


def test_an_adapter_against_itself_is_the_same_images(judged_by_reward_alone, models, reward):
    done = compare(reward, models / "adapter", models / "adapter", "same", "--seeds", 2)
    assert done.exit_code == 0, done.output
    assert "Nothing can be said: its own training reward, the only judge of this world decided no image pair" in (
        done.stdout.replace("\n", " ")
    )
    pairs = pairs_on(judged_by_reward_alone / "same" / "index.html")
    assert len(pairs) == 2 * len(PROMPTS) and all(a == b for a, b in pairs)


def test_two_adapters_on_one_page(judged_by_reward_alone, models, reward, tmp_path):
    """A against B and B against A are the same figures from the other side; prompts are text; nothing is fetched."""
    write_adapter(tmp_path / "untrained", str(models / "base"), value=0.0)
    assert compare(reward, models / "adapter", tmp_path / "untrained", "ab").exit_code == 0
    assert compare(reward, tmp_path / "untrained", models / "adapter", "ba").exit_code == 0
    ab, ba = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("ab", "ba"))
    one, other = (r["tuned_against_base"]["win_rates"]["reward_overall"] for r in (ab, ba))
    assert one["n_decided"] == other["n_decided"] > 0 and one["win_rate"] == pytest.approx(1 - other["win_rate"])
    pages = [tmp_path / name / "index.html" for name in ("ab", "ba")]
    assert sorted(pairs_on(pages[0])) == sorted((b, a) for a, b in pairs_on(pages[1]))
    assert PROMPTS[2] not in pages[0].read_text()

    browser = Browser(tmp_path / "profile")
    try:
        browser.open(pages[0], width=390)
        assert browser.js("document.title") == "A against B"
        assert browser.js("document.querySelectorAll('.pair input[type=range]').length") == len(pairs_on(pages[0]))
        assert browser.js("document.documentElement.scrollWidth") <= 390
        captions = browser.js("[...document.querySelectorAll('.prompt')].map(p => p.textContent)")
        assert set(captions) == set(PROMPTS)
        assert clean(browser)
        assert_page(browser, pages[0])
    finally:
        browser.close()


def test_prompts_that_the_worlds_judges_cannot_read(folder, models, reward):
    with pytest.raises(UserError, match=r"is not of the shapes grammar.*evaluate\.judges in params\.yaml"):
        compare(reward, models / "adapter", models / "adapter", "out")
    assert not (folder / "out").exists()
