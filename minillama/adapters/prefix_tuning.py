"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190): learned keys and values before the tokens' own.

Every layer gets K keys and K values of its own, which are parameters; the tokens attend to them and to each other in
one softmax (equation 3 and section 4.2; without the reparameterisation this is also P-tuning v2):

    x ─▶ project ─▶ q, k, v ─▶ softmax(q [k_prefix; k]ᵀ / √d) [v_prefix; v] ─▶ o_proj ─▶
                                    ▲                          ▲
                                 trained                    trained

It is not the identity at the start, whatever the numbers: a prefix of zeros still takes its share of the softmax from
the tokens (with K = 10 zero keys before 10 tokens of score 0, half of it). That is what the gate of LLaMA-Adapter
mends.

The tokens stand at positions K, K + 1, …, as if the prefix were text before them, and the prefix is used as it is. Here
the tokens keep the positions that the model gave them; with RoPE the prefix's keys are turned back by K positions
instead, which leaves every score the same, and a GPT-2 reads its position embeddings K places on.

reparameterize: a hidden width; the keys and values then come out of a small MLP over learned embeddings (section 4.3),
here one for each layer, which steadies training; None: they are the parameters themselves.

Trained parameters: L · 2 · K · G · d.
"""

import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATES = (0.1, 0.1)  # on the bundled bases, and on a real model
PEFT_TYPE = "PREFIX_TUNING"


class PrefixAttention(nn.Module):
    """Wraps an attention with the verbs project, keys_values, attend and output; `attend` sees the prefix as well.

    Parameters: keys and values, (G, K, d) each, drawn from N(0, 1) as in PEFT; or, reparameterized, `embedding` (K,
    G·d) and the two layers of `mlp`. float32 whatever the base's dtype. With `active` False it is its base, bit for
    bit.
    """

    def __init__(self, base, prefix_length=10, reparameterize=None):
        super().__init__()
        if reparameterize is not None and reparameterize < 1:
            raise ValueError(f"reparameterize is {reparameterize}; needed is a hidden width of 1 or more, or None")
        if not isinstance(prefix_length, int) or prefix_length < 1:
            raise ValueError(f"prefix_length is {prefix_length!r}; needed is a whole number from 1 on")
        if getattr(base, "join", "before") != "before":
            raise ValueError(
                f"the attention has an adapter with join {base.join!r} already, which no other can wrap: "
                "attach that one last"
            )
        device = next(base.parameters()).device
        self.base, self.active, self.length, self.rope = base, True, prefix_length, base.rope
        self.width, self.num_heads = base.width, base.num_heads
        self.num_kv_heads, self.head_dim = base.num_kv_heads, base.head_dim
        shape = (self.num_kv_heads, prefix_length, self.head_dim)
        self.reparameterized = reparameterize is not None
        if self.reparameterized:
            width = self.num_kv_heads * self.head_dim
            self.embedding = nn.Parameter(torch.randn(prefix_length, width, device=device))
            mlp = (nn.Linear(width, reparameterize), nn.Tanh(), nn.Linear(reparameterize, 2 * width))
            self.mlp = nn.Sequential(*mlp).to(device)
        else:
            self.keys, self.values = (nn.Parameter(torch.randn(shape, device=device)) for _ in range(2))
        self.own = ("embedding", "mlp") if self.reparameterized else ("keys", "values")

    def prefix(self, dtype):
        """The prefix's keys, turned to the place before the tokens, and its values: (G, K, d) each."""
        if self.reparameterized:
            k, v = self.mlp(self.embedding).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).permute(1, 2, 0, 3)
        else:
            k, v = self.keys, self.values
        if self.rope is not None:
            cos, sin = self.rope(torch.full((self.length,), -self.length, device=k.device))
            left, right = k.chunk(2, dim=-1)
            k = k * cos + torch.cat((-right, left), dim=-1) * sin
            k = k / getattr(self.rope, "attention_factor", 1.0)  # of YaRN: the tokens' alone are multiplied by it
        return k.to(dtype), v.to(dtype)

    def project(self, x, positions=None):
        return self.base.project(x, positions)

    def keys_values(self, x):
        return self.base.keys_values(x)

    def attend(self, q, k, v, mask=None, cache=None):
        """The base's `attend` with the prefix before the tokens: (B, H, T, d). The cache holds the tokens alone."""
        if not self.active:
            return self.base.attend(q, k, v, mask, cache)
        pk, pv = self.prefix(q.dtype) if cache is None else cache.once(self, lambda: self.prefix(q.dtype))
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is not None:
            mask = F.pad(mask, (self.length, 0), value=True)  # every token sees the whole prefix
        k, v = (torch.cat((prefix.expand(len(q), -1, -1, -1), own), dim=2) for prefix, own in ((pk, k), (pv, v)))
        return self.base.attend(q, k, v, mask)

    def output(self, y):
        return self.base.output(y)

    def forward(self, x, positions=None, mask=None, cache=None):
        """x (B, T, D) -> (B, T, D)."""
        return self.output(self.attend(*self.project(x, positions), mask, cache))


