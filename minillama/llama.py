"""LLaMA (Touvron et al. 2023) on one page: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    ids ─▶ embed ─▶ ┌ x + attention(norm(x)) ─▶ x + mlp(norm(x)) ┐ × L ─▶ norm ─▶ head ─▶ logits
                    └────────────────────────────────────────────┘

Modules and configuration carry Hugging Face's names, so a checkpoint maps onto them as it is. Relatives run through the
same page, each by a line or two of the configuration, which a LLaMA leaves alone (checkpoints/architectures.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Attention, embed, positions_and_mask
from .rope import RoPE

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


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
    rope_scaling: object | None = None  # for longer texts: one of rope.SCALINGS
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    # what LLaMA does without
    model_type: str = "llama"  # whose config.json and tensor names `save` writes
    sliding_window: int | None = None  # tokens that a token sees (Mistral 7B, https://arxiv.org/abs/2310.06825)
    layer_types: tuple[str, ...] | None = None  # "sliding_attention" or "full_attention"; None: all that
    rope_local_base_freq: float | None = None  # theta of sliding layers (Gemma 3, https://arxiv.org/abs/2503.19786)
    no_rope_layers: tuple[int, ...] | None = None  # 0: a layer without RoPE (SmolLM3; https://arxiv.org/abs/2501.18795)
    attention_output_bias: bool | None = None  # None: as attention_bias (Qwen2, https://arxiv.org/abs/2407.10671)
    qk_norm: str | None = None  # "head" (Qwen3, https://arxiv.org/abs/2505.09388), or "all" heads together (OLMo-2)
    norms: str = "before"  # the sublayers; "behind" (OLMo-2, https://arxiv.org/abs/2501.00656), or "both" (Gemma 3)
    norm_offset: float = 0.0  # added to a norm's weight: 1 (Gemma)
    hidden_act: str = "silu"  # or "gelu_pytorch_tanh": GeGLU (Gemma)
    embedding_multiplier: float = 1.0  # of the embedding: √D (Gemma), or as Granite's three after it, which follow
    residual_multiplier: float = 1.0  # μP (Yang et al. 2022, https://arxiv.org/abs/2203.03466)
    attention_multiplier: float | None = None  # of q kᵀ; None: 1 / √d
    logits_scaling: float = 1.0  # divides the logits

    def __post_init__(self):
        H, G, D = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, self.hidden_size
        d, heads = self.head_dim or D // H, f"num_attention_heads is {H}"
        if H % G:
            raise ValueError(f"{heads} and num_key_value_heads is {G}; the second must divide the first")
        if self.head_dim is None and D % H:
            raise ValueError(f"hidden_size is {D} and {heads}; the second must divide the first, or head_dim be given")
        if d % 2:
            raise ValueError(f"head_dim is {d}; RoPE turns features in pairs and needs an even number")

    def kind(self, layer):
        """(RoPE, or None where a layer has none; how many tokens a token sees there, or None: all before it)."""
        slides = self.sliding_window and (self.layer_types is None or self.layer_types[layer] == "sliding_attention")
        d, local = self.head_dim or self.hidden_size // self.num_attention_heads, slides and self.rope_local_base_freq
        rope = RoPE(d, local) if local else RoPE(d, self.rope_theta, self.rope_scaling)
        has_rope = self.no_rope_layers is None or self.no_rope_layers[layer]
        return rope if has_rope else None, self.sliding_window if slides else None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · (weight + offset) (Zhang & Sennrich 2019), the mean taken in float32."""

    def __init__(self, width, eps, offset=0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.full((width,), 1 - offset)), eps, offset

    def forward(self, x):
        if self.offset:  # in float32, where a small weight is not lost beside the offset
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = self.weight.to(wide) + self.offset
            return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)), or with GELU for silu, GeGLU; (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F_, bias=bias)
        self.up_proj = nn.Linear(D, F_, bias=bias)
        self.down_proj = nn.Linear(F_, D, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Scale:
    """x · by; at 1 it is x itself. It holds nothing, and is no part of a model that one would list."""

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x if self.by == 1 else x * self.by


class Layer(nn.Module):
    """One transformer block, norms in front of the sublayers; (B, T, D) -> (B, T, D). rope, window: see `kind`."""

    def __init__(self, config, rope, window=None):
        super().__init__()
        c, D, H = config, config.hidden_size, config.num_attention_heads
        G, d = c.num_key_value_heads or H, c.head_dim or D // H
        norm = partial(RMSNorm, eps=c.rms_norm_eps, offset=c.norm_offset)
        self.rope, widths = rope, {"head": (d, d), "all": (H * d, G * d), None: ()}[c.qk_norm]  # of norms of q and k
        own = c.attention_bias, c.attention_output_bias, [norm(width) for width in widths], window
        self.input_layernorm = norm(D) if c.norms != "behind" else nn.Identity()
        self.self_attn = Attention(D, H, G, d, rope, *own, c.attention_multiplier)
        self.behind_attention = norm(D) if c.norms != "before" else Scale(c.residual_multiplier)
        self.post_attention_layernorm = norm(D) if c.norms != "behind" else nn.Identity()
        self.mlp = MLP(c)
        self.behind_mlp = norm(D) if c.norms != "before" else Scale(c.residual_multiplier)

    def forward(self, x, positions, mask=None, cache=None):
        x = x + self.behind_attention(self.self_attn(self.input_layernorm(x), positions, mask, cache))
        return x + self.behind_mlp(self.mlp(self.post_attention_layernorm(x)))


class LLaMA(nn.Module):
    """A decoder-only language model: `model(ids)` gives the logits of each next token.

    >>> LLaMA(LLaMAConfig(256, 64, 172, num_hidden_layers=2, num_attention_heads=4))(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 256])
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.rope = config, config.kind(0)[0]  # the first layer's, in LLaMA that of all
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, *config.kind(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_weights(self)

    def hidden(self, ids, attention_mask=None, cache=None):
        """The normed output of the last layer, (B, T, D): what the head reads. Arguments as in `forward`."""
        x, attention_mask = embed(self.embed_tokens, ids, attention_mask, cache)  # (B, T, D)
        if self.config.embedding_multiplier != 1:
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype)  # rounded, as Gemma was trained
        positions, mask = positions_and_mask(x, attention_mask, cache)
        rotations = {rope: rope and rope(positions) for rope in {layer.rope for layer in self.layers}}
        for index, layer in enumerate(self.layers):
            x = layer(x, rotations[layer.rope], mask, cache.layer(index) if cache is not None else None)
        x = self.norm(x[:, x.shape[1] - ids.shape[1] :])  # without a soft prompt's places, where there is one
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

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
