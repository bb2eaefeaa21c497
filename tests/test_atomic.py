"""Outputs appear whole or not at all, whatever happens and whenever."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from disk import Killed

from dspo.errors import UserError
from dspo.stages import atomic
from dspo.stages.atomic import fingerprint, open_scratch

ROOT = Path(__file__).parents[1]
# Python runs a module of this name before any other. It waits, finished, until its standard input ends.
WAITS = """
import sys

def wait(event, args):
    if event == "os.rename" and str(args[0]).endswith(".incoming"):
        print("finished", flush=True)
        sys.stdin.read()

sys.addaudithook(wait)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("in")
    return tmp_path


def tree(path):
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def stage(folder, pieces=3):
    """A stage as they all are: skips finished pieces, then publishes a folder and a file."""
    scratch = open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])
    (scratch.path / "model").mkdir(exist_ok=True)
    made = []
    for i in range(pieces):
        piece = scratch.path / "model" / f"{i}.txt"
        if not piece.exists():
            partial = piece.with_suffix(".partial")
            partial.write_text(f"piece {i}")
            os.replace(partial, piece)
            made.append(i)
    (scratch.path / "log.txt").write_text("log")
    scratch.publish({"model": folder / "out" / "model", "log.txt": folder / "out" / "log.txt"})
    return made


WHOLE = {"model/0.txt": "piece 0", "model/1.txt": "piece 1", "model/2.txt": "piece 2", "log.txt": "log"}


def test_publish_puts_everything_in_place_and_leaves_no_scratch(folder):
    assert stage(folder) == [0, 1, 2]
    assert tree(folder / "out") == WHOLE
    assert tree(folder / "scratch") == {}


def test_a_scratch_folder_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setenv("DSPO_SCRATCH", str(folder / "input.txt"))
    with pytest.raises(UserError, match=r"nothing can be written here \(Not a directory\)\. Set DSPO_SCRATCH"):
        open_scratch("demo", {}, [])


def test_outputs_can_be_read_by_everybody(folder):
    """Whoever pulls an adapter from shared storage is not who wrote it."""
    scratch = open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])
    private = scratch.path / "private.txt"
    private.touch(mode=0o600)
    scratch.publish({"private.txt": folder / "out.txt"})
    assert stat.S_IMODE((folder / "out.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", range(60))
def test_kill_at_any_moment(folder, monkeypatch, moment, existing):
    """Die before the n-th operation on the file system; outputs are whole or absent, and the next run ends the same."""
    if existing:
        (folder / "out" / "model").mkdir(parents=True)
        (folder / "out" / "model" / "0.txt").write_text("older")
        (folder / "out" / "log.txt").write_text("older")
    left = moment

    def dying(operation):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return operation(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in (
            (os, "link"),
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (os, "mkdir"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            patch.setattr(module, name, dying(getattr(module, name)))
        with contextlib.suppress(Killed):
            stage(folder)
    model, log = folder / "out" / "model", folder / "out" / "log.txt"
    if model.exists():
        assert tree(model) in ({"0.txt": "older"}, {k.removeprefix("model/"): v for k, v in WHOLE.items() if "/" in k})
    if log.exists():
        assert log.read_text() in ("older", "log")
    # DVC removes a stage's outputs before it runs the stage again
    shutil.rmtree(folder / "out" / "model", ignore_errors=True)
    (folder / "out" / "log.txt").unlink(missing_ok=True)
    stage(folder)
    assert tree(folder / "out") == WHOLE
    assert tree(folder / "scratch") == {}


def test_killed_process_goes_on_where_it_stopped(folder):
    child = multiprocessing.get_context("fork").Process(target=_stop_after_two_pieces, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (folder / "out").exists()
    assert stage(folder) == [2]
    assert tree(folder / "out") == WHOLE


def _stop_after_two_pieces(folder):
    scratch = open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])
    (scratch.path / "model").mkdir()
    for i in range(2):
        (scratch.path / "model" / f"{i}.txt").write_text(f"piece {i}")
    os.kill(os.getpid(), signal.SIGKILL)


def test_other_parameters_get_another_folder_and_the_stale_one_goes(folder):
    first = open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])
    stale = first.path
    (stale / "checkpoint").write_text("of lr 1")
    del first
    second = open_scratch("demo", {"lr": 2.0}, [folder / "input.txt"])
    assert second.path != stale
    assert list(second.path.iterdir()) == []
    assert not stale.exists()


def test_folder_of_a_running_process_is_neither_removed_nor_shared(folder):
    first = open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])
    open_scratch("demo", {"lr": 2.0}, [folder / "input.txt"])
    assert first.path.exists()
    with pytest.raises(UserError, match="another process is at work"):
        open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])


def test_a_file_system_without_locks(folder, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(atomic.fcntl, "flock", unknown)
    with pytest.raises(UserError, match=r"has no locks .*flock.*DSPO_SCRATCH"):
        open_scratch("demo", {"lr": 1.0}, [folder / "input.txt"])


def test_stages_of_two_experiments_that_run_at_once_on_one_scratch_folder(folder):
    """Each publishes what its own parameters make, and none works where another one does."""
    (folder / "waits").mkdir()
    (folder / "waits/sitecustomize.py").write_text(WAITS)

    def start(experiment, test_share, waits=False):
        copy = folder / experiment
        copy.mkdir(exist_ok=True)
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["worlds"]["shapes"]["prompts"]["test_share"] = test_share
        (copy / "params.yaml").write_text(yaml.safe_dump(params))
        paths = [*([str(folder / "waits")] if waits else []), str(ROOT / "src")]
        return subprocess.Popen(
            [sys.executable, "-m", "dspo.stages.prepare_prompts", "--params", "params.yaml",
             "--prompts", ROOT / "data/prompts.csv", "--output", "prompts"],
            cwd=copy, env={"PYTHONPATH": os.pathsep.join(paths), "DSPO_SCRATCH": str(folder / "scratch")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = start("first", 0.2, waits=True)
    assert first.stdout.readline() == "finished\n", first.communicate()
    others = [start("second", 0.3), start("like-the-first", 0.2)]
    said = [other.communicate()[1] for other in others]
    assert [other.returncode for other in others] == [0, 2], said
    assert "another process is at work here" in said[1]
    assert not (folder / "like-the-first/prompts").exists()
    assert first.communicate()[1] == ""
    alone = start("alone", 0.2)
    assert (first.returncode, alone.wait()) == (0, 0)
    made = {name: tree(folder / name / "prompts") for name in ("first", "second", "alone")}
    assert made["first"] == made["alone"] != made["second"]
    assert tree(folder / "scratch") == {}


def test_fingerprint_counts_parameters_contents_names_and_code(folder):
    a, b = folder / "a", folder / "b"
    for path, text in ((a / "x", "1"), (b / "x", "1")):
        path.parent.mkdir()
        path.write_text(text)
    same = fingerprint({"lr": 1}, [a], [b])
    assert fingerprint({"lr": 1}, [b], [a]) == same
    assert fingerprint({"lr": 2}, [a], [b]) != same
    (a / "x").rename(a / "y")
    assert fingerprint({"lr": 1}, [a], [b]) != same
    (a / "y").rename(a / "x")
    (b / "x").write_text("2")
    assert fingerprint({"lr": 1}, [a], [b]) != same
    with pytest.raises(UserError, match="missing: no such file or folder"):
        fingerprint({}, [folder / "missing"], [])


def test_without_hard_links_outputs_are_copied(folder, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(atomic.os, "link", refuse)
    stage(folder)
    assert tree(folder / "out") == WHOLE
