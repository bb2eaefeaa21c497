"""What the judges say of images: the training reward, those that were never trained on, and low-level statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspo.data.records import HEADS
from dspo.environment import device
from dspo.evaluation.drift import drift_columns
from dspo.evaluation.foreign.judge import JUDGES, ForeignJudge
from dspo.params import EvaluateParams
from dspo.reward.checkpoint import RewardScorer, load_reward
from dspo.shapes.judging import judge_all
from dspo.shapes.second import SecondJudge

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

GOLD_COLUMNS = tuple(f"gold_{name}" for name in HEADS)
FULLY_RIGHT = "gold_fully_right"
FREE_COLUMNS = ("free_x", "free_y", "free_radius", "free_ground_l", "free_ground_a", "free_ground_b")
# What the diversity of an image of `shapes` is measured in: columns of the same kind of quantity.
FREE_ATTRIBUTES = {"position": FREE_COLUMNS[0:2], "size": FREE_COLUMNS[2:3], "ground_colour": FREE_COLUMNS[3:6]}
SECOND = "second"
FOREIGN_COLUMNS = tuple(JUDGES)


@dataclass(frozen=True)
class Judges:
    """The judges of a run: the training reward always, those that were never trained on where the world has them."""

    reward: RewardScorer
    gold: bool
    second: SecondJudge | None
    batch_size: int
    processes: int  # of the gold judge; threads of the statistics
    foreign: tuple[ForeignJudge, ...] = ()  # published judges

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, Array]:
        """Columns [n]: ``reward_<head>``, ``drift_<statistic>``; where they judge, ``gold_…``, ``free_…``, ``second``,
        and the published judges by name.

        Starting the gold judge's processes costs seconds, so one call with all images is faster than several.
        """
        rewards = self.reward.score(images, prompts, self.batch_size)
        columns = {
            f"reward_{head}": rewards[:, i].astype(np.float64)
            for i, head in enumerate(self.reward.heads)
            if head not in self.reward.untrained
        }
        columns |= drift_columns(images, self.processes)
        if self.gold:
            columns |= gold_columns(images, prompts, self.processes)
        if self.second:
            columns[SECOND] = np.asarray(self.second.score(images, prompts), dtype=np.float64)
        return columns | {judge.name: judge.score(images, prompts, self.batch_size) for judge in self.foreign}


def load_judges(settings: EvaluateParams, reward: Path, second: Path | None, processes: int) -> Judges:
    """The training reward and the judges that ``settings`` lists; ``second``: the second judge's folder."""
    return Judges(
        load_reward(reward, device()),
        "gold" in settings.judges,
        SecondJudge.load(second) if second and "second" in settings.judges else None,
        settings.batch_size,
        processes,
        tuple(ForeignJudge(judge, device()) for judge in settings.foreign_judges),
    )


def gold_columns(images: Sequence[Image], prompts: Sequence[str], processes: int) -> dict[str, Array]:
    """``gold_<dimension>``, ``gold_fully_right`` (0 or 1) and the free attributes of each image, columns [n]."""
    scores = judge_all(images, prompts, [f"image of {prompt!r}" for prompt in prompts], processes)
    columns = {f"gold_{name}": np.array([getattr(s, name) for s in scores], dtype=np.float64) for name in HEADS}
    columns[FULLY_RIGHT] = np.array([s.fully_right for s in scores], dtype=np.float64)
    free = np.array([s.free for s in scores], dtype=np.float64).reshape(len(scores), len(FREE_COLUMNS))
    return columns | dict(zip(FREE_COLUMNS, free.T, strict=True))
