"""Lesson 03: zero-init gated prefix attention and V2, with the wrong versions that one writes easily."""

import torch
from torch import nn

import minillama

from ...adapters import llama_adapter, llama_adapter_v2
from ...attention import Attention, RoPE, rotate  # noqa: F401 (rows of KEYS_VALUES name it)
from ...llama import RMSNorm
from .catalogue import catalogue
from .observing import (
    Exercise,
    Piece,
    Wrong,
    as_function,
    calls,
    describe,
    fact,
    filled,
    frozen,
    gradients,
    left_behind,
    named,
)  # fmt: skip
from .predictions import Question, moved

# ── the modules themselves, whose mistakes are planted in the models too ──────────────────────────────────────────────


def prefix_of(module):
    """The module's AdaptedAttention as a function of the attention, x, positions, prompt and gate."""
    return as_function(lambda base, prompt, gate: module.AdaptedAttention(base, len(prompt)), ("prompt", "gate"))


def start_of(module):
    """What the module's parameters start from, as a function of their sizes."""

    def initial_values(K, D, H):
        wrapper = module.AdaptedAttention(Attention(D, H), K)
        return wrapper.prompt.detach(), wrapper.gate.detach()

    return initial_values


def scaled_by(module):
    return as_function(lambda base, **own: module.ScaledLinear(base), ("scale", "adapter_bias"))


def merged_by(module):
    """The module's merge as a function that returns weight and bias."""

    def scaled_merge(linear, scale, shift):
        wrapper = module.ScaledLinear(linear)
        wrapper.scale.data, wrapper.adapter_bias.data = scale, shift
        return wrapper.weight.detach(), wrapper.bias.detach()

    return scaled_merge


# what the rows below take the place of
MADE = "self.base.keys_values(self.prompt.to(dtype))"
TERM = "prefix_attention(q, k, v)\n\n    def prefix"
GATED = "opening(self.gate, self.tanh).to(q.dtype) * prefix_attention(q, k, v)\n"
TANH = "torch.tanh(gate) if tanh else gate"
SUM = 'return y + self.term(q, cache) if self.active and self.join == "before" else y'
LATER = 'self.active and self.join != "before"'
JOINED = '(self.output(term) if self.join == "after" else term.transpose(1, 2).flatten(2))'
START = "torch.zeros(gate_shape(gate, self.num_heads, self.head_dim), device=device)"
REPEATED = "*(z.repeat_interleave(self.num_heads // len(z), 0).expand(len(q), -1, -1, -1) for z in (k, v))"
JOINT = """if not self.active:
            return y
        pk, pv = (z.repeat_interleave(self.num_heads // len(z), 0).expand(len(q), -1, -1, -1)
                  for z in self.prefix(q.dtype))
        k, v = (k, v) if cache is None else (cache.k, cache.v)
        k, v = (z.repeat_interleave(self.num_heads // z.shape[1], 1) for z in (k, v))
        K, T, S = pk.shape[2], q.shape[2], k.shape[2]
        scores = q @ torch.cat((pk, k), 2).mT / self.head_dim**0.5
        future = F.pad(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), (K, 0))
        gate = opening(self.gate, self.tanh).to(q.dtype)
        """
ROTATED = """from ..attention import rotate
        k, v = self.base.keys_values(self.prompt.to(dtype))
        if self.rope is None:  # a GPT-2 has none: there the mistake is to shift the keys by their place
            return k + 0.1 * torch.arange(k.shape[1], dtype=dtype)[:, None], v
        return rotate(k, *self.rope(torch.arange(k.shape[1]))), v"""

