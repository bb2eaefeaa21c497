"""Where a published judge's weights are, what is missing of them, and the command that gets it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from dspo.data import hub
from dspo.data.hub import Missing, fetch, find
from dspo.errors import UserError
from dspo.params import AestheticsParams, ForeignJudgeParams, ImageRewardParams, PickScoreParams, Place

CLIP_FOLDER = ("config.json", "model.safetensors", "preprocessor_config.json")
TOKENIZER = ("tokenizer_config.json",)
AESTHETICS_HEAD = (
    "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)


@dataclass(frozen=True)
class Wanted:
    """One place, and the files that a judge needs of it."""

    place: Place
    files: tuple[str, ...] = ()  # of a folder; empty where the place is the file
    patterns: tuple[str, ...] = ()  # what to fetch of a hub repository that is used as a folder
    url: str | None = None  # where a file is published outside the hub

    @property
    def remedy(self) -> str:
        """The command that gets the files, where it is known where they are published."""
        place, revision = self.place.place, self.place.revision
        if revision is not None:
            repository, file = (place, None) if self.files else split_hub_file(place)
            return fetch(repository, revision, self.patterns if file is None else [file])
        if self.url is not None:
            return f"curl -L --create-dirs -o {quote(place)} {self.url}"
        return "correct evaluate.judges in params.yaml"


def wanted(judge: ForeignJudgeParams) -> list[Wanted]:
    """Every place that a judge needs."""
    if isinstance(judge, PickScoreParams):
        return [Wanted(judge.model, (*CLIP_FOLDER, *TOKENIZER), ("*.json", "*.txt", "model.safetensors"))]
    if isinstance(judge, ImageRewardParams):
        return [Wanted(judge.model), Wanted(judge.tokenizer, TOKENIZER, ("*.json", "vocab.txt"))]
    if isinstance(judge, AestheticsParams):
        return [Wanted(judge.clip, CLIP_FOLDER, CLIP_FOLDER), Wanted(judge.model, url=AESTHETICS_HEAD)]
    return [Wanted(judge.model)]


def missing(judge: ForeignJudgeParams) -> list[Missing]:
    """What is not on this disk, one entry for each place."""
    found = []
    for want in wanted(judge):
        absent = [file for file in want.files or ("",) if _find(want.place, file) is None]
        if absent:
            which = f": {', '.join(absent)}" if want.files else ""
            found.append(Missing(f"{judge.name}: {want.place.place}: missing{which}", want.remedy))
    return found


def require(judges: Sequence[ForeignJudgeParams]) -> None:
    """Raise :class:`UserError` that names everything that is missing of all judges, with the commands that get it."""
    hub.require([one for judge in judges for one in missing(judge)], "evaluate.judges")


def local_files(judges: Sequence[ForeignJudgeParams]) -> list[Path]:
    """The places outside the hub; their contents decide what a judge says."""
    return [Path(w.place.place) for judge in judges for w in wanted(judge) if w.place.revision is None]


def path_of(place: Place, name: str = "") -> Path:
    """Where a file of a folder, or with no name the place itself, is on this disk. Raises :class:`UserError`."""
    path = _find(place, name)
    if path is None:
        raise UserError(
            f"evaluate.judges: {place.place}: {name or 'the file'} is missing; `dspo check` says how to get it"
        )
    return path


def split_hub_file(place: str) -> tuple[str, str]:
    """``org/name/some/file`` as ``org/name`` and ``some/file``."""
    parts = place.split("/", 2)
    if len(parts) < 3:
        raise UserError(f"evaluate.judges: {place}: expected org/name/file, a file of a hub repository")
    return f"{parts[0]}/{parts[1]}", parts[2]


def _find(place: Place, name: str) -> Path | None:
    """A file of a place (``""``: the place itself), if it is on this disk."""
    if name:
        return find(place.place, place.revision, name)
    if place.revision is not None:
        repository, file = split_hub_file(place.place)
        return find(repository, place.revision, file)
    path = Path(place.place)
    return path if path.is_file() else None
