"""The evaluation's figures as small CSV files, for `dvc plots` and for spreadsheets."""

from collections.abc import Mapping
from pathlib import Path

from dspo.data.csv_rows import write_csv
from dspo.evaluation.compare import Figures, judge_columns
from dspo.evaluation.paired import Images

_RATE = ("win_rate", "low", "high", "tie_share", "win_rate_ties_half", "n_decided", "n_images", "n_prompts", "tau")


def write_win_rates(comparisons: Mapping[str, Figures], path: Path) -> None:
    """One row for each comparison and judge, from win-rate figures by judge."""
    rows = [
        {"comparison": comparison, "judge": judge, **rate}
        for comparison, rates in comparisons.items()
        for judge, rate in rates.items()
    ]
    write_csv(rows, ("comparison", "judge", *_RATE), path)


def write_deltas(base: Images, tuned: Images, path: Path) -> None:
    """One row for each pair of images: tuned minus base by every judge. Reward against gold is a scatter plot of it."""
    columns = judge_columns(base)
    deltas = {column: tuned.scores[column] - base.scores[column] for column in columns}
    rows = [
        {"prompt_id": pid, "sample_index": int(index), **{column: float(deltas[column][row]) for column in columns}}
        for row, (pid, index) in enumerate(zip(base.prompt_ids, base.sample_index, strict=True))
    ]
    write_csv(rows, ("prompt_id", "sample_index", *columns), path)
