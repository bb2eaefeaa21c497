"""Stage: sample candidate images of the train prompts with the base model."""

from dspo.data.prompts import read_split
from dspo.diffusion.base import local_files
from dspo.diffusion.candidates import generate_candidates
from dspo.environment import device
from dspo.errors import UserError
from dspo.params import load_params
from dspo.stages.runner import arguments, run
from dspo.stages.shared import SharedScratch


def main(argv: list[str]) -> None:
    paths = arguments(__doc__, argv, "prompts", "output")
    params = load_params(paths.params)
    base, generate = params.active.base, params.active.generate
    prompts = read_split(paths.prompts)[: generate.num_prompts]
    if not prompts:
        raise UserError(f"{paths.prompts}: no prompts to sample. Add prompts, then run prepare_prompts again.")
    decides = {"seed": params.seed, "base": base.model_dump(), "generate": generate.model_dump()}
    scratch = SharedScratch("generate_pairs", decides, [paths.prompts, *local_files(base)])
    generate_candidates(prompts, base, generate, params.seed, device(), scratch.path / "candidates")
    scratch.publish({"candidates": paths.output})


if __name__ == "__main__":
    run(main, "dspo.stages.generate_pairs")
