"""Make the pictures that the simulated raters look at: three samples of the base per prompt, for some a render.

The render is as it should be, of a wrong request or spoiled in a known way, so that the reward model also meets what
the base never makes. None of the prompts is in the list that is trained and evaluated on. The gold judge's
scores, which the raters' votes are drawn from, are written beside the pictures.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from dspo.data.images import write_table
from dspo.data.keys import keyed_rng, prompt_id
from dspo.data.prompts import Prompt, read_prompts
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.environment import processes
from dspo.params import BaseModelParams, SamplerParams
from dspo.progress import progress
from dspo.shapes.defects import KINDS, spoil
from dspo.shapes.grammar import parse, wrong_request
from dspo.shapes.judging import judge_all
from dspo.shapes.make_prompts import distinct_prompts
from dspo.shapes.ratings import PICTURES, SEEN
from dspo.shapes.render import SIDE, random_scene, render_float
from dspo.shapes.render import Image as Pixels

BASE_SAMPLES = 3
SAMPLERS = (  # with the candidates' guidance, and with less, so that the reward model also meets worse pictures
    SamplerParams(scheduler="ddim", steps=12, guidance_scale=1.0),
    SamplerParams(scheduler="dpmpp_2m", steps=12, guidance_scale=1.0),
    SamplerParams(scheduler="ddim", steps=12, guidance_scale=2.0),
    SamplerParams(scheduler="ddim", steps=12, guidance_scale=3.0),
)
JPEG_QUALITY = 90
OTHER_SHARE = 1 / 6  # of prompts with a render: against a sample it is an easy pair, and teaches less


def encode_jpeg(pixels: Pixels) -> bytes:
    """JPEG without chroma subsampling: at 64 px that would blur every coloured edge."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def other_picture(prompt: str, seed: int) -> Pixels:
    """A render of the prompt: clean, of a wrong request, or spoiled."""
    rng = keyed_rng(seed, "rated-other", prompt)
    request = parse(prompt)
    if rng.random() < 0.3:
        request = wrong_request(request, rng)
    picture = render_float(random_scene(request, rng))
    if rng.random() < 0.7:
        picture = spoil(picture, str(rng.choice(KINDS)), float(rng.uniform(0.1, 0.8)), rng)
    return np.round(picture * 255).astype(np.uint8)


def base_pictures(
    model: Path, prompts: list[Prompt], seed: int, batch_size: int
) -> Iterator[tuple[Prompt, int, Pixels]]:
    """Samples of the base, the prompts divided among the sampler settings."""
    parts = dict.fromkeys(("revision", "variant", "vae", "vae_revision"))
    base = BaseModelParams(model=str(model), dtype="float32", resolution=SIDE, **parts)
    pipe = load_pipeline(base, torch.device("cpu"))
    for i, sampler in enumerate(SAMPLERS):
        requests = [SampleRequest(p, k, k) for p in prompts[i :: len(SAMPLERS)] for k in range(BASE_SAMPLES)]
        samples = sample(pipe, requests, sampler, SIDE, seed, batch_size)
        for one in progress(samples, len(requests), f"{sampler.scheduler} at {sampler.guidance_scale}"):
            yield one.request.prompt, one.request.sample_index, one.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--exclude", type=Path, required=True, help="prompt list whose prompts are not used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=7800, help="prompts")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    taken = frozenset(prompt.text for prompt in read_prompts(args.exclude, max_characters=400))
    texts = distinct_prompts(args.number, args.seed, "rated-prompts", taken)
    prompts = [Prompt(prompt_id(text), text, 1.0) for text in texts]
    rows = [(p, k, "base", image) for p, k, image in base_pictures(args.base, prompts, args.seed, batch_size=64)]
    with_other = prompts[: round(OTHER_SHARE * len(prompts))]
    rows += [(p, BASE_SAMPLES, "other", other_picture(p.text, args.seed)) for p in with_other]
    rows.sort(key=lambda row: (row[0].id, row[1]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_table(judged(rows), args.output)


def judged(rows: Sequence[tuple[Prompt, int, str, Pixels]]) -> pa.Table:
    """PICTURES of prompt, sample index, source and image; judged as raters see them, after the JPEG."""
    images, captions = [encode_jpeg(row[3]) for row in rows], [row[0].text for row in rows]
    scores = judge_all(images, captions, [f"picture of {caption!r}" for caption in captions], processes())
    columns: dict[str, object] = {
        "prompt_id": [row[0].id for row in rows],
        "caption": captions,
        "sample_index": [row[1] for row in rows],
        "source": [row[2] for row in rows],
        "image": images,
    }
    columns |= {f"gold_{name}": [getattr(score, name) for score in scores] for name in SEEN}
    return pa.table(columns, schema=PICTURES)


if __name__ == "__main__":
    main()
