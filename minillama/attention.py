"""The one attention class of both models, and its key/value cache; its rotary positions are in rope.py.

    x ──▶ project ──▶ q, k, v ──▶ attend ──▶ y ──▶ output ──▶ out

`forward` is nothing but the composition of the three verbs, so an adapter that wraps the module can
step between them (adapters/llama_adapter.py adds its term to `y`) without computing anything twice.

Shapes: B batch, T new tokens, S all tokens so far (S = T without a cache), D model width,
H query heads, G key/value heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rope import RoPE as RoPE
from .rope import rotate


class LayerCache:
    """One layer's keys and values in a Cache, and whatever an adapter needs only once per generation."""

    def __init__(self, cache=None):
        self.cache, self.kept = cache, {}
        self.k = self.v = None  # (B, G, S, d)

    def append(self, k, v):
        """Adds k, v (B, G, T, d) behind those seen before and returns all of them, (B, G, S, d) each."""
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v

    def once(self, key, compute):
        """What `compute()` returned the first time it was asked for under `key`: it lives as long as this cache."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


class Cache:
    """The memory of one generation: pass the same fresh `Cache()` to every call of `model(ids, cache=cache)`.

    Between calls the weights must not change: what was computed from them is kept.
    """

    of_a_layer = LayerCache

    def __init__(self):
        self.layers, self.length = [], 0  # S, the number of tokens seen so far
        self.attention_mask = None  # (B, S), remembered so that later calls need not repeat it
        self.positions = self.mask = None  # decode.py's

    def layer(self, index):
        while len(self.layers) <= index:
            self.layers.append(self.of_a_layer(self))
        return self.layers[index]


def embed(embedding, ids, attention_mask=None, cache=None):
    """What enters the first layer: x (B, T, D) of ids (B, T), and the attention mask that goes with it.

    An embedding with a `soft_prompt` (adapters/prompt_tuning.py) has its K vectors put before the first tokens, once
    for each cache: then x is (B, K + T, D), and the mask has K more columns.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)}; needed are integers of shape (batch, tokens)"
        )
    x, prompt = embedding(ids), getattr(embedding, "soft_prompt", None)
    if prompt is None:
        return x, attention_mask
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (len(prompt), 0), value=1)
    if cache is None or cache.length == 0:
        x = torch.cat((prompt.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
    return x, attention_mask


def positions_and_mask(x, attention_mask=None, cache=None, limit=(None, "")):
    """Where each new token stands and what it may see; both models go on with this.

    x (B, T, D); attention_mask (B, S) with 0 where a row is padded, or None when nothing is. Where several texts stand
    in one row it numbers them, 1 1 1 2 2 3 3 3 0: none sees another.
    Returns positions, (T,) or with padding (B, T), counted from each text's first token, and the mask: None for plain
    causal attention, else (B, 1, T, S) booleans, True where a token may look.
    limit: how many tokens the model can take (None: any) and the name of that number in its configuration.
    Raises ValueError for a wrong shape, and for more tokens than the limit.
    """
    (B, T), past = x.shape[:2], cache.length if cache is not None else 0
    S = past + T
    if limit[0] is not None and S > limit[0]:
        raise ValueError(
            f"the sequence has {S} tokens and the model takes {limit[0]} ({limit[1]}): shorten it, or generate fewer"
        )
    if cache is not None and cache.mask is not None:
        return cache.positions, cache.mask
    if attention_mask is None and cache is not None and cache.attention_mask is not None:
        attention_mask = F.pad(cache.attention_mask, (0, T), value=1)  # what follows a padded prompt is real
    if attention_mask is not None and attention_mask.shape != (B, S):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            f"{B} rows of {past} cached and {T} new tokens need ({B}, {S})"
        )
    if cache is not None:
        cache.length, cache.attention_mask = S, attention_mask
    if attention_mask is None:
        return torch.arange(past, S, device=x.device), None
    real, text = attention_mask.bool(), attention_mask.long().cummax(1).values  # padding goes with what is before it
    row, column = torch.arange(past, S, device=x.device)[:, None], torch.arange(S, device=x.device)
    mask = (column <= row) & (real[:, None] & (text[:, past:, None] == text[:, None]))[:, None]
    mask = mask | (column == row)  # padding sees itself, so that no row of the softmax is empty
    return mask.sum(-1)[:, 0] - 1, mask  # a token's position is the number of those it sees before it


class Attention(nn.Module):
    """Causal multi-head attention with grouped queries (Ainslie et al. 2023), optional RoPE and optional biases.

    width D; num_heads H; num_kv_heads G divides H (default H); head_dim d (default D / H).
    bias: of q_proj, k_proj and v_proj.  output_bias: of o_proj (default: as bias).
    norms: of queries and keys, None or two modules with weights of d features (each head by itself: Qwen3) or of all
    heads' together (OLMo-2).  window: how many tokens one sees, itself included (Mistral); None: all before it.
    score_scale: what q kᵀ is multiplied by (Granite, Gemma); None: 1 / √d.
    """

    def __init__(
        self, width, num_heads, num_kv_heads=None, head_dim=None, rope=None, bias=False, output_bias=None,
        norms=None, window=None, score_scale=None,
    ):  # fmt: skip
        super().__init__()
        self.width, self.num_heads, self.rope, self.window = width, num_heads, rope, window
        self.num_kv_heads, self.head_dim = num_kv_heads or num_heads, head_dim or width // num_heads
        # queries carry it, so that whatever attends to anything else by them divides by √d and is right
        self.query_scale = 1.0 if score_scale is None else score_scale * self.head_dim**0.5
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(
            self.num_heads * self.head_dim, width, bias=bias if output_bias is None else output_bias
        )
        self.q_norm, self.k_norm = norms or (None, None)

    def heads(self, x, norm=None):
        """Cuts features into heads: (..., T, heads·d) -> (..., heads, T, d), normed where there is a norm."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, *norm.weight.shape))).flatten(-2)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def keys_values(self, x):
        """Unrotated keys and values of any vectors of the model's width: (..., T, D) -> (..., G, T, d) each."""
        return self.heads(self.k_proj(x), self.k_norm), self.heads(self.v_proj(x))

    def project(self, x, positions=None):
        """x (B, T, D) -> q (B, H, T, d), k and v (B, G, T, d), with q and k rotated where the model has RoPE.

        positions: (T,) or (B, T) integers, or the pair `rope(positions)`, which the model computes once for
        all layers; None leaves q and k unrotated.
        """
        q, (k, v) = self.heads(self.q_proj(x), self.q_norm), self.keys_values(x)
        if self.rope is not None and positions is not None:
            cos, sin = positions if isinstance(positions, tuple) else self.rope(positions)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q if self.query_scale == 1 else q * self.query_scale, k, v

    def attend(self, q, k, v, mask=None, cache=None):
        """softmax(q kᵀ / √d) v over the cached and the new tokens: (B, H, T, d).

        mask: None for plain causal attention, else booleans (B, 1, T, S).  cache: this layer's LayerCache.
        """
        if cache is not None:
            k, v = cache.append(k, v)
        T, S = q.shape[2], k.shape[2]
        windowed = self.window is not None and S > self.window
        if mask is None and (1 < T < S or windowed):  # several new tokens behind cached ones
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if windowed:  # of all that a token may see, the last so many: padding between does not count
            mask = mask & (mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= self.window)
        dtype = q.dtype
        if q.device.type == "cpu" and dtype == torch.bfloat16 and T > 1:
            # torch 2.13's bfloat16 kernel for CPUs takes 5 to 8 times as long backward
            q, k, v = q.float(), k.float(), v.float()
        grouped = self.num_kv_heads != self.num_heads
        causal = mask is None and bool(T > 1)  # a tensor in torch.jit.trace
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return y.to(dtype)

    def output(self, y):
        """Joins the heads and projects: (B, H, T, d) -> (B, T, D)."""
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, positions=None, mask=None, cache=None):
        """x (B, T, D) -> (B, T, D)."""
        return self.output(self.attend(*self.project(x, positions), mask, cache))
