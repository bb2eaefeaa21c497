"""Audit: the adapter against the base on prompts and noise drawn anew, of which no stage has used any.

python -m dspo.studies.audit --params params.yaml --prompts data/prompts.csv --ratings data/ratings
    --adapter models/adapter --reward models/reward --second-judge models/shapes-judge
    --output reports/studies/audit.json
"""

import argparse
import hashlib
from pathlib import Path

from dspo.data.files import write_json
from dspo.data.images import read_table
from dspo.data.keys import keyed_seed
from dspo.data.prompts import read_prompts
from dspo.data.splits import SPLITS
from dspo.diffusion.base import load_pipeline, local_files
from dspo.environment import device, processes
from dspo.evaluation import compare
from dspo.evaluation.compare import Comparison
from dspo.params import load_params
from dspo.preference.dora import load_adapter
from dspo.stages.atomic import open_scratch
from dspo.stages.runner import run
from dspo.studies.common import fresh_prompts, judged_samples, judges_of_shapes


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    settings = params.active.evaluate
    seed = adapter_seed(args.adapter)
    used = used_prompts(args.prompts, args.ratings, params.active.prompts.max_characters)
    prompts = fresh_prompts(args.num_prompts, used, seed, "audit")

    inputs = [args.prompts, args.ratings, args.adapter, args.reward, args.second_judge]
    inputs += local_files(params.active.base)
    what_decides = {
        "base": params.active.base.model_dump(),
        "evaluate": settings.model_dump(),
        "num_prompts": args.num_prompts,
        "seeds": args.seeds,
        "seed": seed,
    }
    scratch = open_scratch("audit", what_decides, inputs)
    judges = judges_of_shapes(params, args.reward, args.second_judge, processes())
    noise_seed = keyed_seed(seed, "audit")
    pipe = load_pipeline(params.active.base, device())
    base = judged_samples(pipe, prompts, args.seeds, noise_seed, params, judges, scratch.path / "base")
    pipe.unet = load_adapter(pipe.unet, args.adapter)
    tuned = judged_samples(pipe, prompts, args.seeds, noise_seed, params, judges, scratch.path / "tuned")

    how = Comparison(settings.tie_band, settings.bootstrap_resamples, seed)
    figures = {
        "num_prompts": args.num_prompts,
        "seeds": args.seeds,
        "seed": seed,
        "sampler": settings.sampler.model_dump(),
        "tuned_against_base": compare.tuned_against_base(base, tuned, how),
        "verdict": compare.verdict(how.win_rates(tuned, base)),
    }
    write_json(figures, scratch.path / "audit.json")
    scratch.publish({"audit.json": args.output})


def used_prompts(prompts: Path, ratings: Path, max_characters: int) -> set[str]:
    """The prompts of the list, and those whose pictures raters looked at."""
    listed = {prompt.text for prompt in read_prompts(prompts, max_characters)}
    rated = (read_table(ratings / f"{split}.parquet", ["caption"])["caption"] for split in SPLITS)
    return listed.union(*(column.to_pylist() for column in rated))


def adapter_seed(adapter: Path) -> int:
    """A seed of the adapter's own: no audit's prompts and noise are met again by the adapter that comes after it."""
    return int(hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:8], 16)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "prompts", "ratings", "adapter", "reward", "second-judge", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt and model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
