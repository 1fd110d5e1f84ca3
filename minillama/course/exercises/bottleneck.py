"""Lesson 05: bottleneck adapters, with the wrong versions that one writes easily."""

import contextlib

import torch

from ...adapters import bottleneck
from ...attention import RoPE
from ...llama import Layer, LLaMAConfig
from .catalogue import catalogue
from .judging import close, other
from .observing import Exercise, Piece, Wrong, calls, describe, fact, filled, named
from .predictions import Question, moved

OUT = "the output (B, T, D)"
TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")


def network_of(module):
    """The module's Bottleneck as a function of its input and its four tensors."""

    def bottleneck_network(x, *tensors):
        own = {name.replace("_", "."): tensor for name, tensor in zip(TENSORS, tensors)}
        empty = module.Bottleneck(x.shape[-1], len(tensors[1]), device="meta")  # so that it draws nothing
        return torch.func.functional_call(empty, own, (x,))

    return bottleneck_network


def behind(module):
    """The module's Adapted as a function of the sublayer, its input and the bottleneck."""
    return lambda sublayer, x, network: module.Adapted(sublayer, network)(x)


def beside(module):
    """The same in the parallel form."""
    return lambda sublayer, x, network, scale: module.Adapted(sublayer, network, True, scale)(x)


# ── the network ───────────────────────────────────────────────────────────────────────────────────────────────────────

BEND = "ACTIVATIONS[self.activation](narrow)"
DW, DB, UW, UB = (f"self.{part}.{tensor}.to(x.dtype)" for part in ("down", "up") for tensor in ("weight", "bias"))
FIRST, SECOND, FOUR = f"F.linear(x, {DW}, {DB})", f"F.linear(narrow, {UW}, {UB})", (DW, DB, UW, UB)
NO_CAST = "float32 weights not cast: a bfloat16 model stops here; write down_weight.to(x.dtype), and so for all four"
BIAS_CAST = "the biases not cast as the weights are: a bfloat16 model stops here; write down_bias.to(x.dtype)"
NETWORK = (  # planted
    ("NoActivation", BEND, "narrow", "no GELU between down and up: two matrices in a row are one matrix of rank m"),
    ("WrongActivation", "self.activation = activation", 'self.activation = "relu"', "ReLU for GELU"),
    ("ActivationLast", (BEND, SECOND), ("narrow", f"F.gelu({SECOND})"), "GELU behind up instead of in front of it"),
    ("NoBias", (f", {DB}", f", {UB}"), ("", ""), "biases left out: each of the two projections adds its own"),
)  # fmt: skip
ALONE = (
    ("skip_inside", SECOND, f"x + {SECOND}", "x added here already; asked is what the network adds, without the skip"),
    ("activated_twice", SECOND, f"F.gelu({SECOND})", "GELU behind up too; between down and up alone is right"),
    ("activated_first", (FIRST, BEND), (FIRST.replace("x,", "F.gelu(x),"), "narrow"),
     "GELU in front of down instead of between down and up"),
    ("activated_before_too", FIRST, FIRST.replace("x,", "F.gelu(x),"), "GELU in front of down too; behind it alone"),
    ("up_bias_forgotten", f", {UB}", "", "the up-projection's bias left out"),
    ("down_bias_forgotten", f", {DB}", "", "the down-projection's bias left out"),
    ("down_bias_twice", DB, f"2 * {DB}", "the down-projection's bias added twice"),
    ("down_bias_behind_too", BEND, f"{BEND} + {DB}", "the down-projection's bias added once more, behind GELU"),
    ("up_bias_subtracted", UB, f"-{UB}", "the up-projection's bias subtracted; add it"),
    ("biases_subtracted", (DB, UB), (f"-{DB}", f"-{UB}"), "the biases subtracted; add them"),
    ("leaky_relu_for_gelu", BEND, "F.leaky_relu(narrow)", "a leaky ReLU for GELU"),
    ("quick_gelu", BEND, "narrow * torch.sigmoid(1.702 * narrow)", "z · sigmoid(1.702 z) is near GELU; asked is GELU"),
    ("norm_in_front", FIRST, FIRST.replace("x,", "F.layer_norm(x, x.shape[-1:]),"), "a norm in front of down"),
    ("tanh_gelu", BEND, 'F.gelu(narrow, approximate="tanh")', "GELU's tanh approximation; asked is the exact one"),
    ("silu_for_gelu", BEND, "F.silu(narrow)", "SiLU for GELU, as AdapterHub's Houlsby has it; asked is GELU"),
    ("sigmoid_for_gelu", BEND, "narrow.sigmoid()", "a sigmoid for GELU: it squashes what should be bent"),
    ("tanh_for_gelu", BEND, "narrow.tanh()", "tanh for GELU: it squashes what should be bent"),
    ("softmax_for_gelu", BEND, "narrow.softmax(-1)", "a softmax for GELU: its features compete for a sum of 1"),
    ("dropout_inside", BEND, "F.dropout(F.gelu(narrow), 0.1)", "a dropout between down and up, on in eval mode too"),
    ("down_bias_behind_gelu", (f", {DB}", BEND), ("", f"F.gelu(narrow) + {DB}"),
     "the down-projection's bias added behind GELU; it stands in front of it: GELU(down x + bias)"),
    ("computed_in_float32", "narrow = F.linear(x", "x = x.float()\n        narrow = F.linear(x",
     "a bfloat16 model gets float32 back, for x or a bias stayed float32; cast all four tensors to x.dtype"),
    ("activation_by_dtype", BEND, "(F.gelu if x.dtype == torch.float32 else F.relu)(narrow)",
     "GELU in float32 and another activation in bfloat16; it is GELU in both"),
    ("weights_not_cast", FOUR, [w[:-12] for w in FOUR], NO_CAST),
    ("matrices_not_cast", (FIRST, SECOND),
     ("x @ self.down.weight.T + self.down.bias", "narrow @ self.up.weight.T + self.up.bias"), NO_CAST),
    ("biases_not_cast", (DB, UB), ("self.down.bias", "self.up.bias"), BIAS_CAST),
    ("added_biases_not_cast", (FIRST, SECOND),
     (f"x @ {DW}.T + self.down.bias", f"narrow @ {UW}.T + self.up.bias"), BIAS_CAST),
    ("cast_to_bfloat16", FOUR, [w.replace("x.", "torch.bfloat16 or x.") for w in FOUR],
     "the weights cast to bfloat16, whatever x is"),
    ("transposed_twice", DW, f"{DW}.T", "F.linear(x, W) wants W (out, in), as down_weight is: no .T"),
    ("not_transposed", FIRST, f"x @ {DW} + {DB}", "x @ W with W kept as (out, in): write x @ W.T, or F.linear(x, W)"),
    ("matrices_swapped", (FIRST, SECOND), (f"x @ {UW} + {DB}", f"narrow @ {DW} + {UB}"),
     "the two matrices swapped: up_weight in the place of down_weight's transpose, and the other way round"),
    ("reshaped", (FIRST, SECOND), (f"x @ {DW}.reshape({UW}.shape) + {DB}", f"narrow @ {UW}.reshape({DW}.shape) + {UB}"),
     "the weights reshaped, which mixes their rows; transpose them: x @ W.T, or F.linear(x, W)"),
    ("features_detached", SECOND, SECOND.replace("narrow", "narrow.detach()"),
     "the narrow features detached: down never learns"),
    ("input_detached", FIRST, FIRST.replace("x,", "x.detach(),"), "x detached: the adapters below learn too little"),
)  # fmt: skip

