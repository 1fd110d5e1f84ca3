"""Zero-init gated prefix attention, or prefix tuning, on a LLaMA of the transformers library.

    model = transformers.AutoModelForCausalLM.from_pretrained(...).requires_grad_(False)
    transformers_llama.attach(model, prompt_length=10)        # then train and generate as ever

transformers' attention computes queries, keys, values, their attention and the output in one `forward`. Here the same
steps, with the module's own projections, stand apart as the verbs that a wrapper composes (attention.py), and the
wrapper around them is called as transformers calls its attention:

    layer ─▶ Caller ─▶ AdaptedAttention ─▶ Verbs ─▶ transformers' q_proj, k_proj, v_proj, o_proj and attention function

With the gate at 0 the model returns what it returned, bit for bit. It fits attentions built as LLaMA's: Mistral's and
Qwen2's too. Caches, padding and `generate` are transformers' own.
"""

import torch
from torch import nn

from ..attention import rotate
from . import llama_adapter

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx")


class Verbs(nn.Module):
    """A transformers attention as project, keys_values, attend and output; shapes as in minillama.attention."""

    def __init__(self, attention, rotary):
        super().__init__()
        self.attention, self.head_dim, self.width = attention, attention.head_dim, attention.q_proj.in_features
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.rope = lambda positions: tuple(
            part[0] for part in rotary(positions.float(), positions[None])
        )  # (T, d) each

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def keys_values(self, x):
        return self.heads(self.attention.k_proj(x)), self.heads(self.attention.v_proj(x))

    def project(self, x, positions):
        q, (k, v) = self.heads(self.attention.q_proj(x)), self.keys_values(x)
        cos, sin = (part[:, None] for part in positions)  # (B, 1, T, d)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q, k, v, mask=None, cache=None):
        """mask (B, 1, T, S) booleans, or None for plain causal attention, as everywhere in minillama."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN
        from transformers.models.llama.modeling_llama import eager_attention_forward as eager

        if cache is not None:
            k, v = cache.append(k, v)
        T, S = q.shape[2], k.shape[2]
        if mask is None and 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
        inner, kind = self.attention, self.attention.config._attn_implementation
        if mask is not None and kind == "eager":  # which adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        attention = KNOWN.get_interface(kind, eager)
        return attention(inner, q, k, v, mask, scaling=inner.scaling, dropout=0.0)[0].transpose(1, 2)

    def output(self, y):
        return self.attention.o_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, positions=None, mask=None, cache=None):
        return self.output(self.attend(*self.project(x, positions), mask, cache))


class OneLayer:
    """One layer of transformers' cache, with the two verbs of minillama's LayerCache."""

    def __init__(self, cache, index):
        self.cache, self.index = cache, index
        self.kept = vars(cache).setdefault("kept_by_adapters", {})  # lives as long as that cache

    def append(self, k, v):
        return self.cache.update(k, v, self.index)

    def once(self, key, compute):
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


class Caller(nn.Module):
    """Takes transformers' call of an attention and hands it to what wraps the verbs."""

    def __init__(self, adapted, index):
        super().__init__()
        self.adapted, self.index = adapted, index

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **_):
        cache = None if past_key_values is None else OneLayer(past_key_values, self.index)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask >= 0  # what is hidden has the smallest number added to its score
        return self.adapted(hidden_states, position_embeddings, attention_mask, cache), None


def attach(model, method=llama_adapter, **options):
    """Puts `method` (the module llama_adapter or prefix_tuning) with its options on a LlamaForCausalLM or LlamaModel, a
    Mistral or a Qwen2. Freezes nothing. Raises ValueError for a model that is built otherwise."""
    model = getattr(model, "model", model)
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", [None])]
    lacking = [part for part in PARTS for attention in attentions if not hasattr(attention, part)]
    if lacking or hasattr(attentions[0], "q_norm") or not hasattr(model, "rotary_emb"):
        raise ValueError(
            f"{type(model).__name__} is not built as transformers' LLaMA, Mistral and Qwen2 are, whose layers have a "
            f"`self_attn` with {', '.join(PARTS)}"
        )
    kind = model.config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise ValueError(
            f"the attention is {kind!r}; needed is 'sdpa' or 'eager': model.set_attn_implementation('sdpa')"
        )
    for layer, attention in zip(model.layers, attentions):
        layer.self_attn = Verbs(attention, model.rotary_emb)
    try:
        method.attach(model, **options)
    except BaseException:
        for layer, attention in zip(model.layers, attentions):
            layer.self_attn = attention
        raise
    for layer, attention in zip(model.layers, attentions):
        layer.self_attn = Caller(layer.self_attn, attention.layer_idx)
