"""What a preference run should be watched by: errors against the reference, margin and its spread, over timesteps."""

import torch
from torch import Tensor

from dspo.preference.losses import Predictions, Terms, error

Columns = dict[str, Tensor]  # [N] float32 each
Row = dict[str, float | None]

QUARTILES = ("q1", "q2", "q3", "q4")  # of the timesteps; q1 has the least noise
WATCHED = ("winner_gap", "loser_gap", "u")


@torch.no_grad()
def pair_columns(losses: Tensor, p: Predictions, terms: Terms, t: Tensor, k: Tensor | None) -> Columns:
    """One value per pair of everything that can be told from the predictions at hand.

    ``winner_gap`` = L_w - R_w, ``loser_gap`` = L_l - R_l, ``u``; ``pull`` = k ||e_w - r_w|| / ||e_w - y||, ``k`` [N]
    being DSPO's: below 0.1 the winner's term is SFT's.
    """
    columns = {"loss": losses, "timestep": t.float()}
    if terms.R_w is not None:
        columns["winner_gap"] = terms.L_w - terms.R_w
    if terms.L_l is not None and terms.R_l is not None:
        columns["loser_gap"] = terms.L_l - terms.R_l
    if terms.u is not None:
        columns["u"] = terms.u
    if k is not None and p.r_w is not None:
        columns["pull"] = k * (error(p.e_w, p.r_w) / error(p.e_w, p.y_w)).sqrt()
    return {name: column.detach() for name, column in columns.items()}


def joined(parts: list[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(columns: Columns, n_timesteps: int) -> Row:
    """Means, spread of u, and both per quartile of the timesteps; None where nothing was measured.

    ``margin`` = mean of loser_gap - winner_gap; ``implicit_accuracy`` = share of pairs where that is above 0, half for
    0 itself.
    """
    table = {name: column.cpu() for name, column in columns.items()}
    row: Row = {name: _mean(table.get(name)) for name in ("winner_gap", "loser_gap", "pull")}
    row["margin"] = row["implicit_accuracy"] = None
    if "winner_gap" in table and "loser_gap" in table:
        margin = table["loser_gap"] - table["winner_gap"]
        row["margin"] = _mean(margin)
        row["implicit_accuracy"] = _mean((margin.sign() + 1) / 2)
    row["u_mean"], row["u_std"] = _mean(table.get("u")), _std(table.get("u"))
    quartile = (table["timestep"] * 4 / n_timesteps).long()
    for index, name in enumerate(QUARTILES):
        inside = quartile == index
        part = {column: table[column][inside] for column in WATCHED if column in table}
        row[f"winner_gap_{name}"] = _mean(part.get("winner_gap"))
        row[f"loser_gap_{name}"] = _mean(part.get("loser_gap"))
        row[f"u_mean_{name}"], row[f"u_std_{name}"] = _mean(part.get("u")), _std(part.get("u"))
    return row


def _mean(values: Tensor | None) -> float | None:
    return None if values is None or not len(values) else values.double().mean().item()


def _std(values: Tensor | None) -> float | None:
    return None if values is None or len(values) < 2 else values.double().std().item()