class ShiftedPositions(nn.Module):
    """Wraps a learned position embedding and looks `shift` places on, for the tokens behind a prefix."""

    own = ()

    def __init__(self, base, shift):
        super().__init__()
        self.base, self.shift, self.active = base, shift, True
        self.num_embeddings = base.num_embeddings

    def forward(self, positions):
        if not self.active:
            return self.base(positions)
        if positions.numel() and (last := int(positions.max()) + self.shift) >= self.num_embeddings:
            raise ValueError(
                f"prefix and tokens need {last + 1} positions, the model has {self.num_embeddings}: shorten one of them"
            )
        return self.base(positions + self.shift)


def attach(model, prefix_length: int = 10, reparameterize: int | None = None):
    """Wraps `self_attn` of every layer of `model.layers`, and `embed_positions` where the model has it. Freezes
    nothing."""
    if not all(hasattr(getattr(layer, "self_attn", None), "attend") for layer in getattr(model, "layers", (None,))):
        raise ValueError(
            "the model has no `layers` whose `self_attn` has the verb `attend`, where the prefix goes in: minillama's "
            "models have it, and adapters/transformers_llama.py gives it to a LLaMA of transformers"
        )
    if any(hasattr(getattr(layer.self_attn.rope, "scaling", None), "by_length") for layer in model.layers):
        raise ValueError(
            "the model's RoPE turns otherwise in longer texts (dynamic or long RoPE), and the prefix's keys are turned "
            "before the text is known: llama_adapter's prompts are not turned and stand there as on any model"
        )
    for layer in model.layers:
        layer.self_attn = PrefixAttention(layer.self_attn, prefix_length, reparameterize)
    if hasattr(model, "embed_positions"):
        model.embed_positions = ShiftedPositions(model.embed_positions, prefix_length)


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────


def to_peft(options, tensors, layout):
    """(config, tensors) as PEFT has them: one row per token, (K, 2L·G·d), keys and values of each layer in turn."""
    if options["reparameterize"] is not None:
        return None  # PEFT's MLP is one for all layers
    L, G, d = layout.num_layers, layout.num_kv_heads, layout.head_dim
    kv = torch.stack([tensors[f"layers.{i}.self_attn.{own}"] for i in range(L) for own in ("keys", "values")])
    K = kv.shape[2]  # (2L, G, K, d)
    config = {"peft_type": PEFT_TYPE, "num_virtual_tokens": K, "token_dim": G * d, "num_layers": L}
    config |= {"num_attention_heads": G, "num_transformer_submodules": 1, "encoder_hidden_size": G * d}
    return config | {"prefix_projection": False}, {"prompt_embeddings": kv.permute(2, 0, 1, 3).reshape(K, -1)}


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    table, K = tensors["prompt_embeddings"], config["num_virtual_tokens"]
    L, G, d = layout.num_layers, layout.num_kv_heads, layout.head_dim
    if table.shape != (K, 2 * L * G * d):
        raise ValueError(
            f"prompt_embeddings has shape {tuple(table.shape)}; "
            f"{K} virtual tokens on this base need {(K, 2 * L * G * d)}"
        )
    kv = table.view(K, L, 2, G, d).permute(1, 2, 3, 0, 4)  # (L, 2, G, K, d)
    halves = (("keys", 0), ("values", 1))
    return {"prefix_length": K}, {f"layers.{i}.self_attn.{own}": kv[i, half] for i in range(L) for own, half in halves}
