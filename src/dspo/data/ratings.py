"""Figures that describe a table of ratings."""

import numpy as np
import pyarrow as pa

SUMMARY_COLUMNS = ("prompt_id", "label_0", "source", "p_first")


def summarise(ratings: pa.Table) -> dict[str, float | int | None]:
    """Counts, share of ties, and the first side's share of the votes that are no ties; shares are null without rows."""
    labels = ratings["label_0"].to_numpy()
    base = ratings["source"].to_numpy(zero_copy_only=False) == "base"
    decided = labels != 0.5
    return {
        "pairs": len(labels),
        "prompts": len(set(ratings["prompt_id"].to_pylist())),
        "decided": int(decided.sum()),
        "decided_base": int((decided & base).sum()),
        "base_share": _share(base),
        "tie_share": _share(~decided),
        "first_share": _share(labels[decided] == 1.0),
    }


def _share(flags: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float | None:
    return float(flags.mean()) if len(flags) else None
