"""Another clone, whose stages are killed together with DVC at random moments, ends in the undisturbed one's bytes.

Between two changes of the file system every moment leaves the same on the disk, so a stage dies at one of these: at
random, and at the latest when its finished outputs would be moved into place.
"""

from pathlib import Path

import yaml
from tiny_run import project, shell, tiny_run

__all__ = ["tiny_run"]  # a fixture
STAGES = {"generate_pairs", "train_reward", "train", "evaluate"}
# Python runs a module of this name before any other; `src` is on the path of every stage.
KILLER = """
import os, pathlib, random, signal, sys
stage = next((name.removeprefix("dspo.stages.") for name in sys.orig_argv if name.startswith("dspo.stages.")), "")
died = pathlib.Path(os.environ.get("KILLED_STAGES", "."), stage)
CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")

def kill(event, args):
    opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if event not in CHANGES and not opened or not isinstance(args[0], (str, os.PathLike)):
        return
    path = pathlib.Path(args[0]).absolute()
    if not path.is_relative_to(os.getcwd()) or "__pycache__" in path.parts or died.exists():
        return
    if path.name.endswith(".incoming") and event == "os.rename" or random.random() < 0.1:
        died.write_text(f"{event} {path}")
        os.killpg(0, signal.SIGKILL)

if stage in os.environ.get("KILL_STAGES", "").split():
    sys.addaudithook(kill)
"""


def test_killed_at_random_moments_the_pipeline_ends_in_the_same_bytes(tiny_run: Path, tmp_path: Path) -> None:
    root, died = project(tmp_path / "root"), tmp_path / "died"
    died.mkdir()
    (root / "src/sitecustomize.py").write_text(KILLER)
    kills = {"KILL_STAGES": " ".join(STAGES), "KILLED_STAGES": str(died)}
    for _ in STAGES:
        shell(root, "dvc", "repro", fails=True, env=kills)
    shell(root, "dvc", "repro", env=kills)
    moments = {path.name: path.read_text() for path in died.iterdir()}
    assert set(moments) == STAGES
    locks = [yaml.safe_load((folder / "dvc.lock").read_text()) for folder in (root, tiny_run)]
    assert locks[0] == locks[1], moments
    assert shell(root, "dvc", "status").stdout.strip().endswith("up to date.")
    assert not list((root / "scratch").glob("*/*"))
