"""How the heads read an image and its caption: cross-attention of patch and text tokens, or pooled features alone."""

import torch
from torch import Tensor, nn

from dspo.reward.backbone import ImageTokens, TextTokens

HEAD_WIDTH = 32


class CrossAttention(nn.Module):
    """Multi-head attention of queries [batch, n, dim] to a context [batch, m, dim]."""

    def __init__(self, dim: int, zero_output: bool) -> None:
        super().__init__()
        self.n_heads = max(1, dim // HEAD_WIDTH)
        inner = self.n_heads * HEAD_WIDTH
        self.to_q = nn.Linear(dim, inner)
        self.to_kv = nn.Linear(dim, 2 * inner)
        self.to_out = nn.Linear(inner, dim)
        if zero_output:
            nn.init.zeros_(self.to_out.weight)
            nn.init.zeros_(self.to_out.bias)

    def forward(self, queries: Tensor, context: Tensor, visible: Tensor | None) -> Tensor:
        """``visible``: [batch, m] bool, the context's places that may be attended to; None: all."""
        q = self._split(self.to_q(queries))
        k, v = (self._split(part) for part in self.to_kv(context).chunk(2, dim=-1))
        mask = None if visible is None else visible[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return output

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.n_heads, HEAD_WIDTH).transpose(1, 2)


class FusionLayer(nn.Module):
    """Both sides read each other at once: X = T + CA(T -> V), Y = V + CA(V -> T), pre-norm, at first the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_image = nn.LayerNorm(dim)
        self.norm_text = nn.LayerNorm(dim)
        self.text_reads_image = CrossAttention(dim, zero_output=True)
        self.image_reads_text = CrossAttention(dim, zero_output=True)

    def forward(self, image: Tensor, text: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        v, t = self.norm_image(image), self.norm_text(text)
        return image + self.image_reads_text(v, t, visible), text + self.text_reads_image(t, v, None)


class QueryPool(nn.Module):
    """Learned queries, one per head, attend to tokens [batch, m, dim] -> [batch, n_queries, dim]."""

    def __init__(self, dim: int, n_queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_queries, dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, zero_output=False)

    def forward(self, tokens: Tensor, visible: Tensor | None, shift: Tensor | None) -> Tensor:
        """``shift``: [batch, dim] added to every query; None: the queries are the same for all rows."""
        queries = self.queries.expand(len(tokens), -1, -1)
        if shift is not None:
            queries = queries + shift[:, None]
        pooled: Tensor = self.attention(queries, self.norm(tokens), visible)
        return pooled


class Fusion(nn.Module):
    """Prompted heads pool the fused image and text tokens [Y; X]; prompt-free heads pool the image tokens alone."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        embed_dim: int,
        dim: int,
        layers: int,
        n_prompted: int,
        n_free: int,
    ) -> None:
        super().__init__()
        self.image_in = nn.Sequential(nn.Linear(image_width, dim), nn.LayerNorm(dim))
        self.text_in = nn.Sequential(nn.Linear(text_width, dim), nn.LayerNorm(dim))
        self.layers = nn.ModuleList(FusionLayer(dim) for _ in range(layers))
        self.query_from_text = nn.Linear(embed_dim, dim, bias=False)
        self.pool_prompted = QueryPool(dim, n_prompted)
        self.pool_free = QueryPool(dim, n_free) if n_free else None

    def forward(self, image: ImageTokens, text: TextTokens) -> tuple[Tensor, Tensor]:
        """-> (prompted [batch, n_prompted, dim], free [batch, n_free, dim])."""
        v, t = self.image_in(image.patches), self.text_in(text.tokens)
        free = self.pool_free(v, None, None) if self.pool_free is not None else v[:, :0]
        text_visible = torch.arange(t.shape[1], device=t.device) <= text.last[:, None]
        for layer in self.layers:
            v, t = layer(v, t, text_visible)
        visible = torch.cat([text_visible.new_ones(v.shape[:2]), text_visible], dim=1)
        shift = self.query_from_text(nn.functional.normalize(text.embedding, dim=-1))
        return self.pool_prompted(torch.cat([v, t], dim=1), visible, shift), free


class PooledFeatures(nn.Module):
    """The plain head's features: CLIP's pooled image and text embeddings and their product, no tokens."""

    def __init__(self, embed_dim: int, dim: int, n_prompted: int, n_free: int) -> None:
        super().__init__()
        self.n_prompted, self.n_free = n_prompted, n_free
        self.image = nn.Linear(embed_dim, dim)
        self.both = nn.Linear(3 * embed_dim, dim)

    def forward(self, image: ImageTokens, text: TextTokens) -> tuple[Tensor, Tensor]:
        """-> (prompted [batch, n_prompted, dim], free [batch, n_free, dim])."""
        # Embeddings of unit length have entries of about embed_dim ** -0.5; the linear layers want about 1.
        scale = image.embedding.shape[-1] ** 0.5
        v = nn.functional.normalize(image.embedding, dim=-1) * scale
        t = nn.functional.normalize(text.embedding, dim=-1) * scale
        prompted = self.both(torch.cat([v, t, v * t], dim=-1))
        free = self.image(v)
        return prompted[:, None].expand(-1, self.n_prompted, -1), free[:, None].expand(-1, self.n_free, -1)