# ── around a sublayer ─────────────────────────────────────────────────────────────────────────────────────────────────

SUM = "return y + self.scale * self.bottleneck(x if self.parallel else y)"


def returns(*rows):
    """Rows (name, what Adapted returns instead, sentence) as edits of the module; h is the bottleneck there."""
    return tuple((name, SUM, f"h = self.bottleneck\n        return {new}", sentence) for name, new, sentence in rows)


SUBLAYER = returns(  # planted
    ("NoInnerResidual", "h(y)", "the sublayer's output replaced by the bottleneck's, without the inner skip: add both"),
    ("ReadsInput", "y + h(F.pad(x, (0, max(0, y.shape[-1] - x.shape[-1])))[..., : y.shape[-1]])",
     "the sequential bottleneck fed with the sublayer's input, as a parallel one is; it reads the sublayer's output"),
    ("AddedTwice", "y + y + h(y)", "the sublayer's output added twice, y + y + bottleneck(y); once is enough"),
    ("BottleneckDropoutInEval", "y + h(F.dropout(y, 0.1))", "dropout in front of the bottleneck in eval mode too"),
)  # fmt: skip
BY_TOKEN = "(t := torch.cat([self.base(x[:, i : i + 1]) for i in range(x.shape[1])], 1)) + "
ALONE_EACH = "the sublayer given one token at a time: attention mixes the tokens; give it x whole"
BEHIND = returns(
    ("token_by_token", f"{BY_TOKEN}h(t)", ALONE_EACH),
    ("adapted_twice", "y + h(y) + h(y + h(y))", "the bottleneck and its skip applied twice in a row; once is asked"),
    ("sublayer_twice", "(z := self.base(y)) + h(z)", "the sublayer applied to its own output; apply it once"),
    ("input_subtracted", "(z := y - x) + h(z)", "x subtracted from sublayer(x), which holds no residual to take off"),
    ("multiplied", "y * (1 + h(y))", "y multiplied by 1 + bottleneck(y); the bottleneck's output is added to y"),
    ("input_for_output", "x + h(y)", "the input added instead of the sublayer's output: return y + bottleneck(y)"),
    ("block_residual_too", "x + y + h(y)", "the block's residual added as well; the block itself adds it, outside"),
    ("in_front", "self.base(x + h(x))", "the bottleneck in front of the sublayer; it stands behind it"),
    ("in_front_alone", "self.base(h(x))", "the bottleneck in front of the sublayer, without a skip; it is y + h(y)"),
    ("bottleneck_alone", "h(x)", "the sublayer left out: bottleneck(x) alone"),
    ("reads_the_sum", "y + h(x + y)", "the bottleneck fed with x + y; it reads y, before the residual is added"),
    ("sublayer_forgotten", "x + h(x)", "the sublayer left out: the bottleneck reads sublayer(x), and is added to it"),
    ("subtracted", "y - h(y)", "the bottleneck's output subtracted; it is added"),
    ("bottleneck_detached", "y + h(y).detach()", "the bottleneck's output detached from the graph: it never learns"),
    ("its_input_detached", "y + h(y.detach())", "y detached in front of the bottleneck: those below learn too little"),
    ("sublayer_detached", "y.detach() + h(y.detach())",
     "x or sublayer(x) detached: the adapters below never learn; what is frozen needs its graph all the same"),
    ("no_bottleneck", "y", "the sublayer alone: the bottleneck's output is not added"),
)  # fmt: skip
BESIDE = returns(
    ("parallel_token_by_token", f"{BY_TOKEN}self.scale * h(x)", ALONE_EACH),
    ("scale_twice", "y + self.scale * h(self.scale * x)", "the scale on the bottleneck's input too"),
    ("parallel_multiplied", "y * (1 + self.scale * h(x))", "sublayer(x) multiplied; the bottleneck's output is added"),
    ("parallel_reads_output", "y + self.scale * h(y)", "the sequential form; beside the sublayer, it reads x"),
    ("scale_forgotten", "y + h(x)", "the scale left out"),
    ("scale_on_the_sum", "self.scale * (y + h(x))", "the scale on the whole sum, not on what is added"),
    ("scale_on_the_sublayer", "self.scale * y + h(x)", "the scale on the sublayer's output, not the bottleneck's"),
    ("scale_inside", "y + h(self.scale * x)",
     "the scale on the bottleneck's input; behind GELU and biases that is another function: multiply its output"),
    ("parallel_with_skip", "y + self.scale * h(x) + x", "an inner skip in the parallel form; the block itself adds x"),
    ("divided_by_the_scale", "y + h(x) / self.scale", "divided by the scale instead of multiplied"),
    ("scale_written_as_a_number", "y + 4.0 * h(x)", "4 written for the scale, which is given: multiply by `scale`"),
    ("scale_plus_one", "y + (1 + self.scale) * h(x)", "1 + scale for the scale: it is itself the factor"),
    ("scale_subtracted", "y - self.scale * h(x)", "the bottleneck's output subtracted; it is added"),
    ("sequential_without_scale", "y + h(y)", "the sequential form, and no scale; here the bottleneck reads x"),
    ("input_for_sublayer", "x + self.scale * h(x)", "x in the place of sublayer(x), so that the sublayer is left out"),
    ("parallel_alone", "self.scale * h(x)", "the sublayer left out: the scaled output is added to sublayer(x)"),
    ("parallel_in_front", "self.base(x + self.scale * h(x))", "the bottleneck in front of the sublayer, which reads x"),
    ("parallel_detached", "y + self.scale * h(x.detach())", "x detached: the adapters below learn too little"),
    ("parallel_cut", "y + self.scale * h(x).detach()", "the bottleneck's output detached: it never learns"),
    ("sublayer_cut", "y.detach() + self.scale * h(x)", "sublayer(x) detached: its graph is needed, frozen or not"),
)  # fmt: skip