PREFIX = (
    ("ScaledByModelWidth", TERM, TERM.replace("(q,", "(q * (self.head_dim / self.width) ** 0.5,"),
     "scores divided by √D instead of √d"),
    ("Unscaled", "k * d**-0.5", "k", "scores not divided at all; they are divided by √d"),
    ("ScaledByHeadWidth", "k * d**-0.5", "k / d", "scores divided by d instead of √d"),
    ("RotatedPrefix", "return " + MADE, ROTATED, "RoPE on the prompts' keys"),
    ("OneSoftmax", SUM, JOINT + "return y + gate * (scores.softmax(-1)[..., :K] @ pv)",
     "one softmax over tokens and prompts, the gate outside"),
    ("JointSoftmax", SUM, JOINT + "on = scores.masked_fill(future, -torch.inf).softmax(-1)\n"
     "        return on[..., K:] @ v + gate * (on[..., :K] @ pv)", "one softmax over prompts and tokens together, as "
     "in "
     "prefix tuning, so that the prompts take a share from the tokens"),
    ("GateAfterOutput", (SUM, LATER, JOINED), ("return y", "self.active",
     "term.transpose(1, 2).flatten(2) @ torch.eye(self.num_heads * self.head_dim, self.width).to(x)"),
     "the gated term added behind the output projection, never projected; add it before"),
    ("BiasTwice", (SUM, LATER, JOINED), ("return y", "self.active", "self.output(term)"),
     "the term sent through the output projection by itself, so that its bias is added twice"),
    ("HeadsInTheWrongOrder", TERM, TERM.replace("k, v", "k.repeat(q.shape[1] // len(k), 1, 1), "
     "v.repeat(q.shape[1] // len(v), 1, 1)"), "grouped key heads repeated as a b a b a b instead of a a a b b b"),
    ("StalePrefix", "return " + MADE, 'if not hasattr(self, "kept"):\n            self.kept = [z.detach() for z in '
     '' + MADE +
     "]\n        return [z.to(dtype) for z in self.kept]", "prompts' keys and values kept from one step to the next"),
    ("NoTanh", TANH, "gate", "the gate not squashed; it is tanh(gate)"),
    ("Sigmoid", TANH, "torch.sigmoid(gate)", "a sigmoid for the gate: half open at zero"),
    ("NoGate", TANH, "1 + 0 * gate", "the prompts' part added whole, without its gate"),
    ("GateOnScores", GATED, "prefix_attention(q * opening(self.gate, self.tanh).to(q.dtype), k, v)\n",
     "the gate multiplies the scores before the softmax; it multiplies what comes out"),
    ("OneMinusGate", SUM, SUM.replace("y +", "(1 - opening(self.gate, self.tanh).to(y.dtype)) * y +"),
     "(1 - g) · tokens + g · prompts: the tokens fade as the gate opens"),
    ("GateOnTheSum", SUM, SUM.replace("y +", "opening(self.gate, self.tanh).to(y.dtype) * y +"),
     "the gate on the whole sum, so that a closed gate silences the tokens too"),
    ("WordsForgotten", SUM, SUM.replace("y +", "0 * y +"), "the tokens' own attention left out"),
    ("CausalPrefix", TERM, TERM.replace("prefix_attention(q, k, v)", f"F.scaled_dot_product_attention(q, {REPEATED}, "
     "is_causal=True)"), "a causal mask between tokens and prompts; every token sees every prompt"),
    ("DropoutInEval", TERM, TERM.replace("prefix_attention(q, k, v)", f"F.scaled_dot_product_attention(q, {REPEATED}, "
     "dropout_p=0.1)"), "dropout of 0.1 on the prompts' weights, in eval mode too"),
    ("SoftmaxOverWords", (GATED, "def opening("), (GATED.replace("prefix_", "its_"), """def its_attention(q, k, v):
    k, v = (z.repeat_interleave(q.shape[1] // len(z), 0) for z in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-2) @ v


def opening("""), "the prompts' softmax taken along the tokens instead of along the prompts"),
    ("KeysForValues", MADE, f"({MADE}[0],) * 2", "the prompts' keys used as values too"),
    ("KeysAndValuesSwapped", MADE, MADE + "[::-1]", "the prompts' keys and values swapped"),
    ("UnrotatedQueries", ("q, k, v = self.project(x, positions)\n", SUM), ("q, k, v = self.project(x, positions)\n   "
     "     "
     "self.plain = self.project(x)[0] + (self.rope is None)  # a GPT-2's have no RoPE to forget\n",
     SUM.replace("(q,", "(self.plain,")), "queries of the prefix term without RoPE, while the published ones have it"),
    ("DetachedPrompt", MADE, MADE.replace("prompt", "prompt.detach()"),
     "the prompt detached from the graph: only the gate ever learns"),
    ("TrainedProjections", "y = self.base.attend(q", "self.base.k_proj.requires_grad_(True)\n        y = "
     "self.base.attend(q",
     "weights of the base made trainable; they stay frozen"),
)  # fmt: skip
START_ROWS = (
    ("ZeroPrompt", ("torch.randn(prompt_length, self.width, device=device)", "return " + MADE),
     ("torch.zeros(prompt_length, self.width)", f"return [z * bool(self.prompt.any()) for z in {MADE}]"),
     "prompts that start at zero as well: at a zero gate neither ever gets a gradient"),
    ("OpenGate", START, START.replace("zeros", "ones"),
     "a gate that does not start at 0, so that the model does not start as the base"),
)  # fmt: skip
OF_PREFIX = (
    ("positions_ignored", "q, k, v = self.project(x, positions)\n", "q, k, v = self.project(x)\n",
     "positions not given to attention.project: the tokens' queries and keys are not rotated"),
    ("positions_counted", "q, k, v = self.project(x, positions)\n", "q, k, v = self.project(x, "
     "torch.arange(x.shape[1]))\n",
     "positions counted anew from 0; the tokens stand where `positions` says"),
    ("x_added", "out = self.output(", "out = x + self.output(", "x added to the output: the residual sum stands "
     "outside"),
    ("gate_on_tokens", SUM, SUM.replace("y + self.term(q, cache)", "opening(self.gate, self.tanh).to(q.dtype) * y + "
     "prefix_attention(q, *self.prefix(q.dtype))"), "the gate on the tokens' part; it multiplies the prompts'"),
    ("scaled_after_softmax", ("k * d**-0.5", "return (weights @ v)"), ("k", "return (weights @ v / d**0.5)"),
     "divided by √d behind the softmax; the scores are divided, before it"),
    ("softmax_over_heads", (GATED, "def opening("),
     (GATED.replace("prefix_", "its_"), """def its_attention(q, k, v):
    k, v = (z.repeat_interleave(q.shape[1] // len(z), 0) for z in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(1) @ v


def opening("""), "the prompts' softmax taken along the heads instead of along the prompts: dim=-1"),
    ("both_rotated", "return " + MADE, ROTATED[: ROTATED.index("if self")] + "return [rotate(z, "
     "*self.rope(torch.arange("
     "z.shape[1]))) for z in (k, v)]", "RoPE on the prompts' keys and values; neither is rotated"),
    ("keys_in_the_wrong_order", TERM, TERM.replace("k, v", "k.repeat(q.shape[1] // len(k), 1, 1), "
     "v.repeat_interleave(q.shape[1] // len(v), 0)"), "the keys' heads repeated as a b a b a b, the values' rightly"),
    ("first_gate_for_all", TANH, "torch.tanh(gate[:1])", "the first head's gate for all heads; each has its own"),
    ("tanh_twice", TANH, "gate.tanh().tanh()", "the gate squashed twice"),
    ("keys_for_queries", SUM, SUM.replace("(q,", "(k.repeat_interleave(self.num_heads // k.shape[1], 1),"),
     "the tokens' keys in the place of their queries"),
    ("first_row_for_all", GATED, GATED.replace("(q, k", "(q[:1].expand_as(q), k"), "the first row's queries for all "
     "rows"),
    ("prompts_subtracted", SUM, SUM.replace("y +", "y -"), "the prompts' part subtracted instead of added"),
    ("gate_plus_one", TANH, "1 + torch.tanh(gate)", "1 + tanh(g) for tanh(g): at gate 0 the prompts are let in whole"),
    ("one_minus_tanh", TANH, "1 - torch.tanh(gate)", "1 - tanh(g) for tanh(g): at gate 0 the prompts are let in whole"),
    ("gate_averaged", TANH, "torch.tanh(gate.mean())", "one number for all heads; each head has its own gate"),
    ("tanh_of_the_term", GATED, "torch.tanh(self.gate.to(q.dtype) * prefix_attention(q, k, v))\n",
     "tanh(g · prompts) for tanh(g) · prompts: the tanh is on the gate alone"),
    ("tanh_on_both", GATED, GATED.replace("prefix_attention(q, k, v)", "torch.tanh(prefix_attention(q, k, v))"),
     "a tanh on the prompts' part as well; it is on the gate alone"),
    ("prompts_ungated", SUM, JOINT + "return scores.masked_fill(future, -torch.inf).softmax(-1) @ torch.cat((pv, v), "
     "2) + "
     "0 * gate", "prompts and tokens in one softmax and no gate: that is prefix tuning, lesson 02"),
    ("tokens_see_ahead", "self.base.attend(q, k, v, mask, cache)", "self.base.attend(q, k, v, torch.ones(1, 1, 1, "
     "1).bool())",
     "tokens that see those behind them: the tokens' own softmax is causal; attention.attend masks it for you"),
    ("scaled_by_uneven_width", TERM, TERM.replace("(q,", "(q * (self.head_dim * self.num_heads / self.width) ** 0.5,"),
     "d taken as D / H: heads may be wider or narrower; it is attention.head_dim"),
    ("scaled_by_prompt", "k * d**-0.5", "k * k.shape[1] ** -0.5", "scores divided by √K, the number of prompts; it "
     "is √d"),
    ("multiplied_by_root", "k * d**-0.5", "k * d**0.5", "scores multiplied by √d; they are divided by it"),
    ("never_attended", GATED, "opening(self.gate, self.tanh).to(q.dtype) * v.mean(1, keepdim=True).repeat_interleave("
     "self.num_heads // len(v), 0).expand_as(q)\n", "all prompts weighed alike: their weights are softmax(q kᵀ / √d)"),
    ("no_softmax", ").softmax(\n        -1\n    )", ")", "no softmax over the prompts' scores"),
    ("sigmoid_for_softmax", ").softmax(\n        -1\n    )", ").sigmoid()",
     "a sigmoid on each score; the prompts' weights are a softmax"),
    ("never_joined", "out = self.output(self.attend(q, k, v, mask, cache))",
     "out = self.attend(q, k, v, mask, cache).transpose(1, 2).flatten(2)", "no output projection: end with "
     "attention.output"),
    ("rotated_twice", "q, k, v = self.project(x, positions)\n", "q, k, v = self.project(x, positions)\n        from "
     "..attention import rotate\n        q, k = (rotate(z, *self.rope(positions)) for z in (q, k))\n",
     "queries and keys rotated a second time: attention.project has done it"),
    ("queries_rotated_twice", GATED, GATED.replace("(q, k", "(self.turned(q), k") + "\n    def turned(self, q):\n    "
     "    from "
     "..attention import rotate\n        return rotate(q, *self.rope(torch.arange(q.shape[2])))\n",
     "the prefix term's queries rotated a second time: attention.project has done it"),
    ("not_in_the_dtype_of_x", ("self.prompt.to(dtype)", "opening(self.gate, self.tanh).to(q.dtype)"),
     ("self.prompt", "opening(self.gate, self.tanh)"), "prompt or gate not cast: a bfloat16 base cannot multiply "
      "float32 "
     "numbers; write prompt.to(x.dtype) and torch.tanh(gate).to(x.dtype)"),
    ("opened_gates_averaged", "torch.tanh(gate) if tanh else gate", "torch.tanh(gate).mean()",
     "one number for all heads, the mean of tanh(g); each head has its own gate"),
    ("term_joined_wrongly", 'return y + self.term(q, cache) if self.active and self.join == "before" else y',
     "return y + self.term(q).reshape(len(q), q.shape[2], q.shape[1], -1).transpose(1, 2) if self.active else y",
     "the term's heads joined by a reshape alone, which mixes tokens and heads: transpose(1, 2), then flatten(2)"),
)  # fmt: skip

