"""Stage: score the candidates with the reward model and make pairs of them."""

from dspo.diffusion.base import local_files
from dspo.environment import device
from dspo.params import load_params
from dspo.preference.scoring import write_pairs
from dspo.reward.checkpoint import load_reward
from dspo.stages.runner import arguments, run
from dspo.stages.shared import SharedScratch


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "candidates", "reward", "output")
    params = load_params(paths.params)
    base, score = params.active.base, params.active.score
    decides = {"seed": params.seed, "base": base.model_dump(), "score": score.model_dump()}
    scratch = SharedScratch("score", decides, [paths.candidates, paths.reward, *local_files(base)])
    scorer = load_reward(paths.reward, device())
    write_pairs(paths.candidates, scorer, base, score, params.seed, device(), scratch.path / "pairs")
    scratch.publish({"pairs": paths.output})


if __name__ == "__main__":
    run(main, "dspo.stages.score")
