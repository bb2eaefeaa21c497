"""Losses on score differences, as pure functions of tensors."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(difference: Tensor, label: Tensor, gamma: float) -> Tensor:
    """|y - p|^gamma * BCE(y, p) with p = sigmoid(difference), elementwise.

    ``difference``: score of the first image minus score of the second; ``label`` y in [0, 1]: share of votes for the
    first. gamma = 0 is the Bradley-Terry likelihood. The weight is the quality focal loss's (Li et al. 2020,
    arXiv 2006.04388, eq. 3), whose minimum is at p = y for soft labels too; the plain focal loss's is not.
    """
    cross_entropy = -(label * logsigmoid(difference) + (1 - label) * logsigmoid(-difference))
    if gamma == 0:
        return cross_entropy
    return (label - difference.sigmoid()).abs() ** gamma * cross_entropy


def masked_head_loss(difference: Tensor, label: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum over heads of the mean loss over the rows that have this head's label.

    ``difference``, ``label``: [batch, n_heads]; ``mask``: [batch, n_heads] bool. Labels that are masked may be NaN.
    A head without any label in the batch adds 0.
    """
    filled = torch.where(mask, label, torch.full_like(label, 0.5))
    loss = torch.where(
        mask,
        bradley_terry_loss(difference, filled, gamma),
        torch.zeros_like(difference),
    )
    return (loss.sum(0) / mask.sum(0).clamp(min=1)).sum()


def mix_rows(values: Tensor, partner: Tensor, lam: float) -> Tensor:
    """MixUp (Zhang et al. 2018, arXiv 1710.09412): lam * row i + (1 - lam) * row partner[i]."""
    return lam * values + (1 - lam) * values[partner]