# ── what an answer is the sum of ──────────────────────────────────────────────────────────────────────────────────────


def as_sum(value, terms, needed, right=None):
    """A fact: of which terms {name: tensor} an answer is the sum, to be held against the factors needed; those are
    given where it is no sum of them, for the usual probe to judge."""
    terms = {name: term for name, term in terms.items() if term.any()}
    found = {name: float(n) for name, n in needed.items()}
    columns = torch.stack([term.detach().double().flatten() for term in terms.values()], 1)
    value = value.detach().double().flatten() if isinstance(value, torch.Tensor) else torch.zeros(0)
    if len(value) == len(columns) and not (right is not None and torch.allclose(value, right.flatten(), 1e-3, 1e-4)):
        solved = torch.linalg.lstsq(columns, value[:, None]).solution[:, 0]
        if (columns @ solved - value).abs().max() < 1e-4 * value.abs().max() + 1e-9:
            found = dict(zip(terms, solved.round(decimals=2).tolist()))
    parts = [name if f == 1 else f"{f:g} · {name}" for name, f in found.items() if f]
    why = f"what it returns is {' + '.join(parts) or '0'}: hold that against the equation, term by term."
    found = [found.get(name, 0.0) + 0.0 for name in (*needed, *(term for term in terms if term not in needed))]
    return fact(torch.tensor(found), "sum", why, "the factors of its terms")


def around(inputs, sizes, once, terms, needed, right):
    """The usual probe of what surrounds bottlenecks, behind a look at the terms of the sum."""
    usual = calls(inputs, OUT, sizes, float32=("bottleneck", "first", "second"), once=once)

    def probe(answer, draw):
        given = inputs(draw, **sizes[0])
        wanted = right(*given.values()).detach().double()
        with outputs(given, [name for name in (*once, "first", "second") if name.partition(".")[0] in given]) as seen:
            out = answer(*given.values())
        yield as_sum(out, terms(given, seen), {name: given.get(n, n) for name, n in needed.items()}, wanted)
        so_far = isinstance(out, torch.Tensor) and close(out.detach().double(), wanted)
        for name in [name for name in ("x", "scale") if name in given]:
            again = so_far and torch.equal(out, answer(*(given | {name: other(given[name])}).values()))
            yield fact(again, "kept", f"called again with another {name}, it returns the same: something is kept.")
        yield from usual(answer, draw)

    probe.inputs = usual.inputs
    return probe


