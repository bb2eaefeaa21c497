"""Base against tuned from the same noise, under judges that were not trained on.

    python -m dspo.stages.evaluate --params params.yaml --prompts data/prompts/test.csv
        --train-prompts data/prompts/train.csv --adapter models/adapter --reward models/reward
        --second-judge models/shapes-judge --output data/evaluation

``docs/load_adapter.py`` makes the tuned images again, to the bit, with diffusers and peft alone.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dspo import distributed
from dspo.data.files import write_json
from dspo.data.prompts import Prompt, read_split
from dspo.diffusion.base import load_pipeline, local_files
from dspo.environment import device, processes
from dspo.errors import UserError
from dspo.evaluation import compare
from dspo.evaluation.compare import Comparison, Figures
from dspo.evaluation.foreign import places
from dspo.evaluation.hacks import HACKS, apply_hack
from dspo.evaluation.judges import Judges, load_judges
from dspo.evaluation.paired import Image, Images, Made, evaluation_requests, load_shards, sample_to_shards
from dspo.evaluation.tables import write_deltas, write_win_rates
from dspo.params import EvaluateParams, Params, load_params
from dspo.preference.dora import check_base, load_adapter
from dspo.shapes.grammar import check_readable, parse
from dspo.stages.runner import run
from dspo.stages.shared import SharedScratch


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    params = load_params(args.params)
    settings = params.active.evaluate
    if "second" in settings.judges and args.second_judge is None:
        raise UserError("--second-judge: missing, but evaluate.judges asks for it. Give the second judge's folder.")
    places.require(settings.foreign_judges)
    prompts = read_split(args.prompts)[: settings.num_prompts]
    if not prompts:
        raise UserError(f"{args.prompts}: no prompts to evaluate on. Raise prompts.test_share, or add prompts.")
    check_readable((prompt.text for prompt in prompts), settings.judges)
    check_base(args.adapter, params.active.base)
    # Pairs come from the first prompts of the split: only those were seen in training.
    train_prompts = read_split(args.train_prompts)[: params.active.generate.num_prompts]

    scratch = SharedScratch("evaluate", _what_decides(params), _inputs(args, params))
    _sample(params, prompts, args.adapter, scratch.path)
    judges = load_judges(settings, args.reward, args.second_judge, processes())
    sampled = {name: load_shards(scratch.path / name) for name in ("base", "tuned", "default")}
    plain = _some_seeds(sampled["base"], settings)
    hacked = {name: plain.with_images(_hacked(name, plain.images)) for name in HACKS}
    all_judged = judged(judges, sampled | hacked)
    if distributed.first():
        figures = _figures(params, all_judged, train_prompts) | {"untrained_heads": judges.reward.untrained}
        _write(figures, all_judged["base"], all_judged["tuned"], scratch.path / "output")
    scratch.publish({"output": args.output})


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("params", "prompts", "train-prompts", "adapter", "reward", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--second-judge", type=Path, help="needed where evaluate.judges lists it")
    return parser.parse_args(argv)


def _what_decides(params: Params) -> dict[str, Any]:
    world = params.active
    return {
        "seed": params.seed,
        "base": world.base.model_dump(),
        "evaluate": world.evaluate.model_dump(),
        "generate.num_prompts": world.generate.num_prompts,
    }


def _inputs(args: argparse.Namespace, params: Params) -> list[Path]:
    second = [args.second_judge] if "second" in params.active.evaluate.judges else []
    local = [*local_files(params.active.base), *places.local_files(params.active.evaluate.foreign_judges)]
    return [args.prompts, args.train_prompts, args.adapter, args.reward, *second, *local]


def _sample(params: Params, prompts: list[Prompt], adapter: Path, folder: Path) -> None:
    """Fill ``base``, ``default`` (base at the sampler a user would take) and ``tuned`` below ``folder``."""
    settings = params.active.evaluate
    requests = evaluation_requests(
        prompts, settings.seeds_per_prompt, settings.diversity_prompts, settings.diversity_seeds
    )
    first_seeds = [r for r in requests if r.sample_index == 0][: settings.diversity_prompts]
    common = (params.active.base.resolution, params.seed, settings.batch_size)
    pipe = load_pipeline(params.active.base, device())
    sample_to_shards(pipe, requests, settings.sampler, *common, folder / "base")
    sample_to_shards(pipe, first_seeds, settings.default_sampler, *common, folder / "default")
    pipe.unet = load_adapter(pipe.unet, adapter)
    sample_to_shards(pipe, requests, settings.sampler, *common, folder / "tuned")


def _hacked(name: str, images: Sequence[Image]) -> Sequence[Image]:
    return Made(len(images), lambda row: apply_hack(name, images[row]))


def judged(judges: Judges, groups: dict[str, Images]) -> dict[str, Images]:
    """Every group of images with its scores; all are judged in one go, each process judging its share."""
    places = [(group.images, row) for group in groups.values() for row in range(len(group.images))]
    captions = [caption for group in groups.values() for caption in group.captions]
    size = judges.batch_size
    own = [images[row] for images, row in distributed.share(places, size)]
    part = judges.score(own, distributed.share(captions, size)) if own else {}
    rows = distributed.merged([dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)], size)
    scores = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    ends = np.cumsum([len(group.images) for group in groups.values()])
    return {
        name: replace(group, scores={column: s[end - len(group.images) : end] for column, s in scores.items()})
        for (name, group), end in zip(groups.items(), ends, strict=True)
    }


def _diversity_rows(images: Images, settings: EvaluateParams) -> Images:
    chosen = set(list(dict.fromkeys(images.prompt_ids))[: settings.diversity_prompts])
    return images.where(np.array([pid in chosen for pid in images.prompt_ids], dtype=bool))


def _some_seeds(images: Images, settings: EvaluateParams) -> Images:
    of_prompts = _diversity_rows(images, settings)
    return of_prompts.where(of_prompts.sample_index < settings.seeds_per_prompt)


def _figures(params: Params, judged: dict[str, Images], train_prompts: list[Prompt]) -> Figures:
    base, tuned = judged["base"], judged["tuned"]
    settings = params.active.evaluate
    how = Comparison(settings.tie_band, settings.bootstrap_resamples, params.seed)
    base_4, tuned_4 = _diversity_rows(base, settings), _diversity_rows(tuned, settings)
    base_1 = base_4.where(base_4.sample_index == 0)
    combination_known = "gold" in settings.judges  # the grammar of `shapes` says which attributes a prompt combines
    return {
        "world": params.world,
        "seed": params.seed,
        "n_prompts": len(set(base.prompt_ids)),
        "n_images": len(base.images),
        "settings": settings.model_dump(),
        "tuned_against_base": compare.tuned_against_base(base, tuned, how),
        "base_against_base": compare.base_against_base(base, how),
        "agreement_with_gold": compare.agreement_with_gold(base, how),
        "best_of_n": compare.best_of_n(base_4, tuned_4, settings.diversity_seeds, how),
        "best_sampler_against_default": how.win_rate_figures(base_1, judged["default"]),
        "hacks": {name: how.win_rate_figures(judged[name], _some_seeds(base, settings)) for name in HACKS},
        "combinations": compare.combinations(
            base, tuned, lambda prompt: parse(prompt).combination(), [p.text for p in train_prompts], how
        )
        if combination_known
        else None,
        "verdict": compare.verdict(how.win_rates(tuned, base)),
    }


def _write(figures: Figures, base: Images, tuned: Images, output: Path) -> None:
    base.write(output / "base.parquet")
    tuned.write(output / "tuned.parquet")
    write_json(figures, output / "results.json")
    write_win_rates(_win_rate_tables(figures), output / "win_rates.csv")
    write_deltas(base, tuned, output / "deltas.csv")


def _win_rate_tables(figures: Figures) -> dict[str, Figures]:
    """Every comparison of the results that the report and `dvc plots` show beside each other."""
    tables = {
        "tuned against base": figures["tuned_against_base"]["win_rates"],
        "base seed 1 against seed 0": figures["base_against_base"],
        "best of n against base": figures["best_of_n"]["best_against_base"],
        "tuned against best of n": figures["best_of_n"]["tuned_against_best"],
        "base at best sampler against default": figures["best_sampler_against_default"],
    }
    tables |= {f"{name} of base against base": rates for name, rates in figures["hacks"].items()}
    tables |= {f"{name} combinations": rates for name, rates in (figures["combinations"] or {}).items()}
    return tables


if __name__ == "__main__":
    run(main, "dspo.stages.evaluate")