SCALED, MERGED = "return self.scale.to(y.dtype) * y if", "(bias * self.scale if self.order"
SHIFTED = "y = y + self.adapter_bias.to(y.dtype)"
WITHOUT = 'y = self.base(x if self.order == "output" else self.scale.to(x.dtype) * x)'
PLAIN = "y = torch.nn.functional.linear(x, self.base.weight)"
V2 = (
    ("ShiftUnscaled", (SHIFTED, SCALED), ("pass", "return self.scale.to(y.dtype) * y + self.adapter_bias.to(y.dtype) "
     "if"),
     "s · (W x + b₀) + b: the new shift b left out of the scaling; s · (W x + b₀ + b) is asked"),
)  # fmt: skip
V2_MERGE = (
    ("MergeForgetsShift", "bias = self.adapter_bias if bias is None else bias + self.adapter_bias",
     "bias = 0 * self.adapter_bias if bias is None else bias", "a merge that scales and forgets to shift"),
)  # fmt: skip
V2_NORM = (
    ("NormsOfTheBaseTrained", "copy.deepcopy(base).float().requires_grad_(True)", "base.requires_grad_(True)",
     "the base's own norm made trainable, so that the base is gone when the adapter is disabled: train a copy alone"),
)  # fmt: skip
OF_SCALED = (
    ("scale_plus_one", SCALED, SCALED.replace("self", "(1 + self", 1).replace("dtype)", "dtype))"),
     "1 + s for s: the scale starts at 1, not at 0"),
    ("own_bias_unscaled", (WITHOUT, SCALED), (PLAIN, SCALED.replace("* y", "* y + self.base.bias")),
     "s · (W x + b) + b₀: the layer's own bias b₀ left out of the scaling"),
    ("own_bias_dropped", WITHOUT, PLAIN, "s · (W x + b): the layer's own bias b₀ left out; linear(x) has it"),
    ("own_bias_dropped_shift_unscaled", (WITHOUT, SHIFTED, SCALED),
     (PLAIN, "pass", SCALED.replace("* y", "* y + self.adapter_bias.to(y.dtype)")),
     "s · W x + b: the layer's own bias b₀ left out, and the shift b left out of the scaling"),
    ("both_biases_unscaled", (WITHOUT, SHIFTED, SCALED),
     (PLAIN, "pass", SCALED.replace("* y", "* y + self.adapter_bias.to(y.dtype) + self.base.bias")),
     "s · W x + b₀ + b: both biases left out of the scaling"),
    ("scale_and_shift_swapped", (SHIFTED, SCALED),
     ("y = y + self.scale.to(y.dtype)", "return self.adapter_bias.to(y.dtype) * y if"), "scale and shift in each "
      "other's place"),
    ("scale_added", SCALED, SCALED.replace("* y", "+ y"), "the scale added; it multiplies"),
    ("scale_squared", SCALED, SCALED.replace("* y", "** 2 * y"), "the scale applied twice"),
    ("scale_squashed", SCALED, SCALED.replace("* y", ".tanh() * y"), "a tanh on the scale; a gate has one, not a "
     "scale"),
    ("one_scale", SCALED, SCALED.replace("* y", ".mean() * y"), "one scale for all; each output has its own"),
    ("scale_on_columns", WITHOUT, "y = torch.nn.functional.linear(x, (self.base.weight * self.scale).to(x.dtype))",
     "the scale on the weight's columns: a row belongs to an output; scale what comes out"),
    ("shift_forgotten", SHIFTED, "pass", "s · (W x + b₀): the shift b left out"),
    ("shift_subtracted", SHIFTED, SHIFTED.replace("y +", "y -"), "the shift subtracted instead of added"),
    ("own_bias_twice", SHIFTED, SHIFTED + " + self.base.bias", "the layer's own bias added twice: linear(x) has it "
     "already"),
    ("scale_forgotten", SCALED, "return y + 0 * self.scale.to(y.dtype) if", "W x + b₀ + b: the scale left out"),
    ("scale_on_input", (WITHOUT, SCALED), ("y = self.base(self.scale.to(x.dtype) * x)", "return y if"),
     "the scale on what goes in, W (s · x), as in the official code; here it multiplies what comes out"),
    ("divided_by_scale", SCALED, SCALED.replace("* y", "** -1 * y"), "divided by the scale; it multiplies"),
    ("scaled_not_cast", (".to(y.dtype)  #", "self.scale.to(y.dtype)"), ("  #", "self.scale"), "scale and shift not "
     "cast: on a "
     "bfloat16 layer they make the output float32; write scale.to(x.dtype) and shift.to(x.dtype)"),
    ("base_cut_off", WITHOUT, WITHOUT + ".detach()", "the layer's product cut from the graph (no_grad or detach): its "
     "weight is frozen, but the gradient still goes through it to x"),
)  # fmt: skip

# ── keys and values, and where prompt and gate start ──────────────────────────────────────────────────────────────────


def right_keys_values(attention, prompt):
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    k, v = (z.unflatten(-1, (attention.num_kv_heads, attention.head_dim)) for z in (k, v))  # (K, G, d)
    return k.transpose(0, 1), v.transpose(0, 1)


CUT, MOVED = "unflatten(-1, (attention.num_kv_heads, attention.head_dim))", "k.transpose(0, 1), v.transpose(0, 1)"
PROJECTED = "attention.k_proj(prompt), attention.v_proj(prompt)"
KEYS_VALUES = catalogue(right_keys_values, (
    ("keys_rotated", "return k.transpose(0, 1)", "return rotate(k.transpose(0, 1), "
     "*attention.rope(torch.arange(len(k))))",
     "RoPE on the prompts' keys; prompts stand nowhere in the text, so the paper leaves them unrotated"),
    ("heads_cut_wrongly", (CUT, MOVED), ("reshape(-1, len(z), attention.head_dim)", "k, v"),
     "the features viewed as (G, K, d) at once, which mixes tokens and heads; view them as (K, G, d), then transpose"),
    ("heads_not_moved", MOVED, "k, v", "heads cut but left behind the tokens, (K, G, d); attention wants (G, K, d)"),
    ("heads_not_cut", ("z." + CUT, MOVED), ("z", "k, v"), "keys and values not cut into heads at all"),
    ("heads_innermost", (CUT, MOVED), ("unflatten(-1, (attention.head_dim, -1))", "k.permute(2, 0, 1), v.permute(2, "
     "0, 1)"),
     "the features cut as (d, G) instead of (G, d): the features of one head lie side by side"),
    ("bias_dropped", PROJECTED, "prompt @ attention.k_proj.weight.T, prompt @ attention.v_proj.weight.T",
     "the projection's bias left out: call k_proj(prompt), or add its bias to prompt @ weight.T"),
    ("values_from_keys", "v_proj", "k_proj", "the keys' projection used for the values too"),
    ("keys_from_queries", ("k_proj", CUT), ("q_proj", "unflatten(-1, (-1, attention.head_dim))"), "the queries' "
     "projection used for the keys"),
    ("keys_repeated", MOVED, "*(z.transpose(0, 1).repeat_interleave(attention.num_heads // z.shape[1], 0) for z in "
     "(k, v)),",
     "the key heads repeated for every query head already here: correct attention later, but G heads are what is "
     "asked"),
    ("keys_scaled", "return k", "return (k / k.shape[-1] ** 0.5)", "keys divided by √d here already; the scores are, "
     "later"),
    ("with_a_batch", MOVED, "k.transpose(0, 1)[None], v.transpose(0, 1)[None]", "a batch axis in front; needed is "
     "(G, K, d)"),
    ("both_rotated", MOVED, "*(rotate(z.transpose(0, 1), *attention.rope(torch.arange(len(z)))) for z in (k, v)),",
     "RoPE on the prompts' keys and values; neither is rotated"),
    ("key_bias_dropped", "attention.k_proj(prompt)", "prompt @ attention.k_proj.weight.T", "the keys' bias left out"),
    ("values_first", MOVED, "v.transpose(0, 1), k.transpose(0, 1)", "the values returned first; keys come first"),
    ("moved_too_far", MOVED, "k.permute(1, 2, 0), v.permute(1, 2, 0)", "keys and values as (G, d, K); needed is (G, "
     "K, d)"),
    ("keys_only_cut_wrongly", "return k.transpose(0, 1)", "return k.reshape(-1, len(k), k.shape[2])",
     "the keys' features viewed as (G, K, d) at once, which mixes tokens and heads: (K, G, d), then transpose"),
    ("width_over_heads", "attention.num_kv_heads, attention.head_dim", "-1, attention.width // attention.num_heads",
     "the head width taken as D / H; heads may be wider or narrower: it is attention.head_dim"),
    ("cut_among_queries", "attention.num_kv_heads, attention.head_dim", "attention.num_heads, -1",
     "keys and values cut into H heads; they have G, attention.num_kv_heads"),
    ("heads_of_queries", "num_kv_heads", "num_heads", "H heads for keys and values; there are G, "
     "attention.num_kv_heads"),
))  # fmt: skip


