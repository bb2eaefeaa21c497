"""What the studies share: prompts drawn anew, sampling that survives a kill, cached results."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

import dspo
from dspo.data.files import read_json, write_json
from dspo.data.keys import keyed_rng, prompt_id
from dspo.data.prompts import Prompt
from dspo.environment import scratch_root
from dspo.evaluation.judges import Judges, load_judges
from dspo.evaluation.paired import Images, evaluation_requests, load_shards, sample_to_shards
from dspo.params import Params
from dspo.shapes.grammar import random_prompt
from dspo.stages.atomic import fingerprint


def fresh_prompts(count: int, known: Iterable[str], seed: int, purpose: str) -> list[Prompt]:
    """``count`` prompts of the grammar that are not among ``known``, sorted by id; ``purpose`` keys the draw."""
    rng = keyed_rng(seed, "fresh prompts", purpose)
    taken = set(known)
    texts: set[str] = set()
    while len(texts) < count:
        text = random_prompt(rng)
        if text not in taken:
            texts.add(text)
    return sorted((Prompt(prompt_id(text), text) for text in texts), key=lambda prompt: prompt.id)


def judges_of_shapes(params: Params, reward: Path, second_judge: Path, processes: int) -> Judges:
    """Both judges of the world `shapes`, whichever ``evaluate.judges`` lists; ``processes`` of the gold judge."""
    settings = params.active.evaluate.model_copy(update={"judges": ["gold", "second"]})
    return load_judges(settings, reward, second_judge, processes)


def judged_samples(
    pipe: StableDiffusionXLPipeline,
    prompts: list[Prompt],
    seeds: int,
    noise_seed: int,
    params: Params,
    judges: Judges,
    folder: Path,
) -> Images:
    """``seeds`` images of every prompt at the evaluation's sampler, judged; finished batches in ``folder`` are kept."""
    settings, base = params.active.evaluate, params.active.base
    requests = evaluation_requests(prompts, seeds, 0, seeds)
    sample_to_shards(pipe, requests, settings.sampler, base.resolution, noise_seed, settings.batch_size, folder)
    images = load_shards(folder)
    return replace(images, scores=judges.score(list(images.images), images.captions))


def study_folder(name: str, what_decides: Mapping[str, Any], inputs: Iterable[Path]) -> Path:
    """Where a long study keeps its finished pieces: another folder for other parameters, inputs or methods.

    Of the code only what decides an adapter and its judgement counts, so that a new table does not cost a day.
    """
    source = Path(dspo.__file__).parent
    parts = ("data", "diffusion", "preference", "reward", "shapes")
    code = [file for part in parts for file in (source / part).glob("*.py")]
    code += [source / name for name in ("evaluation/judges.py", "studies/pair_sets.py", "studies/trials.py")]
    folder = scratch_root() / "studies" / name / fingerprint(what_decides, inputs, sorted(code))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in ``path``; made and written there if the file is missing."""
    if not path.exists():
        write_json(make(), path)
    return read_json(path)