@contextlib.contextmanager
def outputs(given, names):
    """Within the block: what the modules of these names first return, less what those return that run within them."""
    seen, running, within, hooks = {}, [], {}, []

    def keep(name, out):
        running.remove(name)
        within.update({outer: within.get(outer, 0) + out for outer in running})
        seen.setdefault(name, out - within.pop(name, 0))

    for name in names:
        first, _, rest = name.partition(".")
        module = given[first].get_submodule(rest)
        hooks.append(module.register_forward_pre_hook(lambda module, read, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda module, read, out, name=name: keep(name, out)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def terms_of_sublayer(given, seen):
    sublayer, x, h = (given[name] for name in ("sublayer", "x", "bottleneck"))
    y = sublayer(x)
    return {"x": x, "sublayer(x)": y, "bottleneck(sublayer(x))": h(y), "bottleneck(x)": h(x),
            "bottleneck(x + sublayer(x))": h(x + y), "sublayer(bottleneck(x))": sublayer(h(x)),
            "sublayer(x + bottleneck(x))": sublayer(x + h(x)),
            "bottleneck(bottleneck(sublayer(x)))": h(h(y)), "1": torch.ones_like(x)}  # fmt: skip


def terms_of_layer(given, seen):
    """What the layer's parts returned when they were called."""
    x = given["x"]
    parts = {f"the output of {name.rpartition('.')[2]}": z for name, z in seen.items() if z.shape == x.shape}
    return {"x": x} | parts


# ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def right_start(D, m):
    return torch.randn(m, D) / D**0.5, torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


DRAWN = "torch.randn(m, D) / D**0.5"
START = catalogue(right_start, (
    ("UpNotZero", "torch.zeros(D, m)", "0.02 * torch.randn(D, m)",
     "the up-projection drawn near zero instead of zeroed: the model starts near the base and not as the base"),
    ("AllZero", DRAWN, "torch.zeros(m, D)", "both matrices at 0: then the features are 0 and so is the way back to "
     "them, and only the last bias ever learns; draw down at random"),
    ("as_linear_draws_them", ("torch.zeros(m)", "torch.zeros(D, m)", "torch.zeros(D)"),
     ("torch.ones(m)", "torch.ones(D, m)", "torch.ones(D)"),
     "nothing zeroed, two nn.Linear as they come: another model"),
    ("up_bias_kept", "torch.zeros(D)", "torch.ones(D)", "up's weight at 0, its bias not: every token gets it"),
    ("down_bias_kept", "torch.zeros(m)", "torch.ones(m)", "down's bias not at 0: the identity still, but asked is 0"),
    ("down_zero", (DRAWN, "torch.zeros(D, m)"), ("torch.zeros(m, D)", "torch.ones(D, m)"), "down at 0 and up not, the "
     "wrong way round: the identity, but it learns by GELU's slope at 0 alone; with ReLU only the last bias learns"),
    ("units_alike", DRAWN, "torch.full((m, D), 0.01)",
     "some units of down are the same: they get the same gradient for ever and stay the same; draw each at random"),
    ("unit_at_zero", DRAWN, f"{DRAWN} * (torch.arange(m) > 0)[:, None] if m > 1 else {DRAWN}", "some units of down, "
     "rows of its weight, are 0: what they feed up stays 0 and they never learn; draw each at random"),
    ("low_rank", DRAWN, "torch.randn(m, 1) * torch.randn(1, D) / D**0.5", "the units of down are multiples or sums of "
     "a few of them, which so read much the same; draw each number by itself"),
    ("features_alike", DRAWN, "(torch.randn(m, 1) / D**0.5).expand(m, D)", "one number for all features of a unit, "
     "which so reads their sum alone; draw each by itself"),
    ("mostly_zero", DRAWN, "torch.eye(m, D)", "most of down's numbers are 0: draw each of them at random"),
    ("not_centred", DRAWN, "0.1 * torch.rand(m, D)", "down's numbers are not centred on 0, so that every unit reads "
     "much the same sum; draw them on both sides of 0, with torch.randn"),
    ("down_too_large", DRAWN, "torch.randn(m, D)", "down's deviation is above 0.1: N(0, 1) makes features √D times as "
     "large as what goes in; 0.01 or 1/√D is what one takes"),
    ("down_too_small", DRAWN, "1e-6 * torch.randn(m, D)", "down's deviation is below 0.001: its features vanish, and "
     "with them up's gradient; 0.01 or 1/√D is what one takes"),
    ("shapes_swapped", ("torch.randn(m, D)", "torch.zeros(D, m)"), ("torch.randn(D, m)", "torch.zeros(m, D)"),
     "the matrices in the shape (in, out); nn.Linear and F.linear keep them as (out, in): down (m, D), up (D, m)"),
))  # fmt: skip
WHY = {mistake.name: f"{mistake.sentence}." for mistake in START}
ZEROED, DREW = "self.up.weight.zero_()", ", nn.init.normal_(self.up.weight, std=0.02)"
PLANTED_START = (("UpNotZero", ZEROED, ZEROED + DREW, WHY["UpNotZero"]),
                 ("AllZero", ZEROED, f"{ZEROED}, self.down.weight.zero_()", WHY["AllZero"]))  # fmt: skip


def places_of(tensor):
    """Where each number of a float32 tensor lies in memory."""
    memory = tensor.untyped_storage()
    cells = torch.arange(memory.nbytes() // 4).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return memory.data_ptr() // 4 + cells.flatten()


def probe_start(answer, draw):
    for D, m in ((240, 12), (400, 100), (300, 1)):
        shapes, result = ((m, D), (m,), (D, m), (D,)), answer(D, m)
        if not isinstance(result, tuple | list) or len(result) != 4:
            raise Wrong("form", f"needed are four tensors, {', '.join(TENSORS)}; it returned {describe(result)}.")
        found, again = named(TENSORS, result), answer(D, m)
        for name, value in found:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                raise Wrong("start_dtype", f"{name} should be a float32 tensor; it is {describe(value)}.")
        for (name, value), shape in zip(found, shapes):
            if value.shape != shape:
                got = [tuple(tensor.shape) for _, tensor in found]
                turned = got == [(D, m), (m,), (m, D), (D,)]
                needed = WHY["shapes_swapped"] if turned else f"needed is {shape} for D = {D} and m = {m}."
                order = " The shapes are right and their order is not." * (sorted(got) == sorted(shapes) and not turned)
                mistake = "shapes_swapped" if turned else "order" if order else "shapes"
                raise Wrong(mistake, f"{name} has shape {tuple(value.shape)}; {needed}{order}")
            if not value.isfinite().all():
                raise Wrong("not_finite", f"{name} holds NaN or infinity: torch.empty holds anything; fill it.")
            if isinstance(value, torch.nn.Parameter) and not value.requires_grad:
                raise Wrong("frozen", f"{name} is a parameter with requires_grad=False: it never learns.")
        places = torch.cat([places_of(value) for value in (*result, *again)])
        why = "numbers that share memory, by a view, an `expand` or from call to call, train as one; make new ones."
        yield fact(len(places.unique()) < len(places), "shared", why)
        zero = [not value.any() for _, value in found]  # needed: only down's weight is not
        name = ("AllZero" if all(zero) else "mostly_zero" if zero[0] and zero[2] else "down_zero" if zero[0]
                else "as_linear_draws_them" if not any(zero[1:]) else "UpNotZero" if not zero[2]
                else "down_bias_kept" if zero[3] else "up_bias_kept")  # fmt: skip
        yield fact(torch.tensor(zero), name, WHY[name], "which of the four are 0")
        down = found[0][1].detach().double()
        zeros, size = (down == 0).double().mean() > 0.5, down.std()
        rank = torch.linalg.matrix_rank(down, rtol=1e-5)
        for name, wrong in (
            ("unit_at_zero", (down == 0).all(1).any()), ("units_alike", len(down.unique(dim=0)) < m),
            ("mostly_zero", zeros), ("features_alike", (down == down[:, :1]).all()), ("low_rank", rank < m),
            ("not_centred", abs(down.mean()) > 0.4 * size),
            ("down_too_large", not size < 0.115), ("down_too_small", not size > 0.0008),
        ):  # fmt: skip
            yield fact(wrong, name, WHY[name])


# ── in a block ────────────────────────────────────────────────────────────────────────────────────────────────────────


def right_layer(layer, x, positions, first, second):
    a = layer.input_layernorm(x)
    y = layer.self_attn(a, positions)
    h = x + y + first(y)
    b = layer.post_attention_layernorm(h)
    z = layer.mlp(b)
    return h + z + second(z)


NORM_A, NORM_B, AND = "layer.input_layernorm(x)", "layer.post_attention_layernorm(h)", "\n    "
ONE, TWO = "x + y + first(y)", "h + z + second(z)"
LAYER = catalogue(right_layer, (
    ("attach_to_mlp_only", ONE, "x + y", "a bottleneck behind the feed-forward alone; attention has one too"),
    ("attention_only", TWO, "h + z", "a bottleneck behind attention alone; the feed-forward has one too"),
    ("behind_the_residual", (ONE, TWO), ("x + y + first(x + y)", "h + z + second(h + z)"), "the bottlenecks behind the "
     "residual sum: each reads the whole stream instead of its sublayer's output; adapt the output before it is added"),
    ("first_reads_the_sum", ONE, "x + y + first(x + y)", "first reads x plus self_attn's output, not that alone"),
    ("second_reads_the_sum", TWO, "h + z + second(h + z)", "second reads the stream too, not mlp's output alone"),
    ("in_front_of_the_sublayers", (NORM_A, ONE, NORM_B, TWO), (f"{NORM_A}{AND}a = a + first(a)", "x + y",
     f"{NORM_B}{AND}b = b + second(b)", "h + z"),
     "the bottlenecks in front of their sublayers, on the norm's output; they stand behind"),
    ("beside_the_sublayers", ("first(y)", "second(z)"), ("first(a)", "second(b)"),
     "the parallel form: the bottlenecks read what their sublayers read; the sequential ones read what they return"),
    ("first_reads_the_norm", "first(y)", "first(a)", "first reads the norm's output; it reads self_attn's"),
    ("second_reads_the_norm", "second(z)", "second(b)", "second reads the norm's output; it reads that of mlp"),
    ("bottlenecks_swapped", ("first(y)", "second(z)"), ("second(y)", "first(z)"),
     "the two bottlenecks swapped: the first stands behind attention, the second behind the feed-forward"),
    ("first_used_twice", "second(z)", "first(z)", "the first bottleneck used for the feed-forward too: that is second"),
    ("second_used_twice", "first(y)", "second(y)", "the second bottleneck used for attention too: that is first"),
    ("second_reads_the_stream", "second(z)", "second(h)", "second reads the stream; it reads mlp's output"),
    ("first_reads_the_stream", "first(y)", "first(x)", "first reads x; it reads self_attn's output"),
    ("second_reads_attention", "second(z)", "second(y)", "second reads self_attn's output; it reads that of mlp"),
    ("residuals_replaced", (ONE, TWO), ("x + first(y)", "h + second(z)"),
     "the inner skips left out: what the sublayers return is lost, and only the bottlenecks' outputs reach the stream"),
    ("first_skip_left_out", ONE, "x + first(y)", "no inner skip around first: add self_attn's output too"),
    ("second_skip_left_out", TWO, "h + second(z)", "no inner skip around second: add mlp's output too"),
    ("no_residual", (ONE, TWO), ("y + first(y)", "z + second(z)"), "the block's own residuals left out: add x, and the "
     "sum behind attention, back around the two sublayers"),
    ("first_residual_left_out", ONE, "y + first(y)", "the residual around attention left out"),
    ("last_residual_left_out", TWO, "z + second(z)", "the residual around the feed-forward left out"),
    ("attention_not_passed_on", TWO, "x + z + second(z)", "what attention adds not passed on to the second residual"),
    ("forward_before_first", NORM_B, "layer.post_attention_layernorm(x + y)",
     "the feed-forward fed with the stream as it was before the first bottleneck's output joined it"),
    ("beside_each_other", NORM_B, "layer.post_attention_layernorm(x)", "attention and mlp both fed with x; the "
     "feed-forward reads the sum of x, attention and the first bottleneck"),
    ("forward_reads_attention", NORM_B, "layer.post_attention_layernorm(y + first(y))", "the feed-forward fed with "
     "attention's adapted output alone; it reads the norm of the sum with x"),
    ("both_at_the_end", (ONE, TWO), ("x + y", "h + z + first(z) + second(z)"),
     "both bottlenecks behind the feed-forward; the first reads what attention returns and is added there"),
    ("norms_forgotten", (NORM_A, NORM_B), ("x", "h"), "the norms in front of the sublayers left out"),
    ("first_norm_forgotten", NORM_A, "x", "attention's norm left out: self_attn reads input_layernorm(x)"),
    ("second_norm_forgotten", NORM_B, "h", "the feed-forward's norm left out: mlp reads post_attention_layernorm"),
    ("norms_swapped", (NORM_A, NORM_B), ("layer.post_attention_layernorm(x)", "layer.input_layernorm(h)"),
     "the two norms swapped: input_layernorm stands in front of attention, post_attention_layernorm in front of mlp"),
    ("first_norm_twice", NORM_B, "layer.input_layernorm(h)", "attention's norm used for mlp too, which has its own"),
    ("norms_behind", (NORM_A, ONE, NORM_B, "layer.mlp(b)"), ("x", f"0{AND}y = layer.input_layernorm(y){AND}h = {ONE}",
     "h", "layer.post_attention_layernorm(layer.mlp(b))"), "the norms behind the sublayers instead of in front"),
    ("residual_from_the_norm", (ONE, TWO), ("a + y + first(y)", "b + z + second(z)"),
     "the residuals taken from what the norms return; what is added back is the stream in front of the norm"),
    ("stream_normed", NORM_A, f"{NORM_A}{AND}x = a", "x overwritten by its norm: the residual adds x itself"),
    ("forward_first", (NORM_A, "layer.self_attn(a, positions)", NORM_B, "layer.mlp(b)"),
     ("layer.post_attention_layernorm(x)", "layer.mlp(a)", "layer.input_layernorm(h)", "layer.self_attn(b, positions)"),
     "the feed-forward in front of attention"),
    ("positions_forgotten", "(a, positions)", "(a, None)", "positions not given to self_attn: nothing is rotated"),
    ("positions_counted", "(a, positions)", "(a, torch.arange(x.shape[1]))", "positions counted from 0 to T − 1; those "
     "that are given may have gaps: pass `positions` on"),
    ("first_detached", "first(y)", "first(y).detach()", "the first bottleneck's output detached: it never learns"),
    ("second_detached", "second(z)", "second(z).detach()", "the second bottleneck's output detached: it never learns"),
    ("forward_and_its_bottleneck_first", (NORM_A, "layer.self_attn(a, positions)", ONE, NORM_B, "layer.mlp(b)", TWO),
     ("layer.post_attention_layernorm(x)", "layer.mlp(a)", "x + y + second(y)", "layer.input_layernorm(h)",
      "layer.self_attn(b, positions)", "h + z + first(z)"), "the feed-forward in front of attention"),
    ("norms_behind_the_sums", (NORM_A, ONE, NORM_B, TWO), ("x", f"layer.input_layernorm({ONE})", "h",
     f"layer.post_attention_layernorm({TWO})"), "the norms behind the residual sums, as in BERT"),
    ("on_top_of_the_layer", (ONE, TWO), ("x + y", "h + z + first(h + z) + second(h + z)"),
     "both bottlenecks on top of the whole layer; each reads its own sublayer's output, before the residual is added"),
    ("in_sequence", (ONE, TWO), ("x + y", "h + z + first(z) + second(z + first(z))"),
     "both bottlenecks in a row behind the feed-forward; first stands behind attention"),
    ("one_token_each", "layer.self_attn(a, positions)",
     "torch.cat([layer.self_attn(a[:, i:][:, :1], positions[i:][:1]) for i in range(len(positions))], 1)",
     "attention given one token at a time, so that no token sees another; give it all tokens at once"),
    ("not_adapted", (ONE, TWO), ("x + y", "h + z"), "the layer as it is, without its bottlenecks"),
))  # fmt: skip

# ── how many ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parameters(D, m, L, places):
    return L * places * (2 * m * D + D + m)


PARAMETERS = catalogue(parameters, (
    ("no_biases", " + D + m", "", "the biases not counted: m for down and D for up"),
    ("one_bias", "+ D + m", "+ D", "one of the two biases not counted: down has m, up has D"),
    ("down_bias_alone", "+ D + m", "+ m", "up's bias not counted, D numbers; down has one of m, up one of D"),
    ("biases_swapped", "+ D + m", "+ 2 * m", "2·m for the biases; down's has m numbers and up's has D"),
    ("biases_of_width", "+ D + m", "+ 2 * D", "2·D for the biases; down's has m numbers and up's has D"),
    ("biases_twice", "(2 * m * D + D + m)", "2 * (m * D + D + m)", "the biases counted twice; each is there once"),
    ("biases_once", "(2 * m * D + D + m)", "2 * m * D + D + m", "the biases counted once for all bottlenecks"),
    ("one_matrix", "2 * m * D", "m * D", "one matrix counted; there are two, down and up"),
    ("up_of_size", "2 * m * D", "m * D + m * m", "m·m for up's matrix; it is (D, m), m·D numbers"),
    ("size_as_reduction", "return", "m = D // m\n    return", "m taken for a reduction; it is the size itself"),
    ("layers_to_the_power", "L * places", "L**places", "L to the power of places; there are L · places bottlenecks"),
    ("squares", "2 * m * D", "2 * D * D", "D·D for a matrix; down is (m, D) and up (D, m), m·D numbers each"),
    ("one_place", "L * places", "L", "one bottleneck a layer counted, whatever `places` says"),
    ("two_places", "places * (", "2 * (", "two places a layer counted, whatever `places` says"),
    ("one_layer", "L * places", "places", "one layer counted; there are L"),
    ("one_bottleneck", "L * places * ", "", "one bottleneck counted; there are `places` in each of L layers"),
    ("places_added", "L * places", "(L + places)", "L + places bottlenecks counted; there are L · places"),
))  # fmt: skip


def probe_parameters(answer, draw):
    sizes = torch.randint(2, 10, (40, 4), generator=torch.Generator().manual_seed(0))
    D, m, L, places = sizes.double().T
    terms = {"m·D": m * D, "D": D, "m": m, "1": D * 0 + 1, "D·D": D * D}
    often = {"L·places·": L * places, "L·": L, "places·": places, "": D * 0 + 1, "places·places·": places**2}
    terms = {f"{times}{name}": n * term for times, n in often.items() for name, term in terms.items()}
    found = torch.stack([answer(*size) for size in sizes.tolist()])
    yield as_sum(found, terms, {"L·places·m·D": 2, "L·places·D": 1, "L·places·m": 1})
    for i, size in enumerate(((14, 3, 4, 2), (768, 64, 12, 1), (6, 6, 1, 3), (3, 8, 40, 2), (5, 1, 1, 1))):
        where = f"for D = {size[0]}, m = {size[1]}, L = {size[2]}, places = {size[3]}"
        yield Piece("the number at other sizes" if i else f"the number {where}", answer(*size), where if i else "")


# ── the exercises ─────────────────────────────────────────────────────────────────────────────────────────────────────


def network(draw, D, m):
    return filled(bottleneck.Bottleneck(D, m), draw).requires_grad_(True)


def inputs_of_network(draw, B, T, D, m):
    return dict(zip(("x", *TENSORS), (draw(B, T, D), 1.5 * draw(m, D) / D**0.5, draw(m), draw(D, m), draw(D))))


class Mixing(torch.nn.Linear):
    """A sublayer in which a token sees those before it, by their mean."""

    def forward(self, x):
        return super().forward(x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None])


def inputs_of_sublayer(draw, B, T, D, m, **scale):
    sublayer = filled(Mixing(D, D), draw)
    return dict(sublayer=sublayer, x=draw(B, T, D), bottleneck=network(draw, D, m), **scale)


def inputs_of_layer(draw, positions, B, D, H, G):
    config = LLaMAConfig(16, D, 40, 1, H, G, rms_norm_eps=0.01, attention_bias=True, mlp_bias=True)
    layer, x = filled(Layer(config, RoPE(D // H)), draw), draw(B, len(positions), D)
    given = dict(layer=layer, x=x, positions=torch.tensor(positions))
    return dict(given, first=network(draw, D, H - 1), second=network(draw, D, H + 1))


SIZES = (dict(B=2, T=5, D=10, m=4), dict(B=3, T=2, D=6, m=6), dict(B=1, T=1, D=5, m=1))
SCALED = [dict(size, scale=scale) for size, scale in zip(SIZES, (5.5, -1.5, 0.0))]
LAYERS = (dict(positions=[3, 4, 6, 9, 14], B=2, D=24, H=4, G=2), dict(positions=[0, 5], B=3, D=12, H=3, G=3),
          dict(positions=[7], B=1, D=16, H=2, G=1))  # fmt: skip
DOWN, UP = frozenset(["down.weight", "down.bias"]), frozenset(["up.weight", "up.bias"])
FOUR_NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def only(*names):
    return frozenset(names)


def learned(steps, prepare=None):
    """Which of a fresh adapter's tensors have moved after so many steps of gradient descent."""
    return moved("bottleneck", steps, prepare, lambda name: ".".join(name.split(".")[-2:]), size=3)


PLANTED = (
    *catalogue(bottleneck, NETWORK, wrap=network_of), *catalogue(bottleneck, PLANTED_START),
    *catalogue(bottleneck, SUBLAYER, wrap=behind),
    *catalogue(bottleneck, [("attach_to_mlp_only", '("o_proj", "down_proj")', '("down_proj",)', LAYER[0].sentence)]),
)  # fmt: skip
HARMLESS = {}

EXERCISES = {
    "bottleneck_network": Exercise(
        "bottleneck_network(x, down_weight, down_bias, up_weight, up_bias) -> (B, T, D)", network_of(bottleneck),
        catalogue(bottleneck, NETWORK + ALONE, wrap=network_of), calls(inputs_of_network, OUT, SIZES, float32=TENSORS),
    ),
    "bottleneck_start": Exercise(
        "bottleneck_start(D, m) -> down_weight (m, D), down_bias (m), up_weight (D, m), up_bias (D)", right_start,
        START, probe_start,
    ),
    "bottleneck_moves_first": Question(
        learned(1),
        "The loss reaches down through up, and up is 0: the gradient of all that lies before it carries that factor.",
        {UP | DOWN: "look again at what the gradient of down passes on its way: up's weight, and it is 0.",
         DOWN: "the other way round: what lies behind the zero feels the loss, what lies before it does not.",
         only(): "the loss is not 0, and up's bias is added to the output: is there anything between the two?",
         only("up.bias"): "up's weight gets the loss's gradient times the narrow features: are these 0?",
         only("up.weight"): "nearly: is there anything that stands between up's bias and the loss?",
         only("up.weight", "down.weight"): "down's gradient passes up's weight, which is 0; and what of the biases?"},
        FOUR_NAMES, "For each of the four, walk back to it from the loss: which matrices do you pass? Is one 0?",
    ),
    "bottleneck_moves_second": Question(
        learned(2), "After one step up is no longer 0, and down feels the loss.",
        {UP: "up is no longer 0: does down's gradient still vanish?",
         DOWN: "what moved at the first step has moved: up's two tensors too.",
         UP | {"down.weight"}: "down's bias stands where down's weight does: what holds for the one?"},
        FOUR_NAMES, "What is up after the first step, and which gradients have it as a factor?",
    ),
    "bottleneck_all_zero": Question(
        learned(20, lambda own: [p.zero_() for p in own.values()]),
        "The features are GELU(0) = 0, so up's weight gets no gradient; up stays 0, so down gets none either. "
        "What is left adds one fixed vector to every token.",
        {UP: "up's weight gets the loss's gradient times the features: what are they when down is 0?",
         UP | DOWN: "down's gradient has up's weight as a factor, which starts at 0: does it ever leave it?",
         DOWN | {"up.bias"}: "down's gradient has up's weight as a factor, which starts at 0: does it ever leave it?",
         DOWN: "down's gradient has up's weight as a factor, which starts at 0: does it ever leave it?",
         only("up.weight"): "up's weight gets the loss's gradient times the features: what are they when down is 0?",
         only(): "one of the four reaches the loss without passing a zero.",
         only("up.bias", "down.bias"): "down's bias reaches the loss through up's weight: does that leave 0?"},
        FOUR_NAMES, "Two products keep each other at 0. Which of the four is a factor of neither?",
    ),
    "adapted_sublayer": Exercise(
        "adapted_sublayer(sublayer, x, bottleneck) -> (B, T, D)", behind(bottleneck),
        catalogue(bottleneck, SUBLAYER + BEHIND, wrap=behind),
        around(inputs_of_sublayer, SIZES, ("sublayer",), terms_of_sublayer,
               {"sublayer(x)": 1, "bottleneck(sublayer(x))": 1}, behind(bottleneck)),
    ),
    "parallel_sublayer": Exercise(
        "parallel_sublayer(sublayer, x, bottleneck, scale) -> (B, T, D)", beside(bottleneck),
        catalogue(bottleneck, BESIDE, wrap=beside),
        around(inputs_of_sublayer, SCALED, ("sublayer",), terms_of_sublayer,
               {"sublayer(x)": 1, "bottleneck(x)": "scale"}, beside(bottleneck)),
    ),
    "houlsby_layer": Exercise(
        "houlsby_layer(layer, x, positions, first, second) -> (B, T, D)", right_layer, LAYER,
        around(inputs_of_layer, LAYERS, ("layer.self_attn", "layer.mlp"), terms_of_layer,
               dict.fromkeys(("x", *(f"the output of {name}" for name in ("self_attn", "first", "mlp", "second"))), 1),
               right_layer),
    ),
    "bottleneck_parameters": Exercise(
        "bottleneck_parameters(D, m, L, places) -> a whole number", parameters, PARAMETERS, probe_parameters,
    ),
}  # fmt: skip