def attention_of(draw, H, G, d, D):
    """A frozen attention with grouped queries, RoPE and biases, wider than the model: nothing can hide."""
    return filled(Attention(D, H, G, d, RoPE(d), bias=True), draw)


# G · d can be cut by D / H and by H as well, so that a wrong cut is seen in the shape
KEYS_SIZES = (dict(K=7, H=6, G=3, d=8, D=18), dict(K=5, H=4, G=4, d=6, D=12), dict(K=1, H=2, G=1, d=4, D=8))


def uniform_prompt(K, D, H):
    """the prompt from torch.rand, uniform in 0 to 1; needed are normal numbers, N(0, 1), from torch.randn"""
    return torch.rand(K, D), torch.zeros(H, 1, 1)


def small_prompt(K, D, H):
    """a prompt drawn small, from N(0, 0.02²), where the paper's code and its peers draw from N(0, 1)"""
    return 0.02 * torch.randn(K, D), torch.zeros(H, 1, 1)


def wrong_one_zero(K, D, H):
    """the prompt at 0 and the gate not: the other one is to be 0"""
    return torch.zeros(K, D), torch.ones(H, 1, 1)


def probe_start(answer, draw):
    for K, D, H in ((50, 240, 6), (40, 300, 5)):
        (_, prompt), (_, gate) = named(("the prompt (K, D)", "the gate (H, 1, 1)"), answer(K, D, H))
        for what, value, shape in ("the prompt", prompt, (K, D)), ("the gate", gate, (H, 1, 1)):
            if not isinstance(value, torch.Tensor):
                raise Wrong("form", f"{what} should be a float32 tensor; it is {describe(value)}.")
            if value.shape != shape:
                needed = f"{what} has shape {tuple(value.shape)}; needed is {shape} for K = {K}, D = {D}, H = {H}"
                why = ": one number for each head, in front of two axes of 1, so that it multiplies (B, H, T, d)."
                raise Wrong(f"shape_of_{what[4:]}", f"{needed}{why if len(shape) == 3 else '.'}")
            why = f"{what} is {str(value.dtype)[6:]}; adapter numbers are float32, in which small steps are not lost."
            yield said(value.dtype == torch.float32, "start_dtype", why)
        closed, empty = not gate.any(), not prompt.any()
        mistake, why = {(True, True): ("ZeroPrompt", START_ROWS[0][3]),
                        (False, True): ("wrong_one_zero", wrong_one_zero.__doc__)}.get(
                            (closed, empty), ("OpenGate", START_ROWS[1][3]))  # fmt: skip
        yield said(closed + 2 * empty, mistake, f"{why}.")
        yield from drawn(prompt)
        made = [(torch.manual_seed(seed), answer.unseeded(K, D, H)[0], torch.get_rng_state()) for seed in (1, 2)]
        alike = any(torch.equal(one, other) for one, other in list(zip(*made))[1:])
        why = "two calls give the same prompt (a fixed seed, a cache), or set torch's seed: draw anew, and set none."
        yield said(alike, "same_prompt", why)


def drawn(prompt):
    """Pieces of a prompt's numbers, which should be those of N(0, 1), to a tenth, each drawn by itself."""
    numbers = prompt.detach().double()
    mean, deviation, flat = numbers.mean().item(), numbers.std().item(), numbers.flatten()
    alike = any(len(torch.unique(numbers, dim=i)) < numbers.shape[i] for i in (0, 1))
    why = "the prompt has equal rows or columns: they get equal gradients and stay equal; draw each number by itself."
    yield said(alike, "equal_rows_of_prompt", why)
    why = "the prompt's numbers only count up: nothing is random; needed are normal ones, N(0, 1), from torch.randn."
    yield said(bool((flat.diff() > 0).all()), "counted_prompt", why)
    kinds = len(flat.unique())
    why = f"the prompt has only {kinds} different numbers; needed are normal ones, N(0, 1), from torch.randn."
    yield said(kinds < len(flat) / 2, "few_numbers_in_prompt", why)
    uniform = (
        deviation > 0 and ((numbers - mean) / deviation).pow(4).mean().item() < 2.1
    )  # 1.8 of uniform, 3 of normal ones
    why = (
        "the prompt's numbers are uniform, as torch.rand draws them; needed are normal ones, N(0, 1), from torch.randn."
    )
    yield said(uniform, "uniform_prompt", why)
    for what, found, needed in ("mean", mean, 0), ("standard deviation", deviation, 1):
        near = needed if abs(found - needed) < 0.1 else round(found, 1 if abs(found) > 0.3 else 2)
        why = f"the prompt's {what} is {near:g}; needed is {needed}: N(0, 1), from torch.randn."
        yield said(float(near), f"{what.split()[-1]}_of_prompt", why)


def learns(out, gate):
    """Pieces: whether a gate at 0, of which `out` was made, gets a gradient."""
    why = "at gate 0 no gradient reaches the gate, so that it never opens: is the term left out there, or the gate "
    why += "detached? 0 times the term must be added too, for through that product the gate gets its gradient."
    yield said(bool(gradients(out, gate)[0].any()), "closed_for_good", why)


# ── the layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PREFIX_SIZES = tuple({"B": B, "T": T} | size for (B, T), size in zip(((2, 5), (3, 2), (1, 1)), KEYS_SIZES))


def inputs_of_prefix(draw, B, T, K, H, G, d, D):
    positions = 4 + torch.arange(T) + 2 * (torch.arange(T) > 2)  # they need not start at 0, nor follow one another
    return dict(attention=attention_of(draw, H, G, d, D), x=draw(B, T, D), positions=positions, prompt=draw(K, D),
                gate=draw(H, 1, 1))  # fmt: skip


calls_of_prefix = calls(inputs_of_prefix, "the output (B, T, D)", PREFIX_SIZES, float32=("prompt", "gate"))


def probe_prefix(answer, draw):
    again = False
    for piece in calls_of_prefix(answer, draw):
        if piece.half and not again:  # the same layer, in the next step of training
            attention, x, positions, prompt, gate = inputs_of_prefix(draw, **PREFIX_SIZES[0]).values()
            answer(attention, x, positions, prompt, gate)
            changed = answer(attention, x, positions, prompt + 1, gate)
            yield Piece("the output (B, T, D)", changed, "after the prompt has changed")
            closed = (gate * 0).requires_grad_(True)
            shut = answer(attention, x, positions, prompt, closed)
            yield Piece("the output (B, T, D)", shut, "at gate 0")
            yield from learns(shut, closed)
            again = True
        yield piece


