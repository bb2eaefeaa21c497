"""Say before any work which weights of the world are missing, and the command that gets each. Reads none of them.

python -m dspo.weights --params params.yaml
"""

from pathlib import Path

from dspo.data.hub import Missing, require
from dspo.diffusion import files
from dspo.evaluation.foreign import places
from dspo.params import RewardParams, World, load_params
from dspo.stages.runner import arguments, run


def main(argv: list[str]) -> None:
    """Raises :class:`UserError` that names all that is missing, each with its remedy."""
    params = load_params(arguments(__doc__, argv).params)
    require(missing(params.active), f"world {params.world}")


def missing(world: World) -> list[Missing]:
    """Of the base model, its VAE, the reward model's backbone and the judges."""
    judges = [one for judge in world.evaluate.foreign_judges for one in places.missing(judge)]
    return [*files.missing(world.base), *_backbone(world.reward), *judges]


def _backbone(reward: RewardParams) -> list[Missing]:
    if reward.pretrained is None:
        folder = Path(reward.backbone.removeprefix("local-dir:"))
        absent = Missing(f"{folder}: no such folder", "correct reward.backbone in params.yaml")
        return [] if folder.is_dir() else [absent]
    from dspo.reward import backbone  # here, since it imports torch, which takes seconds

    return backbone.missing(reward)


if __name__ == "__main__":
    run(main)
