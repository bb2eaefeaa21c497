"""Every loss against its formula, written by hand in numpy or plain autograd; gradients in double precision."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck

from dspo.params import LossName
from dspo.preference import losses
from dspo.preference.losses import NEEDS, Predictions, Strength, pair_losses, shared_terms
from dspo.preference.schedule import NoiseSchedule

B, SHAPE = 5, (4, 3, 2)
BETA, LAM, SCALE = 3.0, 0.7, 20.0
STRENGTH = Strength(BETA, LAM, SCALE)


def tensors(seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Targets and predictions near them, double precision; winner and loser have their own target (v-prediction)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, *SHAPE, generator=g, dtype=torch.float64)  # noqa: E731
    y_w, y_l = draw(), draw()
    near = {"e_w": y_w, "e_l": y_l, "r_w": y_w, "r_l": y_l}
    return {"y_w": y_w, "y_l": y_l, **{name: y + spread * draw() for name, y in near.items()}}


def omega() -> Tensor:
    return torch.linspace(0.2, 1.8, B, dtype=torch.float64)


def delta() -> Tensor:
    return torch.linspace(-0.1, 0.6, B, dtype=torch.float64)


def compute(loss: LossName, x: dict[str, Tensor], strength: Strength = STRENGTH) -> Tensor:
    p = Predictions(**x)
    weight = omega() if NEEDS[loss].omega else torch.ones(B, dtype=torch.float64)
    return pair_losses(loss, p, shared_terms(p, strength.beta, weight), delta(), strength)


def by_hand(loss: LossName, x: dict[str, Tensor]) -> np.ndarray:
    """The formulas of the research notes, pair by pair, with math and numpy."""
    a = {name: tensor.detach().numpy() for name, tensor in x.items()}
    values, distances = [], []
    for i in range(B):
        e_w, e_l, r_w, r_l, y_w, y_l = (a[name][i] for name in ("e_w", "e_l", "r_w", "r_l", "y_w", "y_l"))
        d = e_w.size
        L_w, L_l = ((e_w - y_w) ** 2).sum() / d, ((e_l - y_l) ** 2).sum() / d
        R_w, R_l = ((r_w - y_w) ** 2).sum() / d, ((r_l - y_l) ** 2).sum() / d
        weight = 0.2 + 1.6 * i / (B - 1) if not loss.startswith("dspo_official") else 1.0
        u = -BETA * weight / 2 * ((L_w - L_l) - (R_w - R_l))
        sigmoid = 1 / (1 + math.exp(-u))
        distances.append(((e_w - r_w) ** 2).sum() / d)

        def f(m: float) -> float:
            return 0.5 * m / (math.exp(0.5 * m) - 1)

        values.append(
            {
                "sft": L_w,
                "dpo": -math.log(sigmoid),
                "ipo": (u - 0.5) ** 2,
                "capo": (u - (-0.1 + 0.7 * i / (B - 1))) ** 2,
                "mapo": L_w - 0.1 * math.log(1 / (1 + math.exp(-SCALE * (f(L_w) - f(L_l))))),
                "dspo": ((e_w - y_w - LAM * (1 - sigmoid) * (e_w - r_w)) ** 2).sum() / d,
                "dspo_two_sided": weight
                * (
                    ((e_w - y_w - LAM * min(1, 2 - 2 * sigmoid) * (e_w - r_w)) ** 2).sum()
                    + ((2 * r_l - e_l - y_l - LAM * min(1, 2 - 2 * sigmoid) * (r_l - e_l)) ** 2).sum()
                )
                / (2 * d),
                "dspo_hinge": min(1, max(0, 1 - u))
                * weight
                * (
                    ((e_w - y_w - LAM * (e_w - r_w)) ** 2).sum()
                    + ((2 * r_l - e_l - y_l - LAM * (r_l - e_l)) ** 2).sum()
                )
                / (2 * d),
                "dspo_official_sd15": ((e_w - y_w - BETA * (1 - sigmoid) * (e_w - r_w)) ** 2).sum() / d,
                "dspo_official_sdxl": (1 - sigmoid) ** 2,
            }[loss]
        )
        if loss == "dspo_official_sdxl":
            values[-1] = (values[-1], values[-1] * distances[-1])
    if loss == "dspo_official_sdxl":
        return np.array([far if np.mean(distances) >= 0.1 else near for near, far in values])
    return np.array(values)


@pytest.mark.parametrize("spread", [0.1, 0.6])  # on both sides of the official SDXL switch
@pytest.mark.parametrize("loss", NEEDS)
def test_loss_is_its_formula(loss: LossName, spread: float) -> None:
    x = tensors(spread=spread)
    np.testing.assert_allclose(compute(loss, x).numpy(), by_hand(loss, x), rtol=1e-10)


DETACHED = ("dspo", "dspo_two_sided", "dspo_hinge")  # their gradients have tests of their own


@pytest.mark.parametrize("loss", [name for name in NEEDS if name not in DETACHED])
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_gradient_is_that_of_the_formula(loss: LossName, spread: float) -> None:
    x = tensors(spread=spread)

    def of(e_w: Tensor, e_l: Tensor) -> Tensor:
        return compute(loss, {**x, "e_w": e_w, "e_l": e_l})

    assert gradcheck(of, (x["e_w"].requires_grad_(), x["e_l"].requires_grad_()))


def test_dspo_gradient_is_two_over_d_times_the_distance_from_the_target() -> None:
    x = tensors()
    x["e_w"].requires_grad_()
    x["e_l"].requires_grad_()
    by_e_w, by_e_l = grad(compute("dspo", x).sum(), (x["e_w"], x["e_l"]), allow_unused=True)
    assert by_e_l is None
    u = shared_terms(Predictions(**x), BETA, omega()).u
    k = (LAM * (1 - torch.sigmoid(u))).view(-1, 1, 1, 1)
    expected = 2 / math.prod(SHAPE) * ((x["e_w"] - x["y_w"]) - k * (x["e_w"] - x["r_w"]))
    torch.testing.assert_close(by_e_w, expected.detach())


def test_hinge_gradient_is_that_of_two_sided_dspo_at_constant_k_times_how_steep_the_hinge_is() -> None:
    """By hand: omega / d times the slope of the smooth hinge, times the distances from the targets."""
    x = tensors()
    u = torch.tensor([-1.0, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)
    slope = torch.tensor([1.0, 1.0, 0.75, 0.0, 0.0], dtype=torch.float64)
    x["e_w"].requires_grad_()
    x["e_l"].requires_grad_()
    names = ("e_w", "e_l", "r_w", "r_l", "y_w", "y_l")
    weight = omega() * losses.hinge_steepness(u)
    loss = losses.dspo_two_sided(*(x[name] for name in names), torch.full_like(u, LAM), weight).sum()
    by_e_w, by_e_l = grad(loss, (x["e_w"], x["e_l"]))
    e_w, e_l, r_w, r_l, y_w, y_l = (x[name].detach() for name in names)
    share = (slope * omega() / math.prod(SHAPE)).view(-1, 1, 1, 1)
    torch.testing.assert_close(by_e_w, share * ((1 - LAM) * (e_w - r_w) + (r_w - y_w)))
    torch.testing.assert_close(by_e_l, share * ((1 - LAM) * (e_l - r_l) - (r_l - y_l)))


def test_two_sided_dspo_settles_between_where_winners_and_losers_point() -> None:
    """A noised latent that is as often a winner's as a loser's: descent ends at r + (y_w - y_l) / 2(1 - k)."""
    x = tensors()
    r, y_w, y_l = x["r_w"], x["y_w"], x["y_l"]
    e = r.clone().requires_grad_()
    one = torch.ones(B, dtype=torch.float64)
    for _ in range(400):
        (step,) = grad(losses.dspo_two_sided(e, e, r, r, y_w, y_l, LAM * one, one).sum(), e)
        e = (e - math.prod(SHAPE) * 0.3 * step).detach().requires_grad_()
    torch.testing.assert_close(e.detach(), r + (y_w - y_l) / (2 * (1 - LAM)))


def test_two_sided_pull_is_lam_until_the_winner_is_preferred() -> None:
    u = torch.tensor([-2.0, 0.0, 1.0])
    expected = LAM * torch.tensor([1.0, 1.0, 2 / (1 + math.e)])
    for k in (losses.two_sided_pull(u, LAM), losses.pull_of("dspo_two_sided", u, Strength(100.0, LAM, 1.0))):
        torch.testing.assert_close(k, expected)
    torch.testing.assert_close(losses.pull_of("dspo_hinge", u, Strength(100.0, LAM, 1.0)), torch.full((3,), LAM))
    assert losses.pull_of("dpo", u, Strength(100.0, LAM, 1.0)) is None


@pytest.mark.parametrize("beta", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9])
def test_dspo_at_the_reference_is_sft(beta: float, lam: float) -> None:
    x = tensors()
    x["r_w"], x["r_l"] = x["e_w"].clone(), x["e_l"].clone()
    x["e_w"].requires_grad_()
    (dspo,) = grad(compute("dspo", x, Strength(beta, lam, SCALE)).sum(), x["e_w"])
    (sft,) = grad(compute("sft", x).sum(), x["e_w"])
    torch.testing.assert_close(dspo, sft)


def test_untrained_policy_has_margin_0_and_dpo_loss_ln_2() -> None:
    x = tensors()
    x["r_w"], x["r_l"] = x["e_w"], x["e_l"]
    p = Predictions(**x)
    assert torch.equal(shared_terms(p, BETA, omega()).u, torch.zeros(B, dtype=torch.float64))
    assert torch.equal(compute("dpo", x), torch.full((B,), math.log(2), dtype=torch.float64))
    np.testing.assert_allclose(compute("dspo_official_sdxl", x), 0.25)
    np.testing.assert_allclose(compute("ipo", x), 0.25)


def test_official_sdxl_at_the_reference_is_collinear_with_dpo() -> None:
    """Half of DPO's gradient: d (1 - s)^2 = -2 (1 - s) s (1 - s) du at s = 1/2, against -(1 - s) du."""
    x = tensors()
    x["r_w"], x["r_l"] = x["e_w"].clone(), x["e_l"].clone()
    x["e_w"].requires_grad_()
    strength = Strength(BETA, LAM, SCALE)
    p = Predictions(**x)
    u = shared_terms(p, BETA, torch.ones(B, dtype=torch.float64)).u
    (official,) = grad(compute("dspo_official_sdxl", x, strength).sum(), x["e_w"], retain_graph=True)
    (dpo,) = grad(losses.dpo(u).sum(), x["e_w"])
    torch.testing.assert_close(official, dpo / 2)


