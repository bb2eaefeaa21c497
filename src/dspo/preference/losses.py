"""Preference losses of a diffusion model: pure functions of tensors, one value per pair.

Notation: e and r are the policy's and the reference's prediction, y the target (epsilon or v), each [B, C, H, W]; _w
and _l mark the winner and the loser, which share noise and timestep. L and R [B] are the mean squared errors of e and r
over C, H, W. All of it is float32. The implicit reward margin is

    u = -(beta * omega(t) / 2) * ((L_w - L_l) - (R_w - R_l))

DSPO: Zhu, Xiao, Honavar, ICLR 2025. Diffusion-DPO: Wallace et al., CVPR 2024. IPO: Azar et al., AISTATS 2024. CaPO: Lee
et al., CVPR 2025. MaPO: Hong et al., 2024.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dspo.params import LossName

MAPO_SIGMOID_SLOPE = 0.5  # s
MAPO_MARGIN_SHARE = 0.1  # b
OFFICIAL_SDXL_SWITCH = 0.1


@dataclass(frozen=True)
class Needs:
    """What a loss reads. Nothing else is computed for it."""

    loser: Literal["gradient", "value", "none"]  # the policy's prediction for the loser: with gradient, without, not
    reference: bool
    omega: bool  # False: omega(t) is 1


NEEDS: dict[LossName, Needs] = {
    "dspo": Needs(loser="value", reference=True, omega=True),
    "dspo_two_sided": Needs(loser="gradient", reference=True, omega=True),
    "dspo_hinge": Needs(loser="gradient", reference=True, omega=True),
    "dspo_official_sd15": Needs(loser="gradient", reference=True, omega=False),
    "dspo_official_sdxl": Needs(loser="gradient", reference=True, omega=False),
    "dpo": Needs(loser="gradient", reference=True, omega=True),
    "ipo": Needs(loser="gradient", reference=True, omega=True),
    "capo": Needs(loser="gradient", reference=True, omega=True),
    "mapo": Needs(loser="gradient", reference=False, omega=False),
    "sft": Needs(loser="none", reference=False, omega=False),
}
EVERYTHING = Needs(loser="gradient", reference=True, omega=True)


@dataclass(frozen=True)
class Predictions:
    """Outputs of the UNet for B pairs, [B, C, H, W] each; None where the loss does not need it."""

    e_w: Tensor
    y_w: Tensor
    e_l: Tensor | None = None
    y_l: Tensor | None = None
    r_w: Tensor | None = None
    r_l: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """What losses and diagnostics share, [B] each; None where the predictions for it are missing."""

    L_w: Tensor
    L_l: Tensor | None
    R_w: Tensor | None
    R_l: Tensor | None
    u: Tensor | None
    omega: Tensor  # omega(t) of each pair's timestep


@dataclass(frozen=True)
class Strength:
    """The scalars of the losses; :class:`dspo.params.TrainParams` says what they mean."""

    beta: float
    lam: float
    mapo_scale: float
    permute_k: bool = False  # control: every winner gets another pair's k


def pair_losses(loss: LossName, p: Predictions, terms: Terms, delta: Tensor, strength: Strength) -> Tensor:
    """The named loss of every pair, [B].

    ``delta`` [B]: difference of the calibrated rewards of winner and loser, read by ``capo`` alone. ``p`` and ``terms``
    must hold what ``NEEDS[loss]`` says.
    """
    if loss == "sft":
        return terms.L_w
    assert terms.L_l is not None
    if loss == "mapo":
        return mapo(terms.L_w, terms.L_l, strength.mapo_scale)
    assert p.r_w is not None
    assert terms.u is not None
    match loss:
        case "dspo":
            return dspo(p.e_w, p.r_w, p.y_w, terms.u, strength.lam, strength.permute_k)
        case "dspo_two_sided" | "dspo_hinge":
            assert p.e_l is not None and p.r_l is not None and p.y_l is not None
            k = pull_of(loss, terms.u, strength)
            assert k is not None
            weight = terms.omega * hinge_steepness(terms.u) if loss == "dspo_hinge" else terms.omega
            return dspo_two_sided(p.e_w, p.e_l, p.r_w, p.r_l, p.y_w, p.y_l, k, weight)
        case "dspo_official_sd15":
            return dspo_official_sd15(p.e_w, p.r_w, p.y_w, terms.u, strength.beta)
        case "dspo_official_sdxl":
            return dspo_official_sdxl(p.e_w, p.r_w, terms.u)
        case "dpo":
            return dpo(terms.u)
        case "ipo":
            return ipo(terms.u)
        case "capo":
            return capo(terms.u, delta)


def shared_terms(p: Predictions, beta: float, omega: Tensor) -> Terms:
    """Errors and margin; ``omega`` [B] is the weight of each pair's timestep."""
    L_w = error(p.e_w, p.y_w)
    L_l = None if p.e_l is None or p.y_l is None else error(p.e_l, p.y_l)
    R_w = None if p.r_w is None else error(p.r_w, p.y_w)
    R_l = None if p.r_l is None or p.y_l is None else error(p.r_l, p.y_l)
    if L_l is None or R_w is None or R_l is None:
        return Terms(L_w, L_l, R_w, R_l, u=None, omega=omega)
    return Terms(L_w, L_l, R_w, R_l, margin(L_w, L_l, R_w, R_l, beta, omega), omega)


