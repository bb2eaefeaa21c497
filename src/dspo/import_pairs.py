"""Preference pairs from outside by one command: read, encoded, and put where the stage `train` reads its pairs."""

from pathlib import Path
from typing import Any

from dspo.data.hub import require
from dspo.data.prompts import read_prompts
from dspo.data.readers import read_comparisons
from dspo.data.splits import split_of
from dspo.diffusion import files
from dspo.diffusion.base import local_files
from dspo.environment import device
from dspo.errors import UserError
from dspo.params import Params
from dspo.preference.foreign_pairs import write_foreign_pairs
from dspo.reward.checkpoint import load_reward
from dspo.stages.atomic import open_scratch

PROMPTS = Path("data/prompts.csv")


def import_pairs(
    params: Params, source: Path, layout: str, reward: Path | None, prompts: Path | None, output: Path
) -> dict[str, Any]:
    """Replace ``output`` by the pairs of ``source``; what it held stays until they are whole. Returns their summary.

    ``layout``: as for :func:`dspo.data.readers.read_comparisons`. ``reward``: folder of a reward model that scores the
    images, or None. ``prompts``: list whose test prompts are left out; None: ``data/prompts.csv``, if it exists. Raises
    :class:`UserError` for bad input, and for an ``output`` that holds anything but pairs.
    """
    _check_replaceable(output, source)
    world = params.active
    require(files.missing(world.base), "base")
    held_back = _test_prompts(prompts, params)
    settings = {
        "seed": params.seed,
        "layout": layout,
        "test_prompts": sorted(held_back),
        "base": world.base.model_dump(mode="json"),
        "score": world.score.model_dump(mode="json"),
    }
    models = [*([reward] if reward else []), *local_files(world.base)]
    scratch = open_scratch("import_pairs", settings, [source, *models])
    scorer = load_reward(reward, device()) if reward else None
    comparisons = read_comparisons(layout, source)
    summary = write_foreign_pairs(
        comparisons, world.base, world.score, params.seed, device(), scorer, held_back, scratch.path / "pairs"
    )
    scratch.publish({"pairs": output})
    return summary


def _check_replaceable(output: Path, source: Path) -> None:
    if any(place.resolve().is_relative_to(output.resolve()) for place in (source, Path())):
        raise UserError(
            f"--output {output}: is replaced, and the pairs to read or the current folder are in it. Give another one."
        )
    if output.is_dir() and any(output.iterdir()) and not (output / "text" / "null.safetensors").is_file():
        raise UserError(f"--output {output}: holds other files than pairs, and is replaced. Give another --output.")


def _test_prompts(path: Path | None, params: Params) -> set[str]:
    """Ids of the listed prompts that the stage `evaluate` judges the adapter by."""
    if path is None and not PROMPTS.exists():
        return set()
    split = params.active.prompts
    listed = (prompt.id for prompt in read_prompts(path or PROMPTS, split.max_characters))
    return {one for one in listed if split_of(one, params.seed, split.validation_share, split.test_share) == "test"}
