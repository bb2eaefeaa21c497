"""The model card and the data statement: what a run did, written from the files that it left.

Both are Markdown. The card begins with the front matter that model hubs read
(https://huggingface.co/docs/hub/model-cards).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dspo.params import BaseModelParams, Params, RatingParams
from dspo.reporting import tables
from dspo.reporting.gates import gates
from dspo.reporting.page import verdict
from dspo.reporting.tables import Json, Table, interval, markdown, number
from dspo.reward.judged import judged_part

SPLITS = ("train", "validation", "test")
SCHEDULERS = {  # as dspo.diffusion.sampling builds them
    "ddim": "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)",
    "dpmpp_2m": "DPMSolverMultistepScheduler.from_config("
    'pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2)',
    "euler": "EulerDiscreteScheduler.from_config(pipe.scheduler.config)",
}
LICENCES = {  # base model -> id of the hub's list, and what it asks
    "models/shapes-sdxl": (
        "apache-2.0",
        "Apache-2.0, as the base model and the code that made it.",
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "openrail++",
        "CreativeML Open RAIL++-M, that of the base model, of which an adapter is a derivative: whoever shares it "
        "passes the licence and its use restrictions (Attachment A) on, says that the model was changed, and keeps the "
        "notices.",
    ),
}
OTHER_LICENCE = ("other", "That of the base model, which is not known here: look it up before you share the adapter.")
OPENAI_CLIP = " The reward model stands on OpenAI's CLIP, under the MIT licence, which asks that its notice goes along."


@dataclass(frozen=True)
class Run:
    """What the stages left: JSON files as they stand in their folders."""

    params: Params
    results: Json  # of evaluate
    summary: Json  # reports/summary.json
    reward: Json  # report.json of train_reward
    training: Json  # metrics.json of train
    prompts: Json  # summary.json of prepare_prompts
    ratings: Json  # summary.json of prepare_ratings
    pairs: Json  # summary.json of score, or of `dspo import-pairs`
    adapter: str  # folder
    adapter_sha256: str
    hashes: Mapping[str, str]  # input folder -> digest

    @property
    def scored(self) -> bool:
        """Whether the pairs are the base's own images, scored; else people brought them."""
        return "candidates" in self.pairs


