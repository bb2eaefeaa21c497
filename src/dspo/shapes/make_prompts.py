"""Write the prompt list of `shapes`: distinct prompts of the grammar, `prompt,weight`."""

import argparse
import csv
from pathlib import Path

from dspo.data.keys import keyed_rng
from dspo.shapes.grammar import random_prompt


def distinct_prompts(number: int, seed: int, purpose: str, taken: frozenset[str] = frozenset()) -> list[str]:
    """The first `number` prompts of a keyed stream that are neither repeated nor taken."""
    prompts: dict[str, None] = {}
    draw = 0
    while len(prompts) < number:
        prompt = random_prompt(keyed_rng(seed, purpose, draw))
        draw += 1
        if prompt not in taken:
            prompts[prompt] = None
    return list(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "weight"])
        writer.writerows([prompt, "1.0"] for prompt in distinct_prompts(args.number, args.seed, "prompt-list"))


if __name__ == "__main__":
    main()
