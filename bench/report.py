"""What the rows say: the figures, a table and a plot, beside each other as ``<device>.json``, ``.md`` and ``.png``."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from bench.measure import Row
from dspo.data.files import write_json
from dspo.reporting.plots import BASE_COLOUR, THIRD_COLOUR, TUNED_COLOUR, new_figure, save_png

LORA = ("lora", "lora, peft")
STOCK = ("stock, disable_adapter", "stock, second UNet")
# name, bound, whether it is an upper one, unit
BOUNDS = (
    ("dora_vs_lora_time", 1.10, True, "x"),
    ("dora_vs_lora_memory", 1.05, True, "x"),
    ("step_vs_stock", 3.0, False, "x"),
    ("matrix_rate_share", 0.5, False, ""),
    ("peak_memory_gb", 16.0, True, " GB"),
)


def write(folder: Path, machine: Row, rows: Sequence[Row]) -> Path:
    """Write the three files of a device; -> the first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    found = figures(rows)
    write_json(machine | found | {"rows": list(rows)}, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(table(machine, found, rows, f"{name}.png"), encoding="utf-8")
    save_png(plot(machine, rows), folder / f"{name}.png")
    return folder / f"{name}.json"


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Ratios of medians within the run; ``spread`` holds the smallest and largest ratio of a single round.

    Where a baseline has two forms, ours stands beside the better of them; peft's DoRA beside peft's LoRA. A figure
    whose rows did not fit into memory is None.
    """
    rows = [row for row in rows if "seconds" in row]
    adapters = [row for row in rows if row["group"] == "adapter"]
    plain = {row["variant"]: row for row in adapters if not row["checkpointing"]}
    checkpointed = {row["variant"]: row for row in adapters if row["checkpointing"]}
    recipes = [row for row in rows if row["group"] == "recipe"]
    matrix = next(row for row in rows if row["group"] == "matrix")
    rate = matrix["flops"] / median(matrix["seconds"])

    lora = best(plain, LORA, time)
    ours, peft, peft_lora = (plain.get(name) for name in ("dora, ours", "dora, peft", "lora, peft"))
    stock = min((row for row in recipes if row["variant"] in STOCK), key=time, default=None)
    fast = min((row for row in recipes if row["variant"] == "ours"), key=time, default=None)
    one_sided = min((row for row in recipes if row["variant"] == "ours, loss dspo"), key=time, default=None)
    lean = best(checkpointed, LORA, memory)
    small, small_peft = checkpointed.get("dora, ours"), checkpointed.get("dora, peft")
    return {
        "dora_vs_lora_time": ratio(time, ours, lora),
        "dora_vs_lora_memory": ratio(memory, small, lean),
        "step_vs_stock": ratio(time, stock, fast),
        "matrix_rate_share": ours_share(ours, plain.get("lora"), rate),
        "peak_memory_gb": small and small["memory_gb"],
        "pairs_per_second": fast and fast["pairs"] / time(fast),
        "peft_dora_vs_lora_time": ratio(time, peft, peft_lora),
        "peft_dora_vs_lora_memory": ratio(memory, small_peft, checkpointed.get("lora, peft")),
        "dora_vs_lora_memory_without_checkpointing": ratio(memory, ours, best(plain, LORA, memory)),
        "one_sided_step_vs_stock": ratio(time, stock, one_sided),
        "matrix_tflops": rate / 1e12,
        "spread": {
            "dora_vs_lora_time": spread(ours, lora),
            "peft_dora_vs_lora_time": spread(peft, peft_lora),
            "step_vs_stock": spread(stock, fast),
        },
    }


def time(row: Row) -> float:
    return median(row["seconds"])


def memory(row: Row) -> float:
    return float(row["memory_gb"])


def best(rows: dict[str, Row], variants: Sequence[str], by: Any) -> Row | None:
    return min((rows[name] for name in variants if name in rows), key=by, default=None)


def ratio(of: Any, above: Row | None, below: Row | None) -> float | None:
    return of(above) / of(below) if above and below else None


def spread(above: Row | None, below: Row | None) -> tuple[float, float] | None:
    """Smallest and largest ratio of the rounds; None where the two were not measured beside each other."""
    if not above or not below or any(above[key] != below[key] for key in ("group", "micro_batch", "checkpointing")):
        return None
    ratios = [a / b for a, b in zip(above["seconds"], below["seconds"], strict=True)]
    return min(ratios), max(ratios)


def ours_share(ours: Row | None, lora: Row | None, rate: float) -> float | None:
    """Share of the matrix rate: FLOPs of the step with plain LoRA, which any adapter needs, in our step's time."""
    return float(lora["flops"] / time(ours) / rate) if ours and lora else None


def table(machine: Row, found: Row, rows: Sequence[Row], picture: str) -> str:
    """The figures against their bounds, then every row."""
    lines = [f"# {machine['device']}, size `{machine['size']}`, {machine['dtype']}", ""]
    lines += ["| figure | measured | rounds | bound on a GPU at size `full` |", "|---|---|---|---|"]
    for name, bound, upper, unit in BOUNDS:
        rounds = found["spread"].get(name)
        between = f"{rounds[0]:.2f} to {rounds[1]:.2f}" if rounds else ""
        value = found[name]
        measured = "open" if value is None else f"{value:.3g}{unit}"
        lines.append(f"| `{name}` | {measured} | {between} | {'at most' if upper else 'at least'} {bound:g}{unit} |")
    lines += ["", f"Matrix rate: {found['matrix_tflops']:.3g} TFLOP/s.", "", f"![The same as a picture]({picture})", ""]
    columns = (
        "what",
        "pairs",
        "in one batch",
        "checkpointing",
        "rank",
        "px",
        "s a pair",
        "rounds",
        "GB",
        "GB a pair of the batch",
        "TFLOP a pair",
    )
    for title, groups in (
        ("Adapters, in the same step", ("adapter",)),
        ("Recipes", ("recipe",)),
        ("How our step grows, with checkpointing", ("batch", "rank", "resolution")),
    ):
        lines += [f"## {title}", "", cells(columns), cells(["---"] * len(columns))]
        chosen = [row for row in rows if row["group"] in groups]
        lines += [training_line(row) for row in chosen]
        lines.append("")
    lines += ["## Images", "", "| what | images | px | s/image | GB | TFLOP/image |", "|---|---|---|---|---|---|"]
    lines += [image_line(row) for row in rows if row["group"] == "images"]
    return "\n".join(lines) + "\n"


def cells(values: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def training_line(row: Row) -> str:
    what = f"by {row['group']}" if row["group"] not in ("adapter", "recipe") else row["variant"]
    labels = [what, row["pairs"], row["micro_batch"], "yes" if row["checkpointing"] else "no"]
    labels += [row["rank"], row["resolution"]]
    if "seconds" not in row:
        return cells([*labels, "out of memory", "", "", "", ""])
    n, gb = row["pairs"], memory(row)
    between = f"{min(row['seconds']) / n:.3g} to {max(row['seconds']) / n:.3g}"
    measured = [f"{time(row) / n:.3g}", between, f"{gb:.3g}", f"{gb / row['micro_batch']:.3g}"]
    return cells([*labels, *measured, f"{row['flops'] / n / 1e12:.3g}"])


def image_line(row: Row) -> str:
    n = row["images"]
    what = row["variant"] + (f", {row['steps']} steps" if "steps" in row else "")
    if "seconds" not in row:
        return cells([what, n, row["resolution"], "out of memory", "", ""])
    per_image = f"{row['flops'] / n / 1e12:.3g}"
    return cells([what, n, row["resolution"], f"{time(row) / n:.3g}", f"{memory(row):.3g}", per_image])


def plot(machine: Row, rows: Sequence[Row]) -> Figure:
    """Adapters and recipes with every round as a dot; growth over batch, rank and resolution."""
    figure = new_figure(10.5, 6.6)
    figure.suptitle(f"{machine['device']}, size {machine['size']}, {machine['dtype']}", fontsize=10)
    axes = figure.subplots(2, 3)
    timed = [row for row in rows if "seconds" in row]
    plain = [row for row in timed if row["group"] == "adapter" and not row["checkpointing"]]
    checkpointed = [row for row in timed if row["group"] == "adapter" and row["checkpointing"]]
    bars(axes[0, 0], plain, lambda row: row["seconds"], "seconds a step, no checkpointing")
    bars(axes[0, 1], checkpointed, lambda row: [row["memory_gb"]], "GB, one pair, checkpointing")
    recipes = [
        row | {"variant": row["variant"] + (", checkpointed" if row["checkpointing"] else "")}
        for row in timed
        if row["group"] == "recipe"
    ]
    bars(axes[0, 2], recipes, lambda row: [row["pairs"] / s for s in row["seconds"]], "pairs per second")
    for axis, group, key in zip(axes[1], ("batch", "rank", "resolution"), ("pairs", "rank", "resolution"), strict=True):
        chosen = [row for row in timed if row["group"] == group]
        over = [row[key] for row in chosen]
        axis.plot(over, [time(row) / row["pairs"] for row in chosen], "o-", color=TUNED_COLOUR, label="seconds a pair")
        axis.set_ylim(bottom=0)
        axis.set_xlabel({"pairs": "pairs in a batch", "rank": "rank", "resolution": "pixels"}[key])
        axis.set_ylabel("seconds a pair", color=TUNED_COLOUR)
        right = axis.twinx()
        right.plot(over, [memory(row) for row in chosen], "s--", color=THIRD_COLOUR, label="GB")
        right.set_ylim(bottom=0)
        right.set_ylabel("GB in all", color=THIRD_COLOUR)
    return figure


def bars(axis: Any, rows: Sequence[Row], values: Any, title: str) -> None:
    """The median as a bar, each round as a dot."""
    for place, row in enumerate(rows):
        measured = values(row)
        ours = row["variant"].startswith("ours") or row["variant"] == "dora, ours"
        axis.barh(place, median(measured), color=TUNED_COLOUR if ours else BASE_COLOUR)
        axis.plot(measured, [place] * len(measured), ".", color="black", markersize=3)
    labels = [row["variant"] for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
