"""The committed studies as tables: what their JSON files hold, without the parts that only programs read."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dspo.data.files import whole_file, write_json
from dspo.reporting.tables import JUDGES, NONE, Json, Table, interval, main_first, markdown, number, rate, words


def study_tables(studies: Json) -> list[Table]:
    """One table for each study that was run; ``studies``: name -> what its file holds."""
    return [_TABLES[name](studies[name]) for name in _TABLES if name in studies]


def write_study(name: str, study: Json, folder: Path) -> None:
    """``NAME.json``, and ``NAME.md`` with the table that the report's page shows of it."""
    write_json(study, folder / f"{name}.json")
    (shown,) = study_tables({name: study})
    with whole_file(folder / f"{name}.md") as partial:
        partial.write_text(markdown(shown) + "\n", encoding="utf-8")


def _losses(study: Json) -> Table:
    cells = {(row["first"], row["second"]): row for row in study["head_to_head"]}
    settings, matched = study["settings"], study["at_the_drift_of_sft"]
    rows = [
        [
            name,
            rate(arm["against_base"]),
            rate(cells.get((name, "sft"))),
            rate(cells.get((name, "dpo"))),
            number(arm["fully_right"]),
            _drift(arm),
            _at_equal_drift(matched.get(name)),
            number(arm["training_seconds"], 0),
        ]
        for name, arm in study["arms"].items()
    ]
    note = (
        f"{_count(settings['trials'], 'trial')} on validation prompts and {_count(settings['seeds'], 'seed')} for each "
        f"row, {settings['epochs']} epochs each; {settings['prompts']} fresh prompts with "
        f"{settings['images_per_prompt']} images. Win rates by the gold judge over decided images, "
        f"{_intervals(settings['seeds'])}; * separable after Holm's correction. At sft's drift: the trial whose drift "
        "is nearest to that of sft's best, its mean gold score less sft's on the validation prompts, one seed. "
        f"{_claims(study['head_to_head'])}"
    )
    columns = ("loss", "over base", "over sft", "over dpo", "fully right", "drift", "at sft's drift", "seconds")
    return Table("Losses beside each other", columns, rows, note)


def _drift(arm: Json) -> str:
    return "ran away" if arm["ran_away"] else f"{arm['drift']:.2e}"


def _at_equal_drift(row: Json | None) -> str:
    if row is None:
        return NONE
    gold = row["gold_less_sft"]
    return f"{gold['value']:+.3f} ({interval(gold['low'], gold['high'])}) at {row['drift']:.1e}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _intervals(seeds: int) -> str:
    """What the intervals hold, in words: of a single training nobody knows how another seed would fare."""
    return f"95 % intervals over {'seeds and prompts' if seeds > 1 else 'prompts, of one seed alone'}"


def _claims(contests: Iterable[Json]) -> str:
    """DSPO against its own controls and its rivals."""
    rows = [row for row in contests if row["second"] not in ("sft", "dpo")]
    return "; ".join(f"{row['first']} over {row['second']}: {rate(row)}" for row in rows)


def _loss_seeds(study: Json) -> Table:
    cells = {(row["first"], row["second"]): row for row in study["head_to_head"]}
    settings = study["settings"]
    arms = {name: study["arms"][name] for name in settings["losses"]}  # the file is sorted by name
    rows = [
        [
            name,
            rate(arm["against_base"]),
            rate(arm["against_base_second"]),
            rate(cells.get((name, "sft"))),
            rate(cells.get((name, "dpo"))),
            number(arm["fully_right"]),
            _drift(arm),
            number(arm["seed_sd"]),
        ]
        for name, arm in arms.items()
    ]
    note = (
        f"{_count(settings['seeds'], 'training seed')} for each row, at the settings of pipelines/losses/params.yaml; "
        f"{settings['prompts']} fresh prompts with {settings['images_per_prompt']} images, of which the base has "
        f"{number(study['base']['fully_right'])} fully right. Win rates by the gold judge, in one column by the second "
        f"judge, over decided images, {_intervals(settings['seeds'])}; * separable after Holm's correction. Last: "
        f"the standard deviation of the seeds' win rates over base. {_claims(study['head_to_head'])}"
    )
    columns = ("loss", "over base", "second judge", "over sft", "over dpo", "fully right", "drift", "sd of seeds")
    return Table("Losses over training seeds", columns, rows, note, figure="loss_seeds")


