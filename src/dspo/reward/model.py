"""The five-head reward model.

    s_h = MLP_h(z_h) + alpha_h * exp(logit_scale) * cos(image, text)

z_h is what head h pools from the fused tokens. The MLPs end in zeros and alpha starts at 1, so that an untrained model
scores `overall` and `alignment` as its CLIP does and the other heads 0. `aesthetics`, `fidelity` and `detail` see image
tokens before any text reached them and have no cosine term: their scores do not depend on the caption.
"""

import torch
from torch import Tensor, nn

from dspo.data.keys import keyed_seed
from dspo.params import RewardParams
from dspo.reward.backbone import Backbone, ImageTokens, TextTokens, load_backbone
from dspo.reward.fusion import Fusion, PooledFeatures
from dspo.reward.views import VIEWS

PROMPTED_HEADS = ("overall", "alignment")


class RewardModel(nn.Module):
    def __init__(self, backbone: Backbone, params: RewardParams) -> None:
        super().__init__()
        self.backbone = backbone
        self.views = VIEWS[: params.views]  # a score is the mean over these
        self.heads = tuple(params.heads)
        prompted = [head for head in self.heads if head in PROMPTED_HEADS]
        free = [head for head in self.heads if head not in PROMPTED_HEADS]
        self.places = [(prompted + free).index(head) for head in self.heads]
        widths = (backbone.image_width, backbone.text_width, backbone.embed_dim)
        self.fusion: Fusion | PooledFeatures
        if params.fusion:
            self.fusion = Fusion(
                *widths,
                params.fusion_dim,
                params.fusion_layers,
                len(prompted),
                len(free),
            )
        else:
            self.fusion = PooledFeatures(backbone.embed_dim, params.fusion_dim, len(prompted), len(free))
        self.mlps = nn.ModuleDict({head: _head(params.fusion_dim) for head in self.heads})
        self.alpha = nn.ParameterDict({head: nn.Parameter(torch.ones(())) for head in prompted})

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Scores [batch, n_heads] of pixels [batch, 3, size, size] for captions' token ids [batch, length]."""
        image = self.backbone.image_top(self.backbone.image_stem(pixels))
        text = self.backbone.text_top(self.backbone.text_stem(tokens), tokens.argmax(-1))
        return self.score(*self.features(image, text))

    def features(self, image: ImageTokens, text: TextTokens) -> tuple[Tensor, Tensor]:
        """What the heads read: z [batch, n_heads, dim] and CLIP's scaled cosine [batch]. MixUp mixes these."""
        z = torch.cat(self.fusion(image, text), dim=1)
        return z[:, self.places], self.backbone.cosine(image, text)

    def score(self, z: Tensor, cosine: Tensor) -> Tensor:
        """Scores [batch, n_heads] in float32 from features."""
        columns = []
        for i, head in enumerate(self.heads):
            column = self.mlps[head](z[:, i]).squeeze(-1).float()
            columns.append(column + self.alpha[head] * cosine if head in self.alpha else column)
        return torch.stack(columns, dim=1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name; all else is the backbone's own."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def build_model(params: RewardParams, seed: int, device: torch.device) -> RewardModel:
    """Load the backbone and initialise the rest from the seed. Raises :class:`UserError` (see ``load_backbone``)."""
    backbone = load_backbone(
        params.backbone,
        params.pretrained,
        params.image_size,
        params.unlocked_image_blocks,
        params.unlocked_text_blocks,
        device,
    )
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if device.type == "meta" else "cpu"),
    ):
        torch.default_generator.manual_seed(keyed_seed(seed, "reward-init"))
        model = RewardModel(backbone, params)
    if params.dtype == "bfloat16":
        backbone.multiply_tokens_at_once()
    backbone.recompute = device.type == "cuda"
    return model.to(device).eval()


def _head(dim: int) -> nn.Sequential:
    last = nn.Linear(dim, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), last)
