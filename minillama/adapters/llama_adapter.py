"""LLaMA-Adapter: zero-init gated prefix cross-attention (Zhang et al. 2023, https://arxiv.org/abs/2303.16199).

K learned prompt tokens stand before every adapted layer. The layer's own, frozen k_proj and v_proj make keys and
values of them, without rotary positions; the tokens' queries attend to these keys in a softmax of their own; and a
learned gate, zero at first, lets the result into the layer (equations 7 to 11 of the paper's first arXiv version):

                    x                        prompt (K, D)  ◀ trained
                    │ project                   │ k_proj, v_proj
              ┌─────┼─────┐               ┌─────┴─────┐
              q     k     v             k_prompt   v_prompt
              │     │     │               │           │
              ├──── attend ─▶ y           │           │
              │               │           │           │
              └─────────── attend ────────┴───────────┘
                              │        │
                              │        × tanh(gate)  ◀ trained, 0 at first
                              + ◀──────┘
                              │ o_proj
                              ▼

With the gate at 0 the layer adds 0 · (something finite) to y: the model returns what it returned, bit for bit. The
gate's gradient is not 0 there, the prompt's is: the first step moves the gate alone, the second moves both.

Trained parameters: L · (K·D + H) with a gate per head; for LLaMA-7B, K = 10 and the top 30 layers, 1,229,760.
Shapes: B batch, T tokens, D model width, H query heads, G key/value heads, d head width, K prompt tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

GATES, JOINS, INITS = ("head", "layer", "feature"), ("before", "after", "unprojected"), ("normal", "input")
# What the known implementations compute, as options of `attach`; prompts are N(0, 1) and gates 0 in all of them.
PRESETS = {
    "paper": dict(gate="head", tanh=True, join="before"),  # and its official training code
    "lit_llama": dict(gate="head", tanh=False, join="before"),  # and official inference; lit-llama skips 2 layers
    "peft": dict(gate="layer", tanh=False, join="after"),  # PEFT on LLaMA and Mistral
    "peft_gpt2": dict(gate="layer", tanh=False, join="unprojected"),  # PEFT on GPT-2
}
VERBS = ("project", "keys_values", "attend", "output")
LEARNING_RATES = (0.1, 2e-2)  # on the bundled bases, and on a real model
PEFT_TYPE = "ADAPTION_PROMPT"


def gate_shape(gate, num_heads, head_dim):
    """The shape of a gate that multiplies (B, H, T, d): one number per head (the paper), layer or feature."""
    shapes = {"head": (num_heads, 1, 1), "layer": (1,), "feature": (num_heads, 1, head_dim)}
    if gate not in shapes:
        raise ValueError(f"gate is {gate!r}; it can be {', '.join(map(repr, GATES))}")
    return shapes[gate]


def prefix_attention(q, k, v):
    """softmax(q kᵀ / √d) v, every query seeing every prompt, or its row's: q (B, H, T, d), k and v (G, K, d) or
    (B, G, K, d) -> (B, H, T, d)."""
    (B, H, T, d), G = q.shape, k.shape[-3]
    q = q.reshape(B, G, H // G * T, d)  # heads that share a key lie side by side: nothing need be repeated
    weights = (q @ (k * d**-0.5).mT).softmax(-1)  # (B, G, H/G·T, K); few keys: the plain formula beats a fused kernel
    return (weights @ v).reshape(B, H, T, d)


def opening(gate, tanh):
    """What the prefix term is multiplied by: tanh(gate) as in the paper, or the gate itself."""
    return torch.tanh(gate) if tanh else gate


class AdaptedAttention(nn.Module):
    """Wraps an attention with the verbs project, keys_values, attend and output; adds the gated term to `attend`.

    base: the attention (minillama.attention.Attention, or another wrapper). Its weights are used, never trained here.
    prompt_length: K.  gate: "head", "layer" or "feature", one number for each.  tanh: squash it, as the paper does.
    join: "before" the output projection, as in the paper; "after", the term sent through it by itself, so that a bias
    is added twice; or "unprojected", the heads put side by side and added to the layer's output.
    Parameters: prompt (K, D), drawn from N(0, 1); gate, zeros; both float32 whatever the base's dtype.
    With `active` set to False the layer is its base again, bit for bit.
    """

    own = ("prompt", "gate")

    def __init__(self, base, prompt_length=10, gate="head", tanh=True, join="before"):
        super().__init__()
        if not isinstance(prompt_length, int) or prompt_length < 1:
            raise ValueError(f"prompt_length is {prompt_length!r}; needed is a whole number from 1 on")
        if join not in JOINS:
            raise ValueError(f"join is {join!r}; it can be {', '.join(map(repr, JOINS))}")
        if join == "unprojected" and base.num_heads * base.head_dim != base.width:
            wide = f"the heads have {base.num_heads * base.head_dim} features together; the layer has {base.width}"
            raise ValueError(f"join is 'unprojected' and {wide}")
        if getattr(base, "join", "before") != "before":
            raise ValueError(
                f"the attention has an adapter with join {base.join!r} already, which no other can wrap: "
                "attach that one last"
            )
        device = next(base.parameters()).device
        self.base, self.tanh, self.join, self.active = base, tanh, join, True
        self.width, self.num_heads, self.rope = base.width, base.num_heads, base.rope
        self.num_kv_heads, self.head_dim = base.num_kv_heads, base.head_dim
        self.prompt = nn.Parameter(torch.randn(prompt_length, self.width, device=device))
        self.gate = nn.Parameter(torch.zeros(gate_shape(gate, self.num_heads, self.head_dim), device=device))

    def project(self, x, positions=None):
        return self.base.project(x, positions)

    def keys_values(self, x):
        return self.base.keys_values(x)

    def attend(self, q, k, v, mask=None, cache=None):
        """The base's `attend` plus the gated term: (B, H, T, d). The mask is about tokens; prompts are seen by all.

        The prompts' keys and values are made once per call, or once per generation where there is a cache: they
        live in that cache, never in this module, so that none outlasts a training step.
        """
        y = self.base.attend(q, k, v, mask, cache)
        return y + self.term(q, cache) if self.active and self.join == "before" else y

    def term(self, q, cache=None):
        """The gated prefix attention, (B, H, T, d)."""
        k, v = self.prefix(q.dtype) if cache is None else cache.once(self, lambda: self.prefix(q.dtype))
        return opening(self.gate, self.tanh).to(q.dtype) * prefix_attention(q, k, v)

    def prefix(self, dtype):
        """The prompts' keys and values, (G, K, d) each."""
        return self.base.keys_values(self.prompt.to(dtype))

    def output(self, y):
        return self.base.output(y)

    def forward(self, x, positions=None, mask=None, cache=None):
        """x (B, T, D) -> (B, T, D)."""
        q, k, v = self.project(x, positions)
        out = self.output(self.attend(q, k, v, mask, cache))
        if self.active and self.join != "before":
            term = self.term(q, cache)
            out = out + (self.output(term) if self.join == "after" else term.transpose(1, 2).flatten(2))
        return out