def error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all dimensions but the first."""
    return (prediction - target).square().flatten(1).mean(1)


def margin(L_w: Tensor, L_l: Tensor, R_w: Tensor, R_l: Tensor, beta: float, omega: Tensor) -> Tensor:
    """u [B]: positive where the policy, against the reference, favours the winner."""
    return -0.5 * beta * omega * ((L_w - L_l) - (R_w - R_l))


def pull(u: Tensor, strength: float) -> Tensor:
    """k = strength * (1 - sigmoid(u)), [B]: how far beyond the target DSPO pulls the policy from the reference."""
    return strength * torch.sigmoid(-u)


def two_sided_pull(u: Tensor, lam: float) -> Tensor:
    """k = lam * min(1, 2 (1 - sigmoid(u))), [B]: lam until the policy prefers the winner, then less."""
    return (2 * pull(u, lam)).clamp(max=lam)


def hinge_steepness(u: Tensor) -> Tensor:
    """min(1, max(0, 1 - u)), [B], without a gradient: minus the slope of the smooth hinge (Rennie and Srebro, 2005).

    A pair at a timestep where the policy prefers the winner by u = 1 has 0, one where it does not prefer it yet has 1.
    """
    return (1 - u).clamp(0, 1).detach()


def pull_of(loss: LossName, u: Tensor, strength: Strength) -> Tensor | None:
    """The k of the loss, [B]; None for a loss that has none."""
    match loss:
        case "dspo":
            return pull(u, strength.lam)
        case "dspo_two_sided":
            return two_sided_pull(u, strength.lam)
        case "dspo_hinge":
            return torch.full_like(u, strength.lam)
        case "dspo_official_sd15":
            return pull(u, strength.beta)
    return None


def dspo(e_w: Tensor, r_w: Tensor, y_w: Tensor, u: Tensor, lam: float, permute_k: bool = False) -> Tensor:
    """Two-parameter DSPO: || e_w - sg(y + k (e_w - r_w)) ||^2 / D, k = lam (1 - sigmoid(u)), D = C H W.

    sg stops the gradient, so the loser enters through the scalar k alone. At e = r its gradient is SFT's. Its fixed
    point is r + (y - r) / (1 - k): lam must stay below 1. ``permute_k`` gives each pair its neighbour's k.
    """
    k = pull(u, lam)
    if permute_k:
        k = k.roll(1)
    target = (y_w + _per_pair(k) * (e_w - r_w)).detach()
    return error(e_w, target)


def dspo_two_sided(
    e_w: Tensor, e_l: Tensor, r_w: Tensor, r_l: Tensor, y_w: Tensor, y_l: Tensor, k: Tensor, weight: Tensor
) -> Tensor:
    """DSPO with a gradient from the loser, ours: weight / 2 times

        || e_w - sg(y_w + k (e_w - r_w)) ||^2 / D + || e'_l - sg(y_l + k (e'_l - r_l)) ||^2 / D,  e' = 2r - e

    The mirrored policy e' lies on the other side of the reference: to teach it the losers is to push the policy away
    from them. Both terms are quadratic, so with constant k and weight there is a fixed point, as DPO has none: where
    x_t may be a winner's or a loser's alike it is e = r + (E_w[y] - E_l[y]) / 2(1 - k). What winners and losers have
    in common cancels, and k says how far beyond their difference the policy goes. With constant k it is DiffusionNFT's
    loss (Zheng et al., 2025) on fixed pairs.

    `dspo_two_sided` has k = :func:`two_sided_pull` and the weight omega(t): errors in the noise are largest where
    little noise is left, and without it those steps would rule, which decide texture and not what is where.
    `dspo_hinge` has k = lam and the weight omega(t) :func:`hinge_steepness`: what is learnt pushes no more. k and the
    weight are [B].
    """
    mirrored = 2 * r_l - e_l
    winner = error(e_w, (y_w + _per_pair(k) * (e_w - r_w)).detach())
    loser = error(mirrored, (y_l + _per_pair(k) * (mirrored - r_l)).detach())
    return weight * (winner + loser) / 2


def dspo_official_sd15(e_w: Tensor, r_w: Tensor, y_w: Tensor, u: Tensor, beta: float) -> Tensor:
    """The authors' code for SD1.5: || (e_w - y) - beta (1 - sigmoid(u)) (e_w - r_w) ||^2 / D, nothing detached."""
    return error(e_w, y_w + _per_pair(pull(u, beta)) * (e_w - r_w))


def dspo_official_sdxl(e_w: Tensor, r_w: Tensor, u: Tensor) -> Tensor:
    """The authors' code for SDXL; it never reads the target outside u.

    (1 - sigmoid(u))^2, but || (1 - sigmoid(u)) (e_w - r_w) ||^2 / D for a whole micro-batch in which the mean of
    (e_w - r_w)^2 has reached 0.1.
    """
    step = (e_w - r_w).square().flatten(1).mean(1)
    weight = torch.sigmoid(-u).square()
    return torch.where(step.mean() >= OFFICIAL_SDXL_SWITCH, weight * step, weight)


def dpo(u: Tensor) -> Tensor:
    """-log sigmoid(u); ln 2 where the policy is the reference."""
    return -logsigmoid(u)


def ipo(u: Tensor) -> Tensor:
    """(u - 1/2)^2"""
    return (u - 0.5).square()


def capo(u: Tensor, delta: Tensor) -> Tensor:
    """(u - delta)^2, delta the difference of calibrated rewards."""
    return (u - delta).square()


def mapo(L_w: Tensor, L_l: Tensor, scale: float) -> Tensor:
    """L_w - b log sigmoid(T (f(L_w) - f(L_l))), f(x) = s x / (exp(s x) - 1), s = 0.5, b = 0.1; without a reference."""
    return L_w - MAPO_MARGIN_SHARE * logsigmoid(scale * (_likelihood(L_w) - _likelihood(L_l)))


def _likelihood(L: Tensor) -> Tensor:
    scaled = MAPO_SIGMOID_SLOPE * L
    return scaled / torch.expm1(scaled)


def _per_pair(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return values.view(-1, 1, 1, 1)