def _beside(study: Json) -> Table:
    base, settings = study["base"], study["settings"]
    rows = [
        [
            row["name"],
            rate(row["against_base"]),
            number(row["fully_right"]),
            _percent_points(row["fully_right_gain"]),
            number(row["training_seconds"], 0),
        ]
        for row in study["rows"]
    ]
    note = (
        f"{settings['prompts']} fresh prompts with {settings['images_per_prompt']} images, of which the base has "
        f"{number(base['fully_right'])} fully right. Win rates by the gold judge over decided images. All trainings "
        "take about as many steps, at the settings of params.yaml, one seed; LoRA has one rank more and so about as "
        "many parameters. The best of several costs no training, and that many images for one."
    )
    columns = ("what", "over base", "fully right", "more than base, points", "seconds of training")
    return Table("What else could have been done", columns, rows, note)


def _percent_points(gain: Json) -> str:
    return f"{100 * gain['value']:+.1f} ({100 * gain['low']:.1f} to {100 * gain['high']:.1f})"


def _ablation(study: Json) -> Table:
    rows = [
        [
            name,
            number(row["macro_f1"], 4),
            interval(row["macro_f1_low"], row["macro_f1_high"], 4),
            f"{row['difference_to_full']:+.4f}",
            interval(row["difference_low"], row["difference_high"], 4),
        ]
        for name, row in study["rows"].items()
    ]
    note = (
        f"Macro-F1 on {study['n_pairs']} decided votes of {study['n_prompts']} test prompts, ceiling "
        f"{number(study['ceiling_macro_f1'], 4)}. Differences are paired; one seed."
    )
    columns = ("variant", "macro-F1", "95 % interval", "difference to full", "95 % interval")
    return Table("What each part of the reward model is worth", columns, rows, note)


def _overopt(study: Json) -> Table:
    settings = study["settings"]
    of_row = [row.get("win_rates", {}) for row in study["rows"]]
    judges = [judge for judge in JUDGES if any(judge in rates for rates in of_row)]
    rows = []
    for row, rates in zip(study["rows"], of_row, strict=True):
        name = f"{row['count'] or 'all'} ratings, c = {row['wrong_taste']:g}, {row['loss']}, × {row['strength']:g}"
        says = "ran away" if row["ran_away"] else "over-optimised" if row["over_optimised"] else NONE
        judged = [rate(rates.get(judge)) for judge in judges]
        rows.append([name, *judged, f"{row['drift']:.2e}" if "drift" in row else NONE, says])
    falls = f"Gold falls on {len(study['gold_falls_on'])} of {len(rows)} rows" if study["gold_falls_on"] else ""
    note = (
        f"{falls or 'Gold never falls'}; the detector fires on {len(study['detector_fires_on'])}. "
        f"{settings['prompts']} fresh prompts with {settings['images_per_prompt']} images. Win rates over base by the "
        "reward that was trained on (its head overall) and by judges that were not; strength is times the learning "
        "rate; c is the raters' wrong taste."
    )
    columns = ("raters and training", *(JUDGES[judge] for judge in judges), "drift", "detector")
    return Table("Where the proxy rises and gold does not", columns, rows, note)


def _audit(study: Json) -> Table:
    rates = study["tuned_against_base"]["win_rates"]
    rows = [
        [words(name), rate(row), str(row["n_decided"]), str(row["n_images"])] for name, row in main_first(rates).items()
    ]
    note = f"The adapter on {study['num_prompts']} fresh prompts with {study['seeds']} seeds, seed {study['seed']}."
    return Table("Audit", ("judge", "win rate over base", "decided", "images"), rows, note)


def _base(study: list[Json]) -> Table:
    rows = [
        [
            f"{row['scheduler']}, {row['steps']} steps, guidance {row['guidance_scale']:g}",
            number(row["gold"]),
            interval(*row["gold_ci95"]),
            number(row["fully_right"]),
            interval(*row["fully_right_ci95"]),
            str(row["n_images"]),
        ]
        for row in study
    ]
    note = "Mean gold score and fully right share of base images of validation prompts, the highest gold score first."
    columns = ("setting", "gold", "95 % interval", "fully right", "95 % interval", "images")
    return Table("The base's own best sampler setting", columns, rows, note)


_TABLES: dict[str, Callable[[Any], Table]] = {
    "losses": _losses,
    "loss_seeds": _loss_seeds,
    "beside": _beside,
    "ablation": _ablation,
    "overopt": _overopt,
    "audit": _audit,
    "base": _base,
}
STUDIES = tuple(_TABLES)
