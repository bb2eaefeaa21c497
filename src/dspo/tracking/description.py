"""What MLflow's pages say in words (Markdown): of the experiment, of a run, of a version of the registered model.

Pages show ``SAMPLE_GRID`` by the server's own address of a run's artifact, relative to the page, so that it is found
under any host name.
"""

from collections.abc import Mapping

from dspo.reporting.tables import JUDGES, Table, interval, markdown, number
from dspo.tracking.champion import CHAMPION, model_name
from dspo.tracking.record import EVALUATE, EXPERIMENT_NAME, RunRecord

NOTE = "mlflow.note.content"  # the tag that MLflow shows as the description of a run or an experiment
SAMPLE_GRID = "sample_grid.png"
WIN_RATES = "results.tuned_against_base.win_rates"
RIGHT = "results.tuned_against_base.fully_right"


def describe_experiment(record: RunRecord, run: str) -> str:
    """``record``: the newest run."""
    model = model_name(record.world)
    return f"""Preference tuning of SDXL with DoRA adapters. Files are the truth, DVC keeps them, and this is their
mirror: `dspo sync` sends what is missing.

One run is one run of the pipeline, with a nested run for each stage: parameters, figures, curves, plots and the report
as `index.html`. Runs of `dvc exp run` carry its name. Datasets have DVC's md5 as digest. Adapters are versions of
[{model}](#/models/{model}).

# The newest run

{describe_run(record, run)}

{_load(record)}"""


def describe_run(record: RunRecord, run: str) -> str:
    return "\n\n".join((_what(record), _figures(record), _grid(run), _hashes(record)))


def describe_version(record: RunRecord, run: str, experiment: str) -> str:
    judged = f"Judged in the run [{run_name(record)}](#/experiments/{experiment}/runs/{run})."
    return "\n\n".join((_what(record), judged, _figures(record), _grid(run), _hashes(record), _load(record)))


def run_name(record: RunRecord) -> str:
    return record.tags.get(EXPERIMENT_NAME) or f"{record.world}-{record.key[:8]}"


def _what(record: RunRecord) -> str:
    training = record.training
    revision = f"revision `{record.base_revision}`"
    if record.base_revision is None:
        revision = f"a folder of this repository, md5 `{record.base_md5}`" if record.base_md5 else "a folder"
    return (
        f"DoRA adapter of rank {training['train.rank']} for the UNet of `{record.base_model}` ({revision}), tuned by "
        f"preference in the world `{record.world}`: loss `{training['train.loss']}`, learning rate "
        f"{training['train.lr']}, {training['train.epochs']} epochs, seed {training['seed']}."
    )


def _figures(record: RunRecord) -> str:
    """Tuned against base, on held-out prompts, from the same noise."""
    metrics = record.metrics(EVALUATE)
    rows = [
        [f"win rate over base, {words}", *_estimate(metrics, f"{WIN_RATES}.{judge}", "win_rate")]
        for judge, words in JUDGES.items()
        if f"{WIN_RATES}.{judge}.win_rate" in metrics
    ]
    if f"{RIGHT}.difference.value" in metrics:
        base, tuned = (number(metrics[f"{RIGHT}.{name}.value"]) for name in ("base", "tuned"))
        rows.append([f"fully right images ({base} to {tuned}), rise", *_estimate(metrics, f"{RIGHT}.difference")])
    if not rows:
        return "No judge gave figures."
    decided = metrics.get(f"{WIN_RATES}.gold_overall.n_decided")
    note = "" if decided is None else f" The gold judge decided {decided:.0f} images."
    note = f"On held-out prompts, from the same noise.{note}"
    return markdown(Table("", ("figure", "value", "95 % interval"), rows, note))


def _estimate(metrics: Mapping[str, float], key: str, value: str = "value") -> tuple[str, str]:
    low, high = metrics.get(f"{key}.low"), metrics.get(f"{key}.high")
    return number(metrics[f"{key}.{value}"]), interval(low, high)


def _grid(run: str) -> str:
    return f"![The same prompts from the same noise, base above tuned](get-artifact?path={SAMPLE_GRID}&run_uuid={run})"


def _hashes(record: RunRecord) -> str:
    tags = record.tags
    rows = [
        ["Git commit", f"`{tags['git.commit']}`" + (", with changes" if tags["git.dirty"] == "true" else "")],
        ["adapter, DVC's md5", f"`{record.adapter_md5}`"],
        ["dvc.lock, md5", f"`{tags['dvc.lock_md5']}`"],
        ["params.yaml, md5", f"`{tags['dvc.params_md5']}`"],
    ]
    return markdown(Table("", ("what", "hash"), rows))


def _load(record: RunRecord) -> str:
    start = "any folder" if record.base_revision else "the repository's root, which holds the base"
    sampler = record.sampler
    size = f"height={sampler.resolution}, width={sampler.resolution}"
    return f"""**Load it** from {start}; `/VERSION` in the place of `@{CHAMPION}` names a version:

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{model_name(record.world)}@{CHAMPION}")
pipe = model.get_raw_model()
settings = dict(num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance_scale:g}, {size})
pipe("PROMPT", **settings).images[0].save("image.png")
```

That is the pipeline that was judged: {_pipeline(record)}."""


def _pipeline(record: RunRecord) -> str:
    base = record.base
    vae = "" if base["vae"] is None else f", with the VAE `{base['vae']}`"
    files = "" if base["variant"] is None else f" from the files `{base['variant']}`"
    return f"`{base['model']}`{files} in {base['dtype']}{vae}, sampled by `{record.sampler.scheduler}`"
