from hypothesis import given
from hypothesis import strategies as st

from dspo.data.keys import keyed_rng, keyed_seed, keyed_uniform, prompt_id
from dspo.data.splits import split_of


def test_values_are_fixed_for_ever():
    """Every recorded result hangs on these: they may not change."""
    assert keyed_seed(0, "noise", "a", 1) == keyed_seed(0, "noise", "a", "1")
    assert keyed_seed(0, "noise", "a", 1) == 4655559876777810526
    assert prompt_id("a red circle") == "a1e4a280d27cad5b"


@given(st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_different_parts_give_different_seeds(one, other):
    """`("ab", "c")` and `("a", "bc")` must not meet."""
    assert (keyed_seed(0, "x", *one) == keyed_seed(0, "x", *other)) == (one == other)


@given(st.integers(min_value=0), st.text())
def test_ranges(seed, part):
    assert 0 <= keyed_seed(seed, "x", part) < 2**63  # what torch.Generator.manual_seed takes
    assert 0 <= keyed_uniform(seed, "x", part) < 1


def test_uniform_is_uniform():
    draws = [keyed_uniform(3, "x", i) for i in range(2000)]
    assert abs(sum(draws) / 2000 - 0.5) < 0.03
    assert keyed_rng(3, "x", 1).random() == keyed_rng(3, "x", 1).random()


def test_split_depends_on_prompt_and_seed_alone():
    ids = [prompt_id(f"prompt {i}") for i in range(3000)]
    splits = {i: split_of(i, 0, 0.1, 0.3) for i in ids}
    shares = {name: list(splits.values()).count(name) / 3000 for name in ("train", "validation", "test")}
    assert abs(shares["test"] - 0.3) < 0.03
    assert abs(shares["validation"] - 0.1) < 0.02
    assert any(split_of(i, 1, 0.1, 0.3) != splits[i] for i in ids)


def test_test_prompts_of_one_list_are_in_no_training_split_of_another():
    ids = [prompt_id(f"prompt {i}") for i in range(500)]
    in_test = {i for i in ids if split_of(i, 0, 0.1, 0.48) == "test"}
    in_training = {i for i in ids if split_of(i, 0, 0.12, 0.40) == "train"}
    assert not in_test & in_training
