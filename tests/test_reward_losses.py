"""The losses against values computed by hand."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dspo.reward.losses import bradley_terry_loss, masked_head_loss, mix_rows

shares = st.floats(0.05, 0.95)
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def loss_at(difference: float, label: float, gamma: float) -> float:
    return bradley_terry_loss(torch.tensor(difference), torch.tensor(label), gamma).item()


def test_values_by_hand() -> None:
    assert math.isclose(loss_at(0.0, 1.0, 0.0), math.log(2), rel_tol=1e-6)
    p = 1 / (1 + math.exp(-1.5))
    assert math.isclose(loss_at(1.5, 1.0, 0.0), -math.log(p), rel_tol=1e-6)
    assert math.isclose(loss_at(1.5, 1.0, 2.0), (1 - p) ** 2 * -math.log(p), rel_tol=1e-6)
    soft = -(0.25 * math.log(p) + 0.75 * math.log(1 - p))
    assert math.isclose(loss_at(1.5, 0.25, 1.0), abs(0.25 - p) * soft, rel_tol=1e-5)


@given(shares, gammas)
def test_minimum_is_where_the_probability_is_the_share(share: float, gamma: float) -> None:
    logits = torch.linspace(-6, 6, 4801)
    losses = bradley_terry_loss(logits, torch.full_like(logits, share), gamma)
    assert abs(logits[losses.argmin()].sigmoid().item() - share) < 2e-3


@given(st.floats(-8, 8), st.floats(0, 1), gammas)
def test_swapping_the_sides_changes_nothing(difference: float, share: float, gamma: float) -> None:
    assert math.isclose(
        loss_at(difference, share, gamma),
        loss_at(-difference, 1 - share, gamma),
        rel_tol=1e-4,
        abs_tol=1e-6,
    )


def test_large_differences_stay_finite() -> None:
    assert loss_at(200.0, 0.0, 0.0) == 200.0
    assert loss_at(-200.0, 0.0, 1.0) == 0.0


def test_heads_are_normalised_by_their_own_labels() -> None:
    difference = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], requires_grad=True)
    label = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [0.5, float("nan")]])
    loss = masked_head_loss(difference, label, ~label.isnan(), 0.0)
    assert math.isclose(loss.item(), math.log(2) + math.log1p(math.exp(-2.0)), rel_tol=1e-6)
    loss.backward()
    assert difference.grad is not None and difference.grad.isfinite().all()
    assert difference.grad[0, 1] == 0 and difference.grad[2, 1] == 0


def test_a_head_without_labels_adds_nothing() -> None:
    difference = torch.randn(4, 1, requires_grad=True)
    label = torch.full((4, 1), float("nan"))
    loss = masked_head_loss(difference, label, ~label.isnan(), 1.0)
    loss.backward()
    assert loss.item() == 0 and difference.grad is not None and not difference.grad.any()


def test_mixing_rows() -> None:
    mixed = mix_rows(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 1]), 0.75)
    assert mixed.flatten().tolist() == [1.75, 1.75, 3.5]
