"""The head that ImageReward and the LAION aesthetics predictor share: five linear layers without activations."""

from collections.abc import Mapping

from torch import Tensor, nn


class LinearHead(nn.Module):
    """width -> 1024 -> 128 -> 64 -> 16 -> 1. The published names count the dropouts between them, which do nothing in
    evaluation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] -> [batch]."""
        scores: Tensor = self.layers(x).squeeze(-1)
        return scores


def load_head(state: Mapping[str, Tensor]) -> LinearHead:
    """The head from its published weights, ``layers.0.weight`` and so on."""
    head = LinearHead(state["layers.0.weight"].shape[1])
    head.load_state_dict(state)
    return head
