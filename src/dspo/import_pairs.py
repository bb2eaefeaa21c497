"""Preference pairs from outside by one command: read, encoded, and put where the stage `train` reads its pairs."""

from pathlib import Path
from typing import Any

from dspo.data.readers import read_comparisons
from dspo.diffusion.base import local_files
from dspo.environment import device
from dspo.params import Params
from dspo.preference.foreign_pairs import write_foreign_pairs
from dspo.reward.checkpoint import load_reward
from dspo.stages.atomic import open_scratch


def import_pairs(params: Params, source: Path, layout: str, reward: Path | None, output: Path) -> dict[str, Any]:
    """Replace ``output`` by the pairs of ``source``; what it held stays until they are whole. Returns their summary.

    ``layout``: as for :func:`dspo.data.readers.read_comparisons`. ``reward``: folder of a reward model that scores the
    images, or None. Raises :class:`UserError` for bad input.
    """
    world = params.active
    settings = {
        "seed": params.seed,
        "layout": layout,
        "base": world.base.model_dump(mode="json"),
        "score": world.score.model_dump(mode="json"),
    }
    models = [*([reward] if reward else []), *local_files(world.base)]
    scratch = open_scratch("import_pairs", settings, [source, *models])
    scorer = load_reward(reward, device()) if reward else None
    summary = write_foreign_pairs(
        read_comparisons(layout, source), world.base, world.score, params.seed, device(), scorer, scratch.path / "pairs"
    )
    scratch.publish({"pairs": output})
    return summary