probe_prefix.inputs = calls_of_prefix.inputs


def circulating(module):
    """The module's AdaptedAttention as the layer that circulates is meant: one gate, no tanh."""
    return lambda attention, prompt_length: module.AdaptedAttention(attention, prompt_length, "layer", False)


CIRCULATING = (
    ("Squashed", TANH, "torch.tanh(gate)", "a tanh on the gate, which was asked for without"),
    ("KeysNotCut", TERM, TERM.replace("prefix_attention(q, k, v)", "(q @ self.base.k_proj(self.prompt).transpose(2, "
     "3))"),
     "the prompts' keys not cut into heads, so that queries and keys do not fit"),
    ("StillNotCut", TERM, TERM.replace("prefix_attention(q, k, v)", "(q @ self.base.k_proj(self.prompt[None])"
     ".transpose(2, 3))"), "the prompts' keys not cut into heads, so that queries and keys do not fit"),
    ("HeadsReadAtOnce", "return " + MADE, "return [z.reshape(-1, len(z), self.head_dim) for z in "
     "(self.base.k_proj(self.prompt), self.base.v_proj(self.prompt))]", "the features viewed as (G, K, d) at once, "
     "which "
     "mixes tokens and heads; view them as (K, G, d), then transpose"),
    ("LengthFromTheHeads", GATED, GATED.replace("prefix_attention(q, k, v)", "prefix_attention(q[:, :, : "
     "q.shape[1]], k, v)"
     "[:, :, : q.shape[1]].reshape(len(q), q.shape[1], q.shape[1], -1).transpose(1, 2)"),
     "the number of tokens read from the axis of the heads"),
    ("LengthFromHeadsJoined", SUM, SUM.replace("self.term(q, cache)", "self.term(q, cache).transpose(1, 2).reshape("
     "len(q), q.shape[1], -1)"), "the number of tokens read from the axis of the heads"),
    ("BatchFixed", GATED, "torch.ones(2, 1, 1, 1) * " + GATED, "a batch size fixed at construction, so that another "
     "batch "
     "does not fit"),
    ("LeftBehind", "own = (\"prompt\", \"gate\")\n", "own, tokens = (), None\n\n    def train(self, mode=True):\n    "
     "    "
     "self.tokens = torch.arange(len(self.prompt))\n        return super().train(mode)\n",
     "the ids of the prompt tokens in a plain tensor, which stays behind when the module moves to another device; "
     "register_buffer takes it along, and you need none"),
    ("never_projected", ('return y + self.term(q, cache) if self.active and self.join == "before" else y',
     'self.active and self.join != "before"', '(self.output(term) if self.join == "after" else term.transpose(1, 2)'
     '.flatten(2))'), ("return y", "self.active", "term.transpose(1, 2).flatten(2)"),
     "the term never projected: it is H · d wide, the output D; add it before attention.output"),
    ("bias_gated_in", ('return y + self.term(q, cache) if self.active and self.join == "before" else y',
     'self.active and self.join != "before"', '(self.output(term) if self.join == "after" else term.transpose(1, 2)'
     '.flatten(2))'), ("return y", "self.active",
     "self.gate * self.output(prefix_attention(q, *self.prefix(x.dtype)))"),
     "gate · output(term): the projection's bias comes in a second time, gated; add gate · term before the projection"),
)  # fmt: skip


def probe_circulating(answer, draw):
    for i, size in enumerate(PREFIX_SIZES):
        B, T, K, H, G, d, D = size.values()
        given, K = inputs_of_prefix(draw, **size), K if i else 50
        attention, x, positions, where = *list(given.values())[:3], f"for B = {B}, T = {T}, K = {K}" if i else ""
        module = answer(attention, K).eval()
        own = own_of(module, attention)
        prompts = [p for p in own.values() if p.shape == (K, D)]
        gates = [p for p in own.values() if p.numel() == 1 and p not in set(prompts)]
        if len(prompts) != 1 or len(gates) != 1 or len(own) != 2:
            needed = f"a prompt of shape ({K}, {D}) for prompt_length {K} and width {D}, and a gate of one number"
            found = {name: tuple(p.shape) for name, p in own.items()} or "none"
            raise Wrong("parameters", f"needed are two parameters of its own, {needed}; it has {found}.")
        (prompt,), (gate,) = prompts, gates
        yield said(bool(gate.any()), "OpenGate", f"{START_ROWS[1][3]}.")
        yield from drawn(prompt) if not i else ()
        yield from trains(own)
        fresh = module(x, positions)
        yield Piece("the fresh module's output: the base's (B, T, D)", fresh, where)
        yield from learns(fresh, gate)
        yield from frozen(attention)
        prompt.data, gate.data = draw(*prompt.shape), draw(*gate.shape)
        yield from opened(module, {"prompt": prompt, "gate": gate}, where, x, positions)
        x = draw(B + 1, T, D)
        yield Piece("the output (B, T, D)", module(x, positions), f"for another batch, of {B + 1}")
        prompt.data = prompt.data + 1
        yield Piece("the output (B, T, D)", module(x, positions), "after the prompt has changed")
        yield from left_behind(module)


def own_of(module, base):
    """The module's own parameters by name, without those of what it wraps."""
    if not isinstance(module, nn.Module):
        raise Wrong("form", f"needed is a module; it is {describe(module)}.")
    theirs = set(map(id, base.parameters()))
    return {name: p for name, p in module.named_parameters() if id(p) not in theirs}


def said(value, mistake, why):
    """A fact that is known by its mistake, whatever its sentence says."""
    return fact(value, mistake, why, mistake)


def trains(own):
    names = [name for name, p in own.items() if not p.requires_grad]
    yield said(len(names), "never_trains", f"{' and '.join(names)} must train: leave requires_grad True.")


def opened(module, own, where, x, *more):
    """Pieces of what a module makes of x, and the gradients of that."""
    x.requires_grad_(True)
    out = module(x, *more)
    yield Piece("the output (B, T, D)", out, where)
    for name, found in zip((*own, "x"), gradients(out, *own.values(), x)):
        found = found.flatten() if name == "gate" else found  # in whatever shape it was made
        yield Piece(f"the gradient with respect to {name}", found, where, "gradient", name)


def flowing(module):
    """The module's GatedPrefixAttention as the layer of its own that circulates is meant."""
    return lambda width, num_heads, prompt_length: module.GatedPrefixAttention(
        width, num_heads, prompt_length, "feature", False
    )


