"""LLaMA (Touvron et al. 2023) on one page: RMSNorm, RoPE, grouped-query attention, SwiGLU. Mistral runs through it.

    ids ─▶ embed ─▶ ┌ x + attention(norm(x)) ─▶ x + mlp(norm(x)) ┐ × L ─▶ norm ─▶ head ─▶ logits
                    └────────────────────────────────────────────┘

Modules and configuration carry Hugging Face's names, so a checkpoint maps onto them as it is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Attention, RoPE, embed, positions_and_mask


@dataclass(frozen=True)
class LLaMAConfig:
    """The shape of a LLaMA; names and defaults as in Hugging Face's config.json (the defaults are LLaMA-7B)."""

    vocab_size: int = 32000
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # G; None: as many as query heads
    head_dim: int | None = None  # d; None: D / H
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None  # `llama3`; see attention.RoPE
    sliding_window: int | None = None  # Mistral's; sequences up to this length are exact, longer ones refused
    attention_bias: bool = False
    attention_output_bias: bool | None = None  # None: as attention_bias
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        H, G, D = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, self.hidden_size
        if H % G:
            raise ValueError(
                f"num_attention_heads is {H} and num_key_value_heads is {G}; the second must divide the first"
            )
        if self.head_dim is None and D % H:
            raise ValueError(
                f"hidden_size is {D} and num_attention_heads is {H}; "
                "the second must divide the first, or head_dim be given"
            )
        if (self.head_dim or D // H) % 2:
            raise ValueError(
                f"head_dim is {self.head_dim or D // H}; RoPE turns features in pairs and needs an even number"
            )


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019), the mean taken in float32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)); (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F_, bias=bias)
        self.up_proj = nn.Linear(D, F_, bias=bias)
        self.down_proj = nn.Linear(F_, D, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer block, norms in front of the sublayers; (B, T, D) -> (B, T, D)."""

    def __init__(self, config, rope):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.self_attn = Attention(D, *heads, rope, config.attention_bias, config.attention_output_bias)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(config)

    def forward(self, x, positions, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """A decoder-only language model: `model(ids)` gives the logits of each next token.

    >>> LLaMA(LLaMAConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
    ...       num_attention_heads=4))(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 256])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.rope = RoPE(head_dim, config.rope_theta, config.rope_scaling)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, self.rope) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_weights(self)

    def hidden(self, ids, attention_mask=None, cache=None):
        """The normed output of the last layer, (B, T, D): what the head reads. Arguments as in `forward`."""
        x, attention_mask = embed(self.embed_tokens, ids, attention_mask, cache)  # (B, T, D)
        positions, mask = positions_and_mask(x, attention_mask, cache, (self.config.sliding_window, "sliding_window"))
        rotation = self.rope(positions)  # once for all layers
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, cache.layer(index) if cache is not None else None)
        return self.norm(x[:, x.shape[1] - ids.shape[1] :])  # without a soft prompt's places, where there is one

    def forward(self, ids, attention_mask=None, cache=None):
        """ids (B, T) int64 -> logits (B, T, V).

        attention_mask: (B, T), 0 where a row is padded (on the left, to generate); None: nothing is.
        cache: an `attention.Cache` that holds the tokens before these; the mask then spans both, (B, S),
        or is left out where only the first call's prompt was padded.
        """
        return self.lm_head(self.hidden(ids, attention_mask, cache))


def init_weights(model):
    """Embeddings from N(0, 1), matrices from N(0, 1/fan_in) (LeCun et al. 1998), biases 0: every activation starts with
    unit variance. A small base so begins with rich random features, where one that began near zero (normal(0, 0.02))
    has features that all bend to the task it was trained on."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():  # afterwards, so that a head tied to the embedding starts as the embedding
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
