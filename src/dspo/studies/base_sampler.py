"""Find the base's own best sampler setting by the gold judge, on validation prompts: `make sampler`.

Tuned and base are judged there, so that a gain is not the gain of a better guidance scale. The result stands in
reports/studies/base.json, and the chosen setting in params.yaml (worlds.shapes.evaluate.sampler): of those that no
interval tells from the best, one with the fewest steps.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from dspo.data.files import write_json
from dspo.data.keys import keyed_seed
from dspo.data.prompts import read_split
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.environment import device, processes
from dspo.evaluation.statistics import mean
from dspo.params import Params, SamplerParams, Scheduler, load_params
from dspo.progress import progress
from dspo.shapes.gold import GoldScore
from dspo.shapes.judging import judge_all
from dspo.stages.runner import run

SCHEDULERS: tuple[Scheduler, ...] = ("ddim", "dpmpp_2m", "euler")


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    pipe = load_pipeline(params.active.base, device())
    requests = [SampleRequest(prompt, k, k) for prompt in read_split(args.prompts) for k in range(args.seeds)]
    texts = [request.prompt.text for request in requests]
    rows = []
    for scheduler, steps, guidance in product(args.schedulers, args.steps, args.guidance):
        sampler = SamplerParams(scheduler=scheduler, steps=steps, guidance_scale=guidance)
        samples = sample(pipe, requests, sampler, params.active.base.resolution, params.seed, batch_size=64)
        images = [one.image for one in progress(samples, len(requests), f"{scheduler} {steps} {guidance}")]
        scores = judge_all(images, texts, texts, processes())
        rows.append(sampler.model_dump() | figures(scores, [request.prompt.id for request in requests], params))
        print(rows[-1], flush=True)
    write_json(sorted(rows, key=lambda row: -float(row["gold"])), args.output)


def figures(scores: Sequence[GoldScore], prompt_ids: list[str], params: Params) -> dict[str, Any]:
    """Mean gold score and fully right share of images, each with its interval; one prompt id per image."""
    row: dict[str, Any] = {"n_images": len(scores)}
    columns = {"gold": [s.overall for s in scores], "fully_right": [float(s.fully_right) for s in scores]}
    for name, column in columns.items():
        key = keyed_seed(params.seed, "base sampler", name)
        estimate = mean(column, prompt_ids, params.active.evaluate.bootstrap_resamples, key)
        row |= {name: estimate.value, f"{name}_ci95": [estimate.low, estimate.high]}
    return row


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="validation split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=["ddim", "dpmpp_2m"])
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
