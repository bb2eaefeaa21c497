"""Which part of its test report a reward model is held to."""

from collections.abc import Mapping
from typing import Any


def judged_part(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The test pairs that the reward model is held to.

    Simulated raters have their ceiling of 0.90 on pairs of the base model's own samples: there figure and ceiling
    belong together. Without a known ceiling, all pairs.
    """
    base: Mapping[str, Any] = report["base"]
    return base if base["ceiling_macro_f1"] is not None else report
