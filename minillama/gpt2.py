"""GPT-2 (Radford et al. 2019) on one page: LayerNorm, learned positions, biases, GELU, the head tied to the embedding.

The modules carry LLaMA's names, so that every adapter attaches to either model; the attention is the same class,
without RoPE. Checkpoints, whose query, key and value matrices are fused, are split on loading
(checkpoints/architectures.py).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from .attention import Attention, embed, positions_and_mask
from .llama import init_weights


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; LLaMA's names, defaults of the smallest released model."""

    vocab_size: int = 50257
    hidden_size: int = 768  # D
    intermediate_size: int | None = None  # None: 4 D
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 12  # H
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads is {self.num_attention_heads}; "
                "the second must divide the first"
            )


class MLP(nn.Module):
    """down(gelu(up(x))), GELU in its tanh form ("gelu_new"); (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.up_proj, self.down_proj = nn.Linear(D, F_), nn.Linear(F_, D)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Layer(nn.Module):
    """One transformer block, norms in front of the sublayers; (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.input_layernorm = nn.LayerNorm(D, eps)
        self.self_attn = Attention(D, config.num_attention_heads, bias=True)
        self.post_attention_layernorm = nn.LayerNorm(D, eps)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT2(nn.Module):
    """A decoder-only language model: `model(ids)` gives the logits of each next token; calls are LLaMA's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        init_weights(self)

    def hidden(self, ids, attention_mask=None, cache=None):
        """The normed output of the last layer, (B, T, D): what the head reads. Arguments as in `forward`."""
        x, attention_mask = embed(self.embed_tokens, ids, attention_mask, cache)  # (B, T, D)
        limit = (self.config.max_position_embeddings, "max_position_embeddings")
        positions, mask = positions_and_mask(x, attention_mask, cache, limit)
        x = x + self.embed_positions(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, None, mask, cache.layer(index) if cache is not None else None)
        return self.norm(x[:, x.shape[1] - ids.shape[1] :])  # without a soft prompt's places, where there is one

    def forward(self, ids, attention_mask=None, cache=None):
        """ids (B, T) int64 -> logits (B, T, V); attention_mask and cache as in `LLaMA.forward`."""
        return self.lm_head(self.hidden(ids, attention_mask, cache))
