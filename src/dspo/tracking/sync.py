"""Bring MLflow up to date with the files: the workspace's run and every experiment of ``dvc exp run``.

The files are the truth. A run is first copied to ``scratch/unsent/<key>``, then sent, then the copy is removed: what a
dead server did not get waits there for the next call, even if the workspace has moved on. Runs are known by the hash of
their parameters and outputs, experiments by their name besides, so that each is sent once, however often this is called
and wherever an earlier call was killed. The workspace's run is not sent beside the experiment that it came from.
"""

import fcntl
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.repo import Repo

from dspo.environment import repository_root, scratch_root, tracking_uri
from dspo.errors import UserError
from dspo.tracking.mlflow_sink import MlflowSink
from dspo.tracking.record import EXPERIMENT_NAME, LOCK, RunRecord, collect, experiment_key, read_lock, run_key
from dspo.tracking.server import REFUSALS, reason

EXPERIMENT_REF = re.compile(r"^refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(\S+)$")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Revision:
    """A place to read a run from: a commit, or the workspace (``commit`` None)."""

    commit: str | None
    stages: dict[str, Any]
    tags: dict[str, str]

    @property
    def content(self) -> str:
        return run_key(self.stages)

    @property
    def key(self) -> str:
        if EXPERIMENT_NAME not in self.tags:
            return self.content
        return experiment_key(self.content, self.tags[EXPERIMENT_NAME], self.tags["dvc.baseline_rev"])


def sync(uri: str | None = None, root: Path | None = None, first_timeout: int = 10) -> list[str]:
    """Send what MLflow does not have yet; return the keys of the runs that were sent.

    ``uri``: tracking server or database; default: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` at the repository's root.
    ``root``: the repository. ``first_timeout``: seconds that the server has for its first answer. Raises
    :class:`UserError` if there is no run yet, or if MLflow did not take them; then they wait for the next call.
    """
    uri, root = uri or tracking_uri(), root or repository_root()
    if not (root / LOCK).is_file():
        raise UserError(
            f"{root / LOCK}: no such file, so there is nothing to send yet. "
            "Run `dvc repro` first, inside a clone of the repository."
        )
    unsent = root / scratch_root() / "unsent"
    unsent.mkdir(parents=True, exist_ok=True)
    lock = os.open(unsent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would both find a run missing
        return _sync(MlflowSink(uri, first_timeout), root, unsent)
    finally:
        os.close(lock)


def _sync(sink: MlflowSink, root: Path, unsent: Path) -> list[str]:
    known: set[str] = set()
    refused: Exception | None = None
    try:
        known = sink.keys()
    except REFUSALS as error:
        refused = error
    _collect_all(root, known, unsent)
    sent: list[str] = []
    for folder in _waiting(unsent):
        if refused is None and folder.name not in known:
            try:
                sink.send(RunRecord.read(folder), folder)
                sent.append(folder.name)
            except REFUSALS as error:
                refused = error
        if refused is None:
            shutil.rmtree(folder)
    if refused is not None:
        waits = f"`dspo sync` sends what waits in {unsent}"
        raise UserError(f"{sink.uri}: MLflow did not take the runs; {waits}. {reason(refused)}")
    return sent


def _waiting(unsent: Path) -> list[Path]:
    """Folders of whole records, the oldest first: the workspace's run comes last, so that its version is the newest."""
    records = [path for path in unsent.glob("*/record.json") if path.is_file()]
    return [path.parent for path in sorted(records, key=lambda path: path.stat().st_mtime_ns)]


def _collect_all(root: Path, known: set[str], unsent: Path) -> None:
    """Copy every run that MLflow does not have to a folder of its own below ``unsent``.

    ``known``: keys and contents of the runs that it has.
    """
    there = known | {name for folder in _waiting(unsent) for name in (folder.name, RunRecord.read(folder).content)}
    for revision in (*_experiments(root), *_workspace(root)):
        folder = unsent / revision.key
        if folder.name in there:
            there.add(revision.content)
            continue
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
        try:
            files = DVCFileSystem(str(root), rev=revision.commit)
            collect(files, revision.stages, revision.key, revision.tags, folder)
            there.add(revision.content)
        except FileNotFoundError as error:
            shutil.rmtree(folder, ignore_errors=True)
            log.warning("not sent: %s; not in DVC's cache: %s", revision.tags["git.commit"], error.filename or error)


def _experiments(root: Path) -> Iterator[Revision]:
    for line in _git(root, "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines():
        ref, commit = line.split()
        found = EXPERIMENT_REF.match(ref)
        stages = read_lock(_git(root, "show", f"{commit}:{LOCK}").encode()) if found else None
        if found and stages:
            names = {EXPERIMENT_NAME: found[3], "dvc.baseline_rev": found[1] + found[2]}
            yield Revision(commit, stages, {"git.commit": commit, "git.dirty": "false", **names})


def _workspace(root: Path) -> Iterator[Revision]:
    """The workspace, if its outputs are those of its dvc.lock."""
    stages = read_lock((root / LOCK).read_bytes())
    with Repo(str(root)) as repo:
        changed = any(out.status() for out in repo.index.outs if out.stage.path_in_repo == "dvc.yaml")
    if stages is None or changed:
        log.warning("not sent: the workspace, which does not hold one whole run. Run `dvc repro`.")
        return
    dirty = bool(_git(root, "status", "--porcelain"))
    yield Revision(
        None, stages, {"git.commit": _git(root, "rev-parse", "HEAD").strip(), "git.dirty": str(dirty).lower()}
    )


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command; empty where it fails, as in a repository without a commit."""
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False).stdout
