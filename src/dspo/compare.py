"""Two adapters from the same noise, judged by the world's judges, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dspo.data.files import write_json
from dspo.data.prompts import Prompt
from dspo.diffusion.base import load_pipeline, local_files
from dspo.environment import device, processes
from dspo.evaluation import compare
from dspo.evaluation.compare import Comparison
from dspo.evaluation.foreign import places
from dspo.evaluation.judges import load_judges
from dspo.evaluation.paired import Images, evaluation_requests, load_shards, sample_to_shards
from dspo.params import Params
from dspo.preference.dora import load_adapter
from dspo.reporting import plots
from dspo.reporting.page import compared, judge_name, main_judge, render
from dspo.reporting.pictures import choose
from dspo.reporting.tables import Names, main_first, words
from dspo.shapes.grammar import check_readable
from dspo.stages.atomic import open_scratch
from dspo.stages.evaluate import judged
from dspo.stages.report import digest

NAMES: Names = ("A", "B")


def compare_adapters(
    params: Params,
    adapters: tuple[Path, Path],
    prompts: Sequence[Prompt],
    seeds_per_prompt: int,
    reward: Path,
    second_judge: Path,  # read where evaluate.judges lists the second judge
    output: Path,
) -> str:
    """Write ``output/index.html`` and ``output/results.json``, and return the verdict.

    Images are made at ``evaluate.sampler``, ``seeds_per_prompt`` of every prompt. The same command again, after an
    interruption, goes on where it stopped. Raises :class:`UserError` for adapters of another base, judges that are not
    there, or prompts that the world's judges cannot read.
    """
    world = params.active
    settings = world.evaluate
    places.require(settings.foreign_judges)
    check_readable((prompt.text for prompt in prompts), settings.judges)
    what = {
        "seed": params.seed,
        "base": world.base.model_dump(mode="json"),
        "evaluate": settings.model_dump(mode="json"),
        "prompts": [prompt.text for prompt in prompts],
        "seeds_per_prompt": seeds_per_prompt,
    }
    second = [second_judge] if "second" in settings.judges else []
    local = [*local_files(world.base), *places.local_files(settings.foreign_judges)]
    scratch = open_scratch("compare", what, [*adapters, reward, *second, *local])
    judges = load_judges(settings, reward, second_judge, processes())

    requests = evaluation_requests(prompts, seeds_per_prompt, 0, 2)
    for name, adapter in zip(NAMES, adapters, strict=True):
        pipe = load_pipeline(world.base, device())
        pipe.unet = load_adapter(pipe.unet, adapter)
        common = (world.base.resolution, params.seed, settings.batch_size)
        sample_to_shards(pipe, requests, settings.sampler, *common, scratch.path / name)
    first, other = judged(judges, {name: load_shards(scratch.path / name) for name in NAMES}).values()

    how = Comparison(settings.tie_band, settings.bootstrap_resamples, params.seed)
    results = {
        "world": params.world,
        "seed": params.seed,
        "names": dict(zip(NAMES, map(str, adapters), strict=True)),
        "n_prompts": len(prompts),
        "n_images": len(first.images),
        "tuned_against_base": compare.tuned_against_base(first, other, how),  # B against A
        "verdict": compare.verdict(how.win_rates(other, first)),
    }
    inputs = {f"{name}: {adapter}": digest(adapter) for name, adapter in zip(NAMES, adapters, strict=True)}
    text = str(yaml.safe_dump({**what, "prompts": len(prompts)}, sort_keys=False))
    (scratch.path / "index.html").write_text(page(results, first, other, text, inputs), encoding="utf-8")
    write_json(results, scratch.path / "results.json")
    scratch.publish({name: output / name for name in ("index.html", "results.json")})
    return compared(results, NAMES)


def page(results: dict[str, Any], first: Images, other: Images, params: str, inputs: dict[str, str]) -> str:
    rates = results["tuned_against_base"]["win_rates"]
    judge = main_judge(rates)
    judges = sorted(main_first(rates), key=lambda name: name != judge)
    one, two = (pd.DataFrame(images.table.to_pydict() | images.scores) for images in (first, other))
    figures = {
        "judges": plots.judges_plot(main_first(rates), NAMES),
        "distributions": plots.score_distributions(one, two, list(main_first(rates)), NAMES),
    }
    return render(
        "compare.html.j2",
        title=f"{NAMES[0]} against {NAMES[1]}",
        verdict=compared(results, NAMES),
        judge=judge,
        judge_name=judge_name(rates),
        results=results,
        names=NAMES,
        pictures=choose(one, two, judges, rates[judge]["tau"]),
        judges=[words(name) for name in judges],
        figures={name: plots.svg(figure, name) for name, figure in figures.items()},
        params=params,
        inputs=inputs,
    )