def test_official_sd15_with_small_beta_is_sft() -> None:
    x = tensors()
    x["e_w"].requires_grad_()
    (official,) = grad(compute("dspo_official_sd15", x, Strength(0.001, LAM, SCALE)).sum(), x["e_w"])
    (sft,) = grad(compute("sft", x).sum(), x["e_w"])
    cosine = torch.nn.functional.cosine_similarity(official.flatten(), sft.flatten(), dim=0)
    assert cosine > 0.99999


def test_ipo_is_capo_with_a_gap_of_one_half() -> None:
    u = torch.linspace(-2, 2, B)
    assert torch.equal(losses.ipo(u), losses.capo(u, torch.full((B,), 0.5)))


def test_permuted_k_is_the_neighbours() -> None:
    x = tensors()
    u = shared_terms(Predictions(**x), BETA, omega()).u
    permuted = compute("dspo", x, Strength(BETA, LAM, SCALE, permute_k=True))
    expected = losses.dspo(x["e_w"], x["r_w"], x["y_w"], u.roll(1), LAM)
    torch.testing.assert_close(permuted, expected)
    assert not torch.allclose(permuted, compute("dspo", x))


def test_dspo_fixed_point() -> None:
    """e = r + (y - r) / (1 - k) is where the detached gradient vanishes, for u held at a constant."""
    x = tensors()
    u = torch.full((B,), 0.3, dtype=torch.float64)
    k = LAM * (1 - torch.sigmoid(u)).view(-1, 1, 1, 1)
    e = (x["r_w"] + (x["y_w"] - x["r_w"]) / (1 - k)).requires_grad_()
    (gradient,) = grad(losses.dspo(e, x["r_w"], x["y_w"], u, LAM).sum(), e)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", NEEDS)
