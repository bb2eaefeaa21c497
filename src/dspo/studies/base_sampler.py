"""Find the base's own best sampler setting by the gold judge, on validation prompts: `make sampler`.

Tuned and base are judged there, so that a gain is not the gain of a better guidance scale. The result stands in
reports/studies/base.json, and the chosen setting in params.yaml (worlds.shapes.evaluate.sampler).
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from dspo import environment
from dspo.data.files import write_json
from dspo.data.prompts import read_split
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.params import SamplerParams, Scheduler, load_params
from dspo.progress import progress
from dspo.shapes.judging import judge_all

SCHEDULERS: tuple[Scheduler, ...] = ("ddim", "dpmpp_2m", "euler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="validation split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 20])
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt")
    args = parser.parse_args()
    params = load_params(args.params)
    prompts = read_split(args.prompts)
    pipe = load_pipeline(params.active.base, environment.device())
    requests = [SampleRequest(prompt, k, k) for prompt in prompts for k in range(args.seeds)]
    rows = []
    for scheduler, steps, guidance in product(args.schedulers, args.steps, args.guidance):
        sampler = SamplerParams(scheduler=scheduler, steps=steps, guidance_scale=guidance)
        samples = sample(pipe, requests, sampler, params.active.base.resolution, params.seed, batch_size=64)
        images = [one.image for one in progress(samples, len(requests), f"{scheduler} {steps} {guidance}")]
        texts = [request.prompt.text for request in requests]
        scores = judge_all(images, texts, texts, environment.processes())
        row = {"scheduler": scheduler, "steps": steps, "guidance_scale": guidance, "n_images": len(requests)}
        row |= {"gold": float(np.mean([s.overall for s in scores]))}
        row |= {"fully_right": float(np.mean([s.fully_right for s in scores]))}
        rows.append(row)
        print(row, flush=True)
    write_json(sorted(rows, key=lambda row: -float(row["gold"])), args.output)


if __name__ == "__main__":
    main()
