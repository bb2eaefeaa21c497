"""Stage: split the list of prompts into train, validation and test."""

from dspo.data.files import write_json
from dspo.data.prompts import read_prompts, write_split
from dspo.data.splits import SPLITS, split_of
from dspo.errors import UserError
from dspo.params import load_params
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import arguments, run


def main(argv: list[str]) -> None:
    args = arguments(__doc__, argv, "prompts", "output")
    params = load_params(args.params)
    section = params.active.prompts
    prompts = read_prompts(args.prompts, section.max_characters)
    scratch = open_scratch("prepare_prompts", section.model_dump() | {"seed": params.seed}, [args.prompts])
    counts = {}
    for split in SPLITS:
        members = [
            p for p in prompts if split_of(p.id, params.seed, section.validation_share, section.test_share) == split
        ]
        if not members:
            raise UserError(f"{args.prompts}: no prompt falls into the {split} split of {len(prompts)}. Add prompts.")
        write_split(members, scratch.path / "prompts" / f"{split}.csv")
        counts[split] = len(members)
    write_json(counts, scratch.path / "prompts" / "summary.json")
    scratch.publish({"prompts": args.output})


if __name__ == "__main__":
    run(main)