def test_loss_needs_no_more_than_it_says(loss: LossName) -> None:
    x = tensors()
    needs = NEEDS[loss]
    if not needs.reference:
        del x["r_w"], x["r_l"]
    if needs.loser == "none":
        del x["e_l"]
    assert compute(loss, x).shape == (B,)


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule(torch.cumprod(1 - betas, 0).float(), prediction_type)


def test_omega_is_the_sigmoid_of_the_negative_log_snr_with_mean_1() -> None:
    a = schedule().alphas_cumprod.double()
    for bias in (0.0, 2.0):
        expected = 1 / (1 + math.exp(-bias) * a / (1 - a))
        torch.testing.assert_close(schedule().omega(bias).double(), expected / expected.mean(), rtol=1e-4, atol=1e-6)
    assert schedule().omega(0.0).mean().item() == pytest.approx(1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_and_the_noised_image_give_the_image_back(prediction_type: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(2))
    t = torch.tensor([0, 500, 999])
    s = schedule(prediction_type)
    noisy, y = s.add_noise(x, noise, t), s.target(x, noise, t)
    a = s.alphas_cumprod[t].view(-1, 1, 1, 1)
    back = (
        (noisy - (1 - a).sqrt() * y) / a.sqrt()
        if prediction_type == "epsilon"
        else a.sqrt() * noisy - (1 - a).sqrt() * y
    )
    torch.testing.assert_close(back, x, rtol=1e-4, atol=2e-5)