def model_card(run: Run) -> str:
    """Markdown with front matter."""
    world = run.params.active
    base, shapes = world.base, run.params.world == "shapes"
    licence_id, licence = LICENCES.get(base.model, OTHER_LICENCE)
    front_matter = {
        "license": licence_id,
        "base_model": base.model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-to-image",
        "tags": ["dora", "lora", "dspo", "preference-optimization", "stable-diffusion-xl"],
    }
    settings = {"base": base.model_dump(), "train": world.train.model_dump(), "score": world.score.model_dump()}
    return _render(
        "model_card.md.j2",
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        verdict=verdict(run.results),
        base=base,
        base_name=_named(base.model, base.revision),
        vae_name=base.vae and _named(base.vae, base.vae_revision),
        vae_arguments=base.vae and _arguments(base.vae, revision=base.vae_revision, dtype=base.dtype),
        loader="from_single_file" if base.model.endswith(".safetensors") else "from_pretrained",
        base_arguments=_base_arguments(base),
        scheduler=SCHEDULERS[world.evaluate.sampler.scheduler],
        adapter=run.adapter,
        sha256=run.adapter_sha256,
        use=_use(shapes),
        example="a large striped red circle left of a small blue ring"
        if shapes
        else "a lighthouse at night, oil painting",
        train=world.train,
        sampler=world.evaluate.sampler,
        training=_training(run),
        results=run.results,
        scored=run.scored,
        tables=[markdown(table) for table in _figures(run.results["tuned_against_base"])],
        limits=_limits(run, shapes),
        licence=licence + (OPENAI_CLIP if world.reward.pretrained == "openai" else ""),
        world=run.params.world,
        seed=run.params.seed,
        inputs=markdown(_inputs(run.hashes)),
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


def data_statement(run: Run) -> str:
    """Markdown."""
    world = run.params.active
    simulated = world.ratings.layout == "shapes"
    return _render(
        "data_statement.md.j2",
        world=run.params.world,
        seed=run.params.seed,
        results=run.results,
        prompts_from=_prompts_from("gold" in world.evaluate.judges),
        prompts=markdown(Table("", ("split", "prompts"), [[split, str(run.prompts[split])] for split in SPLITS])),
        candidate_prompts=run.pairs["prompts"] if run.scored else "no",
        validation_prompts=world.train.validation_prompts,
        ratings_from=_raters(world.ratings, run.ratings) if simulated else _people(world.ratings),
        ratings=markdown(_rating_counts(run.ratings)),
        left_out=run.ratings.get("left_out"),
        untrained=run.results["untrained_heads"],
        pairs_from=_pairs_from(run),
        pairs=markdown(_pair_counts(run.pairs)),
        kept_apart=_kept_apart(run.scored),
        people=_privacy(simulated and run.scored),
        inputs=markdown(_inputs(run.hashes)),
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("dspo.reporting", "."),
        autoescape=False,  # noqa: S701  Markdown of our own figures and parameters; no prompt is in it
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(number=number, interval=interval, **values)


def _named(place: str, revision: str | None) -> str:
    return f"`{place}` " + (f"at commit `{revision}`" if revision else "(local files, no revision)")


def _arguments(place: str, revision: str | None, dtype: str, more: Sequence[str] = ()) -> str:
    pinned = [f'revision="{revision}"'] if revision else []
    return ", ".join([f'"{place}"', *pinned, *more, f"dtype=torch.{dtype}"])


def _base_arguments(base: BaseModelParams) -> str:
    variant = [f'variant="{base.variant}"'] if base.variant else []
    return _arguments(base.model, base.revision, base.dtype, variant + (["vae=vae"] if base.vae else []))


def _use(shapes: bool) -> str:
    if shapes:
        return (
            "Intended: research on preference tuning, and tests. The base model knows coloured shapes on small "
            "pictures and nothing else, so that there is no other use."
        )
    return (
        "Intended: images from prompts, for research and for what the licence allows, seen by a person before others "
        "see them. Not intended: what the licence excludes, images passed off as photographs, images of real people. "
        "Nothing here filters prompts or images."
    )


def _training(run: Run) -> list[tuple[str, str]]:
    train, metrics, reward = run.params.active.train, run.training, judged_part(run.reward)
    ceiling = "not known" if reward["ceiling_macro_f1"] is None else number(reward["ceiling_macro_f1"])
    span = interval(reward["macro_f1_low"], reward["macro_f1_high"])
    rewards = f"{number(metrics['reward_base'])} untrained, {number(metrics['reward'])} at the kept epoch"
    rows = [
        ("loss", f"`{train.loss}`, beta {train.beta:g}, lam {train.lam:g}"),
        ("steps", f"{metrics['steps']} of {train.batch_size * train.gradient_accumulation_steps} pairs"),
        ("pairs", f"{metrics['pairs']}, and {metrics['held_out_pairs']} held out"),
        ("epochs", f"{train.epochs}; number {metrics['best_epoch']} is kept, by the reward on validation prompts"),
        ("learning rate", f"{train.lr:g} after {train.warmup_steps} steps of warm-up"),
        ("reward on validation prompts", rewards),
        ("reward model, macro-F1", f"{number(reward['macro_f1'])} ({span}) on {reward['n_pairs']} held-out pairs"),
        ("the most that the ratings' noise allows", ceiling),
    ]
    return rows + ([("control", "random labels: winner and loser by a coin")] if train.random_labels else [])


def _figures(tuned: Json) -> list[Table]:
    right = [tables.fully_right(tuned["fully_right"])] if tuned["fully_right"] else []
    drift = tables.changes("Drift of the images", tuned["drift"])
    return [tables.win_rates(tuned["win_rates"]), *right, tables.diversity(tuned["diversity"]), drift]


def _limits(run: Run, shapes: bool) -> list[str]:
    missed = [
        f"{gate.name} is {number(gate.value)}, {gate.bound} was aimed at."
        for gate in gates(run.summary)
        if not gate.holds
    ]
    limits = [f"Short of its bound: {text}" for text in missed]
    if run.results["untrained_heads"]:
        limits.append(f"No rating labelled {', '.join(run.results['untrained_heads'])}: nothing is known of these.")
    if run.results["verdict"]["over_optimised"]:
        limits.append("**Over-optimised**: the training reward went up while the gold judge did not.")
    limits += tables.gamed(run.results)
    if shapes:
        limits.append(
            "A setting that is best in this small world need not be best for SDXL: sizes of effects do not carry over."
        )
        limits.append(
            "The raters are simulated from the judge that also evaluates: real people disagree in other ways."
        )
    else:
        limits.append("Every judge is a model, and no person was asked. Judges share ancestors: see docs/judges.md.")
        limits.append("The base model's biases stay, and those of whoever rated the images come on top.")
    limits.append("Other samplers, resolutions and languages than those above were not tried.")
    return limits


def _prompts_from(grammar: bool) -> str:
    kind = (
        "Sentences of the grammar of `shapes` (`src/dspo/shapes/grammar.py`); no person wrote them."
        if grammar
        else ("A list that whoever ran this gave; where it comes from is theirs to say.")
    )
    return f"`data/prompts.csv`. {kind}"


def _raters(ratings: RatingParams, summary: Json) -> str:
    taste = (
        f" They also like saturation and large objects (wrong taste {ratings.wrong_taste:g})."
        if ratings.wrong_taste
        else ""
    )
    return (
        "Simulated: no person rated anything. Pictures of the base model and renders were scored by the gold judge, "
        f"and {ratings.votes} raters a pair vote by Davidson's model: temperature {ratings.temperature:g} of the gold "
        f"score, {ratings.tie_rate:.0%} ties and {ratings.side_bias:.0%} for the first side at equal quality.{taste} "
        "On test pairs of the base's own samples, the best that a classifier could do with votes as noisy as these is "
        f"a macro-F1 of {number(summary['bayes_macro_f1'])}."
    )


def _people(ratings: RatingParams) -> str:
    return (
        f"Read from `data/raw`, layout `{ratings.layout}`. Who rated, how they were asked and paid, and under which "
        "licence the set may be used, its publisher says; nothing here knows it. The published splits are not used."
    )


def _rating_counts(summary: Json) -> Table:
    rows = [
        [
            split,
            *(str(summary[split][key]) for key in ("pairs", "prompts")),
            number(summary[split]["tie_share"]),
            number(summary[split]["first_share"]),
        ]
        for split in SPLITS
    ]
    return Table("", ("split", "pairs", "prompts", "ties", "first side wins"), rows)


def _pairs_from(run: Run) -> str:
    world = run.params.active
    if not run.scored:
        return (
            "Brought by `dspo import-pairs`: winner and loser were chosen elsewhere. Latents are the images', encoded."
        )
    samplers = "; ".join(
        f"{s.scheduler}, {s.steps} steps, guidance {s.guidance_scale:g}" for s in world.generate.samplers
    )
    weights = world.score.weights
    reward = " + ".join(f"{weight / sum(weights.values()):g} {head}" for head, weight in weights.items())
    match = ", ".join(name.replace("_", " ") for name in world.score.match) or "nothing"
    return (
        f"{run.pairs['candidates']} images of {_named(world.base.model, world.base.revision)} at "
        f"{world.base.resolution} pixels, {world.generate.candidates_per_sampler} for each prompt and sampler "
        f"({samplers}). The reward model scored them; winner and loser are of one prompt and equal in {match}, chosen "
        f"with `score.select: {world.score.select}`, their reward being {reward}, with a margin of at least "
        f"{world.score.margin:g}, {world.score.max_pairs_per_prompt} a prompt at most."
    )


def _pair_counts(summary: Json) -> Table:
    rows = [["train", summary["pairs_train"]], ["held out", summary["pairs_validation"]], ["all", summary["pairs"]]]
    return Table("", ("pairs", "count"), [[name, str(count)] for name, count in rows])


def _kept_apart(scored: bool) -> str:
    if scored:
        return "Candidates are of training prompts only, and a share of those is held out from training."
    return "Pairs that were brought have prompts of their own: nothing here compares them with the test prompts."


def _inputs(hashes: Mapping[str, str]) -> Table:
    return replace(tables.inputs(hashes), title="")


def _privacy(synthetic: bool) -> str:
    if synthetic:
        return "No data of people: prompts, images and votes were made by programs."
    return "Prompts, images and ratings may hold data of people. Nothing here looks for it or takes it out."
