"""Views of an image: other pixels in each of the backbone's patches, and hardly anything that people judge otherwise.

A mirror exchanges left and right. A move by half a patch puts every edge elsewhere in its patch: what a vision
transformer reads of it depends on that (Zhang 2019, arXiv 1904.11486, on networks that subsample).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dspo.data.images import Pixels


class View(NamedTuple):
    mirrored: bool
    up: int  # half patches that it is moved; the last row and column are repeated where that leaves a gap
    left: int

    def image(self, image: Pixels, patch: int) -> Pixels:
        """A uint8 image [height, width, 3] as it is seen, of the same size; ``patch``: a patch's side in pixels."""
        up, left = self.up * patch // 2, self.left * patch // 2
        turned = image[:, ::-1] if self.mirrored else image
        return np.pad(turned[up:, left:], ((0, up), (0, left), (0, 0)), mode="edge")

    def captions(self, captions: Sequence[str]) -> list[str]:
        """What is true of the view: "left" and "right" exchanged in a mirror."""
        return [_exchanged(text) for text in captions] if self.mirrored else list(captions)


# A reward model has the first so many (`reward.views`). Straight and mirrored in turn: an even number is balanced.
VIEWS = (View(False, 0, 0), View(True, 1, 1), View(False, 0, 1), View(True, 1, 0))


def _exchanged(text: str) -> str:
    sides = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub(r"\b([Ll]eft|[Rr]ight)\b", lambda found: sides[found[0]], text)
