"""Which split a prompt belongs to."""

from dspo.data.keys import keyed_uniform

SPLITS = ("train", "validation", "test")


def split_of(prompt_id: str, seed: int, validation_share: float, test_share: float) -> str:
    """``train``, ``validation`` or ``test``: depends on the prompt and the seed alone, never on the rest of the list.

    Prompt lists and ratings use the same draw. A prompt in the test split of one is therefore in no training split of
    the other, as long as the shares are alike.
    """
    draw = keyed_uniform(seed, "split", prompt_id)
    if draw < test_share:
        return "test"
    return "validation" if draw < test_share + validation_share else "train"