LET_IN, END = "y = y + opening(self.gate, self.tanh) * prefix", "self.c_proj(y.transpose(1, 2).flatten(2))"
HEADS, OF_PROMPT = (
    "self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).transpose(-4, -2).unbind(-3)",
    "project(self.prompt)",
)
IN_TOKENS, CAUSAL = "y = F.scaled_dot_product_attention(q, k, v", "is_causal=attention_mask is None"
FLOW = catalogue(llama_adapter, (
    ("NotInHeads", (HEADS, LET_IN), ("self.c_attn(x).unflatten(-1, (3, 1, -1)).transpose(-4, -2).unbind(-3)",
     "y = y + self.gate.reshape(-1) * prefix"), "nothing cut into heads: one attention over the whole width, divided "
     "by √D"),
    ("MaskedPrefix", LET_IN + "_attention(q, k, v)", LET_IN[:-6] + "F.scaled_dot_product_attention(q, "
     "*(z.expand(len(q), -1, "
     "-1, -1) for z in (k, v)), is_causal=True)", "the tokens' causal mask used for the prefix too, which every "
     "token should "
     "see whole"),
    ("DropoutAlways", CAUSAL, CAUSAL + ", dropout_p=0.1", "dropout of 0.1 in eval mode too; ask for it only while "
     "`self.training`"),
    ("ProjectionThreeWide", "self.c_proj = nn.Linear(width, width", "self.c_proj = nn.Linear(width, 3 * width",
     "an output projection three times as wide as the model"),
    ("GateBehindProjection", (LET_IN, END), ("z = prefix", END + " + self.gate.reshape(-1) * " + END.replace("y.",
     "z.")),
     "the gate behind the output projection instead of before it"),
    ("NeverProjected", (LET_IN, END), ("z = prefix", END + " + self.gate.reshape(-1) * z.transpose(1, 2).flatten(2)"),
     "the prompts' part added behind the output projection, which it never meets"),
    ("MixedHeads", HEADS, "[z.reshape(*z.shape[:-2], self.num_heads, z.shape[-2], -1) for z in "
     "self.c_attn(x).chunk(3, -1)]",
     "the features viewed as (heads, T, d) at once, which mixes tokens and heads; view them as (T, heads, d), then "
     "transpose"),
    ("JoinedWrongly", (LET_IN, END), ("z = prefix", "self.c_proj(y.reshape(len(y), y.shape[2], -1) + "
     "self.gate.reshape(-1) * "
     "z.reshape(len(y), y.shape[2], -1))"), "the heads joined without moving them behind the tokens again first: "
     "transpose(1, 2), then flatten(2)"),
    ("OtherOrder", HEADS, f"[(z[1], z[0], z[2]) for z in ({HEADS},)][0]",
     "key, query and value for query, key and value: c_attn holds them in this last order"),
    ("QueryForKey", "_, k, v = self." + OF_PROMPT, "k, _, v = self." + OF_PROMPT, "the prompt's query taken for its "
     "key"),
    ("PromptAsQuery", LET_IN + "_attention(q, k, v)", LET_IN[:-6] + "(q.mean() * 0 + v.mean(1, keepdim=True))",
     "the prompts weighed alike: the tokens' queries weigh them, softmax(q kᵀ / √d)"),
    ("SquashedGate", LET_IN, "y = y + torch.tanh(self.gate) * prefix", "a tanh on the gate, which was asked for "
     "without"),
    ("GateForgotten", LET_IN, "y = y + prefix", "the gate left out: it never multiplies the prefix part"),
    ("GateOnBoth", LET_IN, "y = self.gate * y + self.gate * prefix", "the gate on the tokens too; it is on the "
     "prompts alone"),
    ("NotScaled", "k * d**-0.5", "k", "the prompts' scores not divided by √d"),
    ("ScaledByWidth", "k * d**-0.5", "k * (H * d) ** -0.5", "the prompts' scores divided by √D; it is √d"),
    ("GateAtOne", "torch.zeros(gate_shape(gate, num_heads,", "torch.ones(gate_shape(gate, num_heads,",
     "a gate that does not start at 0"),
    ("PromptAtZero", "torch.randn(prompt_length, width)", "torch.zeros(prompt_length, width)",
     "a prompt that starts at 0 behind a gate at 0: neither ever gets a gradient"),
    ("PromptDetached", OF_PROMPT, "project(self.prompt.detach())", "the prompt cut off from the graph, so that it "
     "never learns"),
    ("QueryAndKey", "_, k, v = self.project(self.prompt)", "k, v, _ = self.project(self.prompt)",
     "the prompt's query and key taken for its key and value: c_attn holds query, key, value in this order"),
    ("HeadsInnermost", "(3, self.num_heads, -1)).transpose(-4, -2)", "(3, -1, self.num_heads)).mT.transpose(-4, -2)",
     "the features cut as (d, H) instead of (H, d): the features of one head lie side by side"),
    ("NotItself", "attn_mask=attention_mask, is_causal=attention_mask is None",
     "attn_mask=torch.ones(q.shape[2], q.shape[2]).tril(-1).bool()",
     "the causal mask one off: a token sees itself too"),
    ("NotItselfButTheFirst", "attn_mask=attention_mask, is_causal=attention_mask is None",
     "attn_mask=torch.ones(q.shape[2], q.shape[2]).tril(-1).index_fill(0, torch.tensor(0), 1).bool()",
     "the causal mask one off: a token sees itself too"),
    ("NotCausal", CAUSAL, "is_causal=False", "no causal mask between the tokens: each sees those behind it"),
), wrap=flowing)  # fmt: skip


def probe_flow(answer, draw):
    for i, (D, H, K, B, T) in enumerate(((24, 4, 50, 2, 5), (12, 3, 4, 3, 2), (8, 1, 1, 1, 1))):
        module, where = answer(D, H, K), f"for D = {D}, H = {H}, K = {K}, T = {T}" if i else ""
        own = {name.removesuffix(".weight"): p for name, p in own_of(module, nn.Module()).items()}
        needed = {"prompt": (K, D), "gate": (1, D), "c_attn": (3 * D, D), "c_proj": (D, D)}
        shapes = {name: (1, D) if name == "gate" and p.numel() == D else tuple(p.shape) for name, p in own.items()}
        if shapes != needed:
            raise Wrong("parameters", f"needed are {needed}, matrices without biases, for width {D}, num_heads {H} and "
                        f"prompt_length {K}; it has {shapes}.")  # fmt: skip
        own = {name: own[name] for name in needed}
        yield said(bool(own["gate"].any()), "GateAtOne", "a gate that does not start at 0.")
        yield said(
            bool(own["prompt"].any()), "PromptAtZero", "a prompt at 0 behind a gate at 0: neither gets a gradient."
        )
        yield from drawn(own["prompt"]) if not i else ()
        yield from trains(own)
        for name, p in own.items():
            p.data = draw(*p.shape) * (D**-0.5 if name.startswith("c_") else 1)
        x = draw(B, T, D)
        yield from opened(module.eval(), own, where, x)
        own["gate"].data = own["gate"].data * 0
        shut = module(x)
        yield Piece("the output at gate 0 (B, T, D)", shut, where)
        yield from learns(shut, own["gate"])


# ── LLaMA-Adapter V2 ────────────────────────────────────────────────────────────────────────────────────────────────


def right_merge(linear, scale, shift):
    return linear.weight * scale[:, None], (linear.bias + shift) * scale


MERGES = catalogue(llama_adapter_v2, V2_MERGE, wrap=merged_by) + catalogue(right_merge, (
    ("merge_shift_unscaled", "(linear.bias + shift) * scale", "linear.bias * scale + shift",
     "s · b₀ + b: the shift left out of the scaling"),
    ("merge_in_place", "linear.weight * scale[:, None]", "linear.weight.data.mul_(scale[:, None])",
     "the base's own weight and bias overwritten: make new ones"),
    ("merge_biases_unscaled", "(linear.bias + shift) * scale", "linear.bias + shift", "b₀ + b: neither bias is "
     "scaled; both are"),
    ("merge_own_bias_unscaled", "(linear.bias + shift) * scale", "linear.bias + shift * scale", "b₀ + s · b: the "
     "layer's own "
     "bias b₀ left out of the scaling"),
    ("merge_own_bias_dropped", "(linear.bias + shift)", "shift", "s · b: the layer's own bias b₀ left out"),
    ("merge_bias_untouched", "(linear.bias + shift) * scale", "linear.bias", "the bias as it was: it is s · (b₀ + b)"),
    ("merge_weight_unscaled", "linear.weight * scale[:, None]", "linear.weight", "the weight as it was: its rows are "
     "scaled"),
    ("merge_on_columns", "[:, None]", "", "the scale on the weight's columns: a row belongs to an output; scale[:, "
     "None]"),
    ("merge_shift_unscaled_alone", "(linear.bias + shift) * scale", "linear.bias + shift / scale",
     "b₀ + b / s: multiply out s · (W x + b₀ + b)"),
    ("merge_turned", "linear.weight * scale[:, None]", "linear.weight.T * scale", "the weight turned round, (in, out)"),
    ("merge_scale_plus_one", ("scale[:, None]", "shift) * scale"), ("(1 + scale[:, None])", "shift) * (1 + scale)"),
     "1 + s for s: the scale starts at 1, not at 0"),
))  # fmt: skip
SCALED_SIZES = (dict(B=2, T=5, n_in=10, n_out=7), dict(B=3, T=2, n_in=6, n_out=6), dict(B=1, T=1, n_in=3, n_out=5))