def top_layers(model, layers):
    """The top `layers` of `model.layers` (None: all), whose `self_attn` a wrapper here can take the place of."""
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", (None,))]
    if not all(hasattr(attention, verb) for attention in attentions for verb in VERBS):
        raise ValueError(
            f"the model has no `layers` whose `self_attn` has the verbs {', '.join(VERBS)}, between which the prompts "
            "step in: minillama's models have them, and transformers_llama.py gives them to a LLaMA of transformers"
        )
    L = len(model.layers)
    layers = L if layers is None else layers
    if not isinstance(layers, int) or not 1 <= layers <= L:
        raise ValueError(f"layers is {layers!r}; the model has {L}, so it can be 1 to {L}")
    return model.layers[L - layers :]


def attach(
    model, prompt_length: int = 10, layers: int | None = None, gate: str = "head", tanh: bool = True,
    join: str = "before", init: str = "normal",
):  # fmt: skip
    """Wraps `self_attn` of the top `layers` of `model.layers` (None: of all; the paper: 30 of LLaMA-7B's 32). Freezes
    nothing. init: "normal", prompts from N(0, 1); "input", these times the root mean square of the weight of the norm
    before the attention: as large as the tokens there, which in a pre-trained LLaMA are small (SmolLM2: 0.04 to 0.42).
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}; it can be {' or '.join(map(repr, INITS))}")
    for layer in top_layers(model, layers):
        layer.self_attn = AdaptedAttention(layer.self_attn, prompt_length, gate, tanh, join)
        if init == "input":
            if not hasattr(norm := list(layer.input_layernorm.modules())[-1], "weight"):  # under V2 its trained one
                raise ValueError("init is 'input' and the layers have no norm before their attention: take 'normal'")
            weight = norm.weight.detach().float() + getattr(norm, "offset", 0)
            layer.self_attn.prompt.data *= weight.square().mean().sqrt()


class GatedPrefixAttention(nn.Module):
    """The same in one layer that needs no base: causal self-attention with projections of its own and gated prompts.

    width D, num_heads H, prompt_length K, gate and tanh as above. Every weight is trained, the projections' too.
    """

    def __init__(self, width, num_heads, prompt_length=10, gate="head", tanh=True):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width is {width} and num_heads is {num_heads}; the second must divide the first")
        self.num_heads, self.tanh = num_heads, tanh
        self.prompt = nn.Parameter(torch.randn(prompt_length, width))
        self.gate = nn.Parameter(torch.zeros(gate_shape(gate, num_heads, width // num_heads)))
        self.c_attn = nn.Linear(width, 3 * width, bias=False)  # query, key and value in one matrix
        self.c_proj = nn.Linear(width, width, bias=False)

    def project(self, x):
        """(..., T, D) -> q, k, v, (..., H, T, d) each."""
        return self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).transpose(-4, -2).unbind(-3)

    def forward(self, x, attention_mask=None):
        """x (B, T, D) -> (B, T, D). attention_mask: scaled_dot_product_attention's, of the tokens; None is causal."""
        q, k, v = self.project(x)  # (B, H, T, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None)
        _, k, v = self.project(self.prompt)  # (H, K, d)
        y = y + opening(self.gate, self.tanh) * prefix_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────


def their_joins(layout):
    """Where PEFT's adaption prompt adds its term, the cheapest of equal ways first."""
    if layout.transposed:
        return ("unprojected",)
    return ("after",) if layout.output_bias else ("before", "after")


def to_peft(options, tensors, layout):
    """(config, tensors) as PEFT's adaption prompt has them; None for a gate per head, feature or under a tanh."""
    if (options["gate"], options["tanh"]) != ("layer", False) or options["join"] not in their_joins(layout):
        return None
    config = {"peft_type": PEFT_TYPE, "adapter_len": options["prompt_length"]}
    config |= {"adapter_layers": options["layers"] or layout.num_layers, "target_modules": layout.attention}
    theirs = {}
    for name, tensor in tensors.items():
        place, _, own = name.rpartition(".")
        theirs[f"{place}.adaption_{own}"] = tensor[None] if own == "prompt" else tensor
    return config, theirs


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    options = {"prompt_length": config["adapter_len"], "layers": config["adapter_layers"]}
    own = {name.replace("adaption_", ""): tensor for name, tensor in tensors.items()}
    own = {name: tensor[0] if name.endswith("prompt") else tensor for name, tensor in own.items()}
    return options | {"gate": "layer", "tanh": False, "join": their_joins(layout)[0]}, own
