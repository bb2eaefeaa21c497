"""The plots of the report, as SVG for the page and PNG for files; equal figures give equal bytes."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspo.reporting.tables import BASE_AND_TUNED, Names, words

matplotlib.rcParams["svg.hashsalt"] = "dspo"
matplotlib.rcParams["svg.fonttype"] = "none"

BASE_COLOUR, TUNED_COLOUR, THIRD_COLOUR = "#8a8f98", "#2f7fd6", "#d9822b"
QUARTILES = ("q1", "q2", "q3", "q4")


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """The figure as an element for the page: no XML head, no dates, ids that begin with ``name``.

    Black is left to the page, whose text may be light on dark.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)


def save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110, facecolor="white", metadata={"Software": None})


def training_curves(log: pd.DataFrame, epochs: pd.DataFrame, best_epoch: int) -> Figure:
    """Loss, reward, implicit accuracy, margin, spread of u and DSPO's pull, over steps.

    ``log``: one row per step; ``epochs``: one row per epoch on held-out pairs, epoch 0 is the untrained adapter.
    """
    figure = new_figure(9.6, 5.2)
    axes = figure.subplots(2, 3)
    smooth = log["loss"].rolling(max(1, len(log) // 20), min_periods=1).mean()
    axes[0, 0].plot(log["step"], smooth, color=BASE_COLOUR, label="training, running mean")
    over_epochs(axes[0, 0], epochs, ["loss"], "loss", ["held-out"])
    over_epochs(axes[0, 1], epochs, ["reward"], "reward, validation prompts")
    over_epochs(axes[0, 2], epochs, ["implicit_accuracy"], "implicit accuracy, held-out")
    over_epochs(axes[1, 0], epochs, ["margin"], "margin, held-out")
    by_noise = [f"u_std_{quartile}" for quartile in QUARTILES]
    over_epochs(axes[1, 1], epochs, ["u_std", *by_noise], "std of u: all, and by quarter of t", ["all", *QUARTILES])
    over_epochs(axes[1, 2], epochs, ["pull"], "pull k‖e-r‖ / ‖e-y‖")
    axes[1, 2].axhline(0.1, color=THIRD_COLOUR, linewidth=1, linestyle="--")
    kept = epochs["step"].iloc[best_epoch]
    for axis in axes.flat:
        axis.axvline(kept, color=BASE_COLOUR, linewidth=1, linestyle=":")
    return figure


def over_epochs(
    axis: Axes, epochs: pd.DataFrame, columns: Sequence[str], title: str, labels: Sequence[str] = ()
) -> None:
    """Lines of the columns that were measured; the first is the one that counts."""
    for number, column in enumerate(columns):
        if column in epochs and epochs[column].notna().any():
            look: dict[str, Any] = {"color": TUNED_COLOUR, "marker": "o", "markersize": 4}
            if number > 0:
                look = {"color": THIRD_COLOUR, "alpha": 0.25 + 0.18 * number}
            label = labels[number] if labels else None
            axis.plot(epochs["step"], epochs[column], linewidth=1.5, label=label, **look)
    plain(axis, title, "step")
    if labels and axis.lines:
        axis.legend(frameon=False, fontsize=8)


def plain(axis: Axes, title: str, x: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def judges_plot(rows: Mapping[str, Mapping[str, Any]], names: Names = BASE_AND_TUNED) -> Figure:
    """Decided win rate of the second side over the first by every judge, with its 95 % interval."""
    shown = [(name, row) for name, row in rows.items() if row["win_rate"] is not None][::-1]
    figure = new_figure(5.4, 0.32 * len(shown) + 0.9)
    axis = figure.subplots()
    for position, (name, row) in enumerate(shown):
        colour = BASE_COLOUR if name.startswith("reward") else TUNED_COLOUR
        axis.plot([row["low"], row["high"]], [position, position], color=colour, linewidth=3, alpha=0.5)
        axis.plot(row["win_rate"], position, "o", color=colour)
    axis.axvline(0.5, color=THIRD_COLOUR, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(shown)), [words(name) for name, _ in shown])
    axis.set_xlim(0, 1)
    plain(axis, f"Win rate of {names[1]} over {names[0]}; grey: trained on", "share of decided images")
    return figure


def seeds_plot(study: Mapping[str, Any]) -> Figure:
    """Decided win rate over base of each loss with its 95 % interval, and a ring for each training seed.

    ``study``: what ``loss_seeds.json`` holds. A loss of which a training ran away has the rings of the others alone.
    """
    losses = study["settings"]["losses"]
    figure = new_figure(5.4, 0.42 * len(losses) + 0.9)
    axis = figure.subplots()
    for position, loss in enumerate(losses):
        arm = study["arms"][loss]
        pooled, seeds = arm["against_base"], [row["win_rate"] for row in arm["seeds"].values()]
        if pooled and pooled["win_rate"] is not None:
            axis.plot([pooled["low"], pooled["high"]], [position] * 2, color=TUNED_COLOUR, linewidth=3, alpha=0.5)
            axis.plot(pooled["win_rate"], position, "|", color=TUNED_COLOUR, markersize=12, markeredgewidth=2)
        shown = [rate for rate in seeds if rate is not None]
        axis.plot(shown, [position] * len(shown), "o", color=TUNED_COLOUR, markerfacecolor="none", markersize=6)
    axis.axvline(0.5, color=THIRD_COLOUR, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(losses)), losses)
    axis.set_ylim(len(losses) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    plain(axis, "Gold win rate over base; a ring is a training seed", "share of decided images")
    return figure


def score_distributions(
    base: pd.DataFrame, tuned: pd.DataFrame, columns: Sequence[str], names: Names = BASE_AND_TUNED
) -> Figure:
    """Histograms of each score, both sides in common bins."""
    across = 4
    rows = -(-len(columns) // across)
    figure = new_figure(9.6, 1.75 * rows)
    axes = figure.subplots(rows, across, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        bins = np.histogram_bin_edges(np.concatenate([base[column], tuned[column]]), bins=24)
        axis.hist(base[column], bins=bins, color=BASE_COLOUR, alpha=0.55, label=names[0])
        axis.hist(tuned[column], bins=bins, color=TUNED_COLOUR, histtype="step", linewidth=1.5, label=names[1])
        plain(axis, words(column), "")
        axis.set_yticks([])
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def reward_curve(curve: pd.DataFrame) -> Figure:
    """The reward model's loss and its validation likelihood and accuracy, over epochs."""
    figure = new_figure(9.6, 2.6)
    axes = figure.subplots(1, 3)
    axes[0].plot(curve["epoch"], curve["train_loss"], color=TUNED_COLOUR)
    plain(axes[0], "training loss", "epoch")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, name, title in (
        (axes[1], "nll", "negative log-likelihood, validation"),
        (axes[2], "accuracy", "pair accuracy, validation"),
    ):
        axis.plot(curve["epoch"], curve[f"validation_{name}_raw"], color=BASE_COLOUR, label="raw")
        axis.plot(curve["epoch"], curve[f"validation_{name}_ema"], color=TUNED_COLOUR, label="EMA")
        axis.legend(frameon=False, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axis, title, "epoch")
    return figure