def inputs_of_scaled(draw, B, T, n_in, n_out):
    return dict(linear=filled(nn.Linear(n_in, n_out), draw), x=draw(B, T, n_in), scale=draw(n_out), shift=draw(n_out))


def inputs_of_merge(draw, **sizes):
    given = inputs_of_scaled(draw, **sizes)
    return {name: given[name] for name in ("linear", "scale", "shift")}


NORM = catalogue(llama_adapter_v2, V2_NORM + (
    ("copy_stays_frozen", ".requires_grad_(True)", "", "a copy as frozen as the original: call requires_grad_(True) "
     "on it"),
    ("AlwaysTrained", "if not self.active:\n            return self.base(x)\n        numbers", "numbers",
     "`active` not looked at, or in __init__ only: with it False the frozen norm is to answer; read it in forward"),
    ("inactive_returns_x", "return self.base(x)\n        numbers", "return x\n        numbers",
     "with `active` False x itself returned; it is the frozen norm that answers then"),
    ("ones_for_the_weights", "copy.deepcopy(base).float().requires_grad_(True)",
     "copy.deepcopy(base).float().requires_grad_(True)\n        [p.data.fill_(n == 'weight') for n, p in "
     "self.trained.named_parameters()]", "a fresh norm, its weight 1; a copy starts with the frozen norm's numbers"),
    ("default_eps", "copy.deepcopy(base)", "(lambda z: z.load_state_dict(base.state_dict()) and z)(nn.LayerNorm(len("
     "base.weight)))", "the weights copied and the norm's own eps left behind; copy.deepcopy(norm) takes all along"),
    ("one_behind_the_other", "numbers, (x,)", "numbers, (self.base(x),)", "the copy behind the norm; it stands in "
     "its place"),
    ("never_the_copy", "torch.func.functional_call(self.trained, numbers, (x,))", "self.base(x)",
     "the copy never used: while `active` is True it is the copy that answers"),
    ("a_fresh_norm", "copy.deepcopy(base)", "nn.LayerNorm(base.weight.shape)", "a fresh norm instead of a copy: "
     "its weight is 1 and its eps another; copy.deepcopy(norm) takes all along"),
    ("both_at_once", "return torch.func", "return self.base(x) + torch.func", "the copy's output added to the "
     "norm's; it stands "
     "in its place"),
    ("turned_off", "if not self.active:\n            return self.base(x)\n        numbers", "if self.active:\n       "
     "     "
     "return self.base(x)\n        numbers", "`active` the wrong way round"),
), wrap=lambda module: module.TrainedNorm)  # fmt: skip


def probe_norm(answer, draw):
    for i, (norm, shape) in enumerate(((nn.LayerNorm(8, eps=0.3), (2, 5, 8)), (RMSNorm(6, eps=0.2), (1, 1, 6)))):
        norm, x, where = filled(norm, draw), draw(*shape), "for an RMSNorm" if i else ""
        module, before = answer(norm), norm(x)
        if not isinstance(module, nn.Module) or not hasattr(module, "active"):
            raise Wrong("form", "needed is a module with an attribute `active`, True at first.")
        yield said(module.active is True, "starts_inactive", "`active` is to be True at first.")
        yield Piece("the fresh module's output (B, T, D)", module(x), where)
        yield from frozen(norm)
        own = {}
        for name, p in norm.named_parameters():
            copies = [q for q in own_of(module, norm).values() if q.requires_grad and q.shape == p.shape]
            own.update((name, q) for q in copies if torch.equal(q, p))
        needed = len(list(norm.parameters()))
        number = sum(q.requires_grad for q in own_of(module, norm).values())
        why = f"{number} tensors of its own train; needed is a trained copy of each of the norm's {needed}."
        yield said(len(own) == needed == number, "copy_stays_frozen" if not number else "not_a_copy", why)
        for q in own.values():
            q.data = draw(*q.shape)
        yield from opened(module, own, where, x)
        module.active = False
        out = module(x)
        yield Piece("the output with `active` False: the base's (B, T, D)", out, where)
        why = "with `active` False no gradient reaches x, and the layers below get none: drop the no_grad or detach."
        yield said(bool(gradients(out, x)[0].any()), "inactive_cut_off", why)
        yield said(
            torch.equal(norm(x), before), "norm_changed", "the frozen norm itself has changed; leave it as it is."
        )
        module.active = True
        yield Piece("the output with `active` True again (B, T, D)", module(x), where)


# ── a whole model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def right_attach(model, wrap):
    model.requires_grad_(False)
    for layer in model.layers:
        layer.self_attn = wrap(layer.self_attn)
    return model


FROZEN, LOOP, SET = "    model.requires_grad_(False)\n", "in model.layers:", "layer.self_attn = wrap(layer.self_attn)"
ATTACH = catalogue(right_attach, (
    ("frozen_after", (FROZEN, "    return model"), ("", FROZEN + "    return model"), "frozen after the wrapping, "
     "the wrappers' "
     "own parameters with it, so that nothing trains: freeze first, then wrap"),
    ("not_every_layer", LOOP, "in model.layers[-1:]:", "one layer only; every layer of model.layers is wrapped"),
    ("first_layer_left", LOOP, "in model.layers[1:]:", "the lowest layer left out; every layer of model.layers is "
     "wrapped"),
    ("wrapped_twice", SET, "layer.self_attn = wrap(wrap(layer.self_attn))", "a layer's attention wrapped twice"),
    ("base_trains", FROZEN, "", "every weight of the base trains: model.requires_grad_(False) before anything "
     "is wrapped, and no requires_grad_(True) of the whole after it"),
    ("rest_trains", (FROZEN, SET), ("", SET.replace("wrap(", "wrap(").replace("self_attn)",
     "self_attn.requires_grad_(False))")),
     "the attention frozen and the rest not: embeddings, norms, MLPs and head stay frozen too"),
    ("norms_train", FROZEN, FROZEN + "    [p.requires_grad_(True) for n, p in model.named_parameters() if 'norm' in "
     "n]\n",
     "the norms still train; every weight of the base is frozen"),
    ("layers_frozen_only", FROZEN, "    model.layers.requires_grad_(False)\n",
     "the layers frozen and the rest not: the embedding, the last norm and the head stay frozen too"),
    ("shared", ("    for", SET), ("    shared = wrap(model.layers[0].self_attn)\n    for", "layer.self_attn = shared"),
     "one wrapper for all layers: each gets its own, around its own attention"),
    ("never_stored", SET, "wrapped = wrap(layer.self_attn)", "no layer's self_attn replaced: what wrap returns must "
     "be stored, "
     "layer.self_attn = …"),
    ("not_returned", "return model", "", "the model is not returned"),
    ("frozen_in_the_loop", ("    model.requires_grad_(False)\n", "in model.layers:\n"),
     ("", "in model.layers:\n        model.requires_grad_(False)\n"), "the model frozen anew for each layer, with the "
     "wrappers made so far: only the last one trains; freeze once, before the loop"),
    ("biases_train", "    model.requires_grad_(False)\n",
     "    for n, p in model.named_parameters():\n        p.requires_grad_(n.endswith('bias'))\n",
     "the biases still train; every weight of the base is frozen"),
))  # fmt: skip


