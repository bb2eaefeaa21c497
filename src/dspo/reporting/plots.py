"""The plots of the report, as SVG for the page and PNG for files; equal figures give equal bytes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

matplotlib.rcParams["svg.hashsalt"] = "dspo"
matplotlib.rcParams["svg.fonttype"] = "none"

BASE_COLOUR, TUNED_COLOUR = "#8a8f98", "#1668c5"
Pixels = NDArray[np.uint8]


def new_figure(width: float = 6.4, height: float = 3.2) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure without XML head and dates; colours of text follow the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def training_curves(log: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Loss of steps and held-out pairs, implicit accuracy, margin, and the reward on validation prompts."""
    figure = new_figure(7.6, 4.6)
    axes = figure.subplots(2, 2)
    smooth = log["loss"].rolling(max(1, len(log) // 20), min_periods=1).mean()
    axes[0, 0].plot(log["step"], smooth, color=TUNED_COLOUR, label="training, running mean")
    axes[0, 0].plot(epochs["step"], epochs["loss"], "o-", color=BASE_COLOUR, label="held-out")
    axes[0, 0].set_title("loss")
    axes[0, 0].legend(frameon=False)
    for axis, name, title in (
        (axes[0, 1], "reward", "reward of images of validation prompts"),
        (axes[1, 0], "implicit_accuracy", "implicit accuracy, held-out"),
        (axes[1, 1], "margin", "margin of the implicit reward, held-out"),
    ):
        axis.plot(epochs["step"], epochs[name], "o-", color=TUNED_COLOUR)
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def judges_plot(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Decided win rate of tuned over base by every judge, with its 95 % interval."""
    shown = [(name, row) for name, row in rows.items() if row["win_rate"] is not None]
    figure = new_figure(7.0, 0.34 * len(shown) + 0.9)
    axis = figure.subplots()
    for position, (_name, row) in enumerate(reversed(shown)):
        axis.plot([row["low"], row["high"]], [position, position], color=TUNED_COLOUR, linewidth=3, alpha=0.4)
        axis.plot(row["win_rate"], position, "o", color=TUNED_COLOUR)
    axis.axvline(0.5, color=BASE_COLOUR, linewidth=1)
    axis.set_yticks(range(len(shown)), [name.replace("_", " ") for name, _ in reversed(shown)])
    axis.set_xlim(0, 1)
    axis.set_xlabel("win rate of tuned over base, decided images")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def score_distributions(base: pd.DataFrame, tuned: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Histograms of each score, base beside tuned, in common bins."""
    rows = (len(columns) + 2) // 3
    figure = new_figure(7.6, 1.9 * rows)
    axes = figure.subplots(rows, 3, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        bins = np.histogram_bin_edges(np.concatenate([base[column], tuned[column]]), bins=24)
        axis.hist(base[column], bins=bins, color=BASE_COLOUR, alpha=0.6, label="base")
        axis.hist(tuned[column], bins=bins, color=TUNED_COLOUR, alpha=0.6, label="tuned")
        axis.set_title(column.replace("_", " "), fontsize=9)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _framed(image: Pixels) -> Pixels:
    return np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255)


def grid(pairs: Sequence[tuple[Pixels, Pixels]], columns: int = 8, scale: int = 2) -> Image.Image:
    """Base above tuned, ``columns`` pairs to a row."""
    rows = []
    for start in range(0, len(pairs) - len(pairs) % columns, columns):
        part = pairs[start : start + columns]
        rows += [np.concatenate([_framed(pair[k]) for pair in part], axis=1) for k in range(2)]
        rows.append(np.full((6, rows[-1].shape[1], 3), 255, np.uint8))
    picture = np.concatenate(rows[:-1], 0)
    return Image.fromarray(picture).resize(
        (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.NEAREST
    )