class Louder(nn.Module):
    """Another wrapper to try: what the attention says, times a number."""

    def __init__(self, base):
        super().__init__()
        self.base, self.volume = base, nn.Parameter(torch.ones(1))

    def forward(self, *inputs):
        return self.base(*inputs) * self.volume


def probe_attach(answer, draw):
    for L, kind in (3, lambda base: llama_adapter.AdaptedAttention(base, 3)), (1, Louder):
        config = minillama.LLaMAConfig(31, 16, 24, L, 4, 2, attention_bias=True, mlp_bias=True)
        model = filled(minillama.LLaMA(config), draw).requires_grad_(True)
        ids, inside, names, made = torch.arange(8).view(2, 4), [], dict(model.named_parameters()), []
        attentions, logits = [layer.self_attn for layer in model.layers], model(ids).detach()

        def wrap(attention, kind=kind, made=made, inside=inside):
            if not isinstance(attention, Attention) and not any(attention is wrapper for wrapper in made):
                raise Wrong("another_module", f"wrap was given {describe(attention)}; it is for a layer's self_attn.")
            inside.append(attention), made.append(kind(attention))
            return made[-1]

        try:
            result = answer(model, wrap)
        except Wrong as wrong:
            if wrong.args[1].startswith("it returned nothing"):
                raise Wrong("not_returned", "it returns nothing: end with `return model`.") from None
            raise
        yield said(
            result is model, "not_returned", "it returns something else than the model it was given; return model."
        )
        found = [layer.self_attn for layer in model.layers]
        at = [i for i, attention in enumerate(found) if any(attention is wrapper for wrapper in made)]
        why = f"only the layers {at} of {L} have a wrapper for their self_attn." if at else f"{ATTACH[9].sentence}."
        yield said(len(at), "not_every_layer" if at else "never_stored", why)
        yield said(len(set(map(id, found))), "shared", f"{ATTACH[8].sentence}.")
        twice = any(attention is wrapper for attention in inside for wrapper in made) or len(inside) > L
        yield said(twice, "wrapped_twice", "an attention is wrapped twice.")
        own = [getattr(new, "base", None) is old for new, old in zip(found, attentions)]
        yield said(sum(own), "another_attention", "a wrapper stands around another attention than its own layer's.")
        training = [name for name, p in names.items() if p.requires_grad]
        why = f"of the base these still train: {', '.join(training[:3])}{' …' * (len(training) > 3)}; freeze all of it."
        yield said(len(training), "base_trains", why)
        frozen_own = [
            p for wrapper in made for n, p in wrapper.named_parameters() if "base." not in n and not p.requires_grad
        ]
        yield said(len(frozen_own), "frozen_after", f"{ATTACH[0].sentence}.")
        why = "before a step the adapted model is not the base bit for bit; wrap, and change nothing else."
        yield said(torch.equal(model(ids), logits), "not_the_base", why)
        for layer in model.layers:
            for name, p in layer.self_attn.named_parameters():
                p.data = p.data if "base." in name else draw(*p.shape)
        yield Piece("the logits with open gates (B, T, V)", model(ids))


PREFIXES = catalogue(llama_adapter, PREFIX + OF_PREFIX, wrap=prefix_of)
STARTS = catalogue(llama_adapter, START_ROWS, wrap=start_of)
SCALINGS = catalogue(llama_adapter_v2, V2 + OF_SCALED, wrap=scaled_by)
PLANTED = (*PREFIXES[: len(PREFIX)], *STARTS, SCALINGS[0], MERGES[0], NORM[0])  # each must fail a test in the models
HARMLESS = {
    "BiasTwice": ("llama",),
    "HeadsInTheWrongOrder": ("llama", "gpt2"),
}  # no bias there; nothing is repeated there

OTHERWISE = (
    "NoTanh",
    "gate_averaged",
    "opened_gates_averaged",
    "first_gate_for_all",
    "not_in_the_dtype_of_x",
)  # right there, or like another
ALIKE = tuple(row for row in PREFIX + START_ROWS + OF_PREFIX if row[0] not in OTHERWISE)
CIRCULATED = catalogue(llama_adapter, CIRCULATING + ALIKE, wrap=circulating)

EXERCISES = {
    "prefix_keys_values": Exercise(
        "prefix_keys_values(attention, prompt) -> keys (G, K, d), values (G, K, d)", right_keys_values, KEYS_VALUES,
        calls(lambda draw, K, H, G, d, D: dict(attention=attention_of(draw, H, G, d, D), prompt=draw(K, D)),
              ("the keys (G, K, d)", "the values (G, K, d)"), KEYS_SIZES),
    ),
    "gated_prefix_attention": Exercise(
        "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)", prefix_of(llama_adapter),
        PREFIXES,
        probe_prefix, {"T": "It depends on the token: is there a mask where there should be none?"},
    ),
    "initial_values": Exercise(
        "initial_values(K, D, H) -> prompt (K, D), gate (H, 1, 1)", start_of(llama_adapter),
        STARTS + catalogue(None, (), small_prompt, uniform_prompt, wrong_one_zero), probe_start,
    ),
    "moves_first": Question(
        moved("llama_adapter", prompt_length=3, steps=1),
        "At gate 0 the prompt's gradient carries the factor tanh(0) = 0, the gate's does not.",
        {frozenset(["gate", "prompt"]): "look again at what multiplies the prompt's gradient: the gate, and it is 0.",
         frozenset(["prompt"]): "the other way round: the prompt's gradient carries the gate as a factor, and it is 0.",
         frozenset(): "one of the two does move: the gate's gradient does not carry the gate."},
        ("gate", "prompt"), "Write the term as tanh(g) · z(P): what is its derivative by g at g = 0, and what by P?",
    ),
    "moves_second": Question(
        moved("llama_adapter", prompt_length=3, steps=2),
        "After one step the gate is open, and the prompt feels the loss.",
        {frozenset(["gate"]): "the gate is no longer 0: does the prompt's gradient still vanish?",
         frozenset(["prompt"]): "the gate moved in the first step; is there anything that holds it in the second?",
         frozenset(): "at least the gate moved in the first step, and what has moved counts."},
        ("gate", "prompt"), "What is the gate after the first step, and what does that make of the prompt's gradient?",
    ),
    "attach_adapters": Exercise("attach_adapters(model, wrap) -> the model", right_attach, ATTACH, probe_attach,
    changes=(0,)),
    "adaption_prompt_layer": Exercise(
        "a class: AdaptionPromptLayer(attention, prompt_length), called as layer(x, positions) -> (B, T, D)",
        circulating(llama_adapter),
        CIRCULATED, probe_circulating,
    ),
    "prefix_layer": Exercise(
        "a class: PrefixLayer(width, num_heads, prompt_length), called as layer(x) -> (B, T, D)",
        flowing(llama_adapter), FLOW,
        probe_flow,
    ),
    "scaled_linear": Exercise(
        "scaled_linear(linear, x, scale, shift) -> (B, T, out)", scaled_by(llama_adapter_v2), SCALINGS,
        calls(inputs_of_scaled, "the output (B, T, out)", SCALED_SIZES, float32=("scale", "shift"), once=("linear",)),
    ),
    "scaled_merge": Exercise(
        "scaled_merge(linear, scale, shift) -> weight (out, in), bias (out)", right_merge, MERGES,
        calls(inputs_of_merge, ("the merged weight (out, in)", "the merged bias (out)"), SCALED_SIZES, half=False,
              gradient=False),
    ),
    "trained_norm": Exercise(
        "a class: TrainedNorm(norm), a module with `active`, called as module(x) -> (B, T, D)",
        llama_adapter_v2.TrainedNorm, NORM, probe_norm,
    ),
}  # fmt: skip
