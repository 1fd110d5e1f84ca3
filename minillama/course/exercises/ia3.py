"""Lesson 04: IA3, with the wrong versions that one writes easily."""

import copy
import functools
import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters import ia3
from ...attention import RoPE, rotate
from ...gpt2 import GPT2, GPT2Config
from ...llama import Layer, LLaMA, LLaMAConfig
from .catalogue import catalogue
from .observing import Exercise, Wrong, called, calls, describe, fact, filled, in_bfloat16
from .predictions import Question

# ── the module itself, whose mistakes are planted in the models too ───────────────────────────────────────────────────


def linear_of(module):
    """The module's IA3Linear as a function of the projection, the input, the vector and the side."""
    run = torch.func.functional_call
    return lambda linear, x, scale, side: run(module.IA3Linear(linear, side), {"scale": scale}, (x,))


def start_of(module):
    return lambda linear, side: module.IA3Linear(linear, side).scale.detach()


def merge_of(module):
    def ia3_merge(linear, scale, side):
        wrapper = module.IA3Linear(linear, side)
        wrapper.scale.data = scale
        return wrapper.weight.detach(), wrapper.bias.detach()

    return ia3_merge


ONE_PLUS = "1 + l instead of l, from l = 0; IA3's vector is itself the factor and starts at 1"
NO_BIAS = "l · (W x) + b: the bias left out of the scaling; l multiplies all that leaves the projection, l · (W x + b)"
SQUASHED = "the vector squashed before it multiplies; it is a plain factor, which may grow beyond 2 or fall below 0"
AT_DOWN = "l_ff on the output of down_proj instead of its input; it multiplies the features before they are mixed"
AT_CURVE = "l_ff before the non-linearity (on LLaMA: on the branch that has it); it multiplies what is behind it"
AT_Q = "queries scaled where keys should be; with RoPE between projection and score the two differ"
CASTS, SIDES = ("self.scale.to(x.dtype)", "self.scale.to(y.dtype)"), "sides = {**"
FORWARD = catalogue(ia3, (
    ("OnePlusScale", ("torch.ones(features", *CASTS), ("torch.zeros(features", f"(1 + {CASTS[0]})",
     f"(1 + {CASTS[1]})"), ONE_PLUS),
    ("BiasUnscaled", ("y = self.base(x)", f"y * {CASTS[1]}"),
     ("y, b = nn.functional.linear(x, self.base.weight), self.base" ".bias",
     f"y * {CASTS[1]} + (0 if b is None else b)"), NO_BIAS),
    ("SoftmaxScale", CASTS, [f"(2 * torch.sigmoid({cast} - 1))" for cast in CASTS], SQUASHED),
), wrap=linear_of)  # fmt: skip
ELSEWHERE = catalogue(ia3, (
    ("OutputOfDown", f"self.base(x * {CASTS[0]})", "self.base(x) * self.scale[: self.out_features].to(x.dtype)",
     AT_DOWN),
    ("attach_before_activation", SIDES, 'outputs, inputs = (*outputs, "gate_proj" if "gate_proj" in str(model) else '
     f'"up_proj"), ()\n    {SIDES}', AT_CURVE),
    ("attach_to_queries", SIDES, f'outputs = ["q_proj" if name == "k_proj" else name for name in outputs]\n    {SIDES}',
     AT_Q),
))  # fmt: skip
STARTS = catalogue(ia3, (("ZeroScale", "torch.ones(features", "torch.zeros(features", "vectors that start at 0: keys, "
    "values and hidden features all silenced; x · 1 is x, so they start at 1"),), wrap=start_of)  # fmt: skip
AXES, ROWS = '(self.scale[:, None] if self.side == "output" else self.scale)', "self.scale[:, None]"
BIAS, KEPT, LEFT = "(bias * self.scale)", 'or self.side == "input"', "return bias\n"
LENGTHS = (("output", "len(self.scale) == self.out_features"), ("input", "len(self.scale) != self.in_features"))
BY_LENGTH = "the side guessed from the vector's length, which tells nothing where in = out; `side` says it"
PARTS = (("merge_{}", (0, 1), ""), ("merge_{}_weight", (0,), " (so in the weight)"), ("merge_bias_{}", (1,),
         " (so in the bias)"))  # fmt: skip
MERGES = catalogue(ia3, (
    ("MergeForgetsBias", BIAS, "bias", "a merge that scales the weight and not the bias; l · (W x + b) has l · b in "
     "it"),
    ("MergeWrongAxis", AXES, '(self.scale.repeat(8)[: self.in_features] if self.side == "output" else self.scale[: '
     "self.out_features, None])", "a merge that scales rows for columns; a row of the weight makes an output feature "
     "(scale[:, None]), a column meets an input feature (scale)"),
    ("MergeInPlace", ("return (weight", ".to(weight.dtype)"), ("return weight.data.copy_((weight",
     ".to(weight.dtype))"), "a merge that writes into the base's own weight, which a scale of 0 destroys; make a new "
     "weight"),
    ("merge_sides_swapped", (AXES, KEPT), (AXES.replace("output", "input"), 'or self.side == "output"'),
     'the sides swapped: "output" scales rows (scale[:, None]) and the bias, "input" columns (scale) and no bias'),
    ("merge_columns_always", AXES, "self.scale", 'columns scaled on both sides; a row of the weight makes an output '
     'feature, so side "output" scales rows: scale[:, None]'),
    ("merge_rows_always", AXES, ROWS, "rows scaled on both sides; a column meets an input feature: there scale, as it "
     "is"),
    *((name.format(how), [(AXES, BIAS)[i] for i in parts],
       [(f"({form.format(AXES)})", f"(bias * {form.format('self.scale')})")[i] for i in parts], f"{why}{where}")
      for how, form, why in (
       ("one_plus", "(1 + {})", ONE_PLUS), ("divided", "(1 / {})", "divided by the vector, which undoes a merge; to "
       "merge, multiply"), ("squashed", "{}.tanh()", SQUASHED), ("cut_off", "{}.relu()", "the vector cut off at 0; a "
       "factor may fall below"), ("squared", "{}**2", "the vector multiplied in twice; once"), ("averaged",
       "{}.mean()", "one number, the vector's mean, for all features"), ("change_alone", "({} - 1)", "the change "
       "against the base alone, not what this amounts to"))
      for name, parts, where in PARTS),
    *((name, [("weight * (", BIAS)[i] for i in parts], [("weight + (", "(bias + self.scale)")[i] for i in parts],
       f"the vector added{where}; IA3 multiplies") for (name, parts, where) in (("merge_added", (0, 1), ""),
       ("merge_added_weight", (0,), " to the weight"), ("merge_bias_added", (1,), " to the bias"))),
    ("merge_added_everywhere", ("weight * (", KEPT, BIAS), ("weight + (", "", "(bias + self.scale)"), "the vector "
     "added; IA3 multiplies, and on the input side W (l · x) + b leaves the bias"),
    ("merge_difference", (AXES, BIAS, LEFT), (f"({AXES} - 1)", "(bias * (self.scale - 1))", "return 0 * bias\n"),
     "the difference to the base alone, W' − W and b' − b; asked are W' and b'"),
    ("merge_wrong_axis", AXES, '(self.scale if self.side == "output" else self.scale[:, None])', "a merge that scales "
     "rows for columns; a row of the weight makes an output feature (scale[:, None]), a column meets an input feature"),
    *((f"merge_{side}_by_length{'_and_bias' * both}", (AXES, KEPT)[: 1 + both], (f"(self.scale[:, None] if {how} else "
       "self.scale)", f"or not {how}")[: 1 + both], BY_LENGTH) for side, how in LENGTHS for both in (False, True)),
    ("merge_bias_dropped_input", LEFT, "return 0 * bias\n", "no bias on the input side; W (l · x) + b keeps its b"),
    ("merge_bias_twice", (BIAS, LEFT), ("(bias * self.scale + bias)", "return bias + bias\n"), "the base's bias added "
     "once more; it is l · b on the output side, b on the input side"),
    ("merge_bias_makes_up", LEFT, "return bias + self.base.weight @ (self.scale - 1)\n", "the bias changed on the "
     "input side; W (l · x) + b leaves it as it is"),
    ("merge_weight_kept", AXES, "(1)", "the weight left as it is; its rows are scaled too, or its columns"),
    ("merge_transposed", ".to(weight.dtype)", ".T.to(weight.dtype)", "the weight transposed, (in, out); torch's Linear "
     "keeps (out, in)"),
    ("merge_scales_both_biases", KEPT, "", "the bias scaled on the input side too; W (l · x) + b has its b outside"),
    ("merge_biases_swapped", KEPT, 'or self.side == "output"', "the bias scaled on the wrong side: l · (W x + b) holds "
     "it, W (l · x) + b does not"),
    ("merge_added_to_both_biases", (KEPT, BIAS), ("", "(bias + self.scale)"), "the vector added to the bias on both "
     "sides; l · (W x + b) multiplies it, and W (l · x) + b leaves it"),
    ("merge_bias_replaced", BIAS, "self.scale", "the vector itself for the bias; it is l · b"),
    ("merge_bias_dropped", BIAS, "(0 * bias)", "no bias on the output side; it is l · b there"),
    ("merge_rows_and_columns", AXES, "(self.scale[:, None] * self.scale)", "rows and columns both scaled; one of the "
     "two"),
    ("merge_weight_kept_input", AXES, '(self.scale[:, None] if self.side == "output" else 1)', "the weight left as it "
     "is on the input side; its columns are scaled"),
    ("merge_weight_kept_output", AXES, '(1 if self.side == "output" else self.scale)', "the weight left as it is on "
     "the output side; l · (W x + b) scales its rows and the bias"),
), wrap=merge_of)  # fmt: skip
PLANTED = FORWARD + ELSEWHERE + STARTS + MERGES[:3]  # each must fail a test where it stands in the models
HARMLESS = {"BiasUnscaled": ("llama",), "MergeForgetsBias": ("llama",), "attach_to_queries": ("gpt2",)}

# ── one projection, and a batch of several tasks ──────────────────────────────────────────────────────────────────────


def right_linear(linear, x, scale, side):
    scale = scale.to(x.dtype)
    return linear(x) * scale if side == "output" else linear(x * scale)


def right_mixed(linear, x, scales, rows, side):
    scale = scales[rows][:, None].to(x.dtype)  # (B, 1, features)
    return linear(x) * scale if side == "output" else linear(x * scale)


OUT, IN, CAST, BARE = "linear(x) * scale", "linear(x * scale)", ".to(x.dtype)", "F.linear(x, linear.weight) * scale"
PLACES = ((f"{OUT} if", ' on the side "output"'), (f"else {IN}", ' on the side "input"'))
ON_A_SIDE = (  # on both sides; the same on one of them is made of it
    ("vector_unused", "linear(x)", "linear(x)", "the projection alone: the vector multiplies nothing"),
    ("projection_left_out", "x * scale", "x * scale", "x multiplied and not projected: linear(…) is called on both "
     "sides, and the side says whether what goes in or what comes out is multiplied"),
    ("biases_dropped", BARE, "F.linear(x * scale, linear.weight)", "the projection's bias dropped; call linear(…), "
     "which adds it, not its weight alone"),
    ("bias_twice", "(linear(x) + linear.bias) * scale", f"{IN} + linear.bias", "the bias added twice: linear(…) has "
     "it"),
    ("scale_added", "linear(x) + scale", "linear(x + scale)", "the vector added; IA3 multiplies"),
    ("divided", "linear(x) / scale", "linear(x / scale)", "divided by the vector; IA3 multiplies"),
    ("change_alone", "linear(x) * (scale - 1)", f"{IN} - linear(x)", "the change against the base alone; a vector of 1 "
     "gives the base"),
    ("on_top_of_the_base", f"linear(x) + {OUT}", f"linear(x) + {IN}", "the scaled product added to the base's; it "
     "takes its place: a vector of 1 gives the base"),
    ("weight_not_transposed", "(x @ linear.weight + linear.bias) * scale", "x * scale @ linear.weight + linear.bias",
     "x @ weight; torch's Linear keeps its weight as (out, in) and computes x @ weight.T"),
    ("scaled_twice", f"{IN} * scale", f"{IN} * scale", "input and output both multiplied; the side says which of the "
     "two"),
    ("scale_squared", f"{OUT}**2", "linear(x * scale**2)", "the vector multiplied in twice; once is enough"),
    ("base_detached", "linear(x).detach() * scale", f"{IN}.detach()", "the projection under no_grad or detached: its "
     "weight is frozen, but the gradient goes through it to x and the layers below, on the input side to the vector "
     "too"),
)  # fmt: skip
SHARED = (
    ("OnePlusScale", CAST, ".add(1).to(x.dtype)", ONE_PLUS),
    ("sides_swapped", '== "output"', '== "input"', 'the sides swapped: "output" multiplies what comes out of the '
     'projection, "input" what goes into it'),
    ("always_the_input", PLACES[0][0], f"{IN} if", 'what goes in multiplied on both sides; with side "output" it is '
     'what ' "comes out of the projection that is multiplied"),
    ("always_the_output", PLACES[1][0], f"else {OUT}", 'what comes out multiplied on both sides; with side "input" it '
     'is ' "what goes into the projection that is multiplied"),
    ("as_a_column", CAST, ".to(x.dtype)[..., None]", "a column, which meets the tokens; a vector meets the last axis "
     "as it is"),
    ("output_by_length", 'side == "output"', "scale.shape[-1] == linear.out_features", BY_LENGTH),
    ("input_by_length", 'side == "output"', "scale.shape[-1] != linear.in_features", BY_LENGTH),
    ("activated", PLACES[1][0], "else linear(F.gelu(x) * scale)", "a non-linearity in front of the vector; what comes "
     "as x is behind it already"),
    *((name, [old for old, _ in PLACES], (f"{out} if", f"else {into}"), why) for name, out, into, why in ON_A_SIDE),
    *((f"{name}_{side}", old, f"{out} if" if side == "output" else f"else {into}", f"{why} (so{where})") for name, out,
     into, why in ON_A_SIDE for (old, where), side in zip(PLACES, ia3.SIDES)),
    *((name, CAST, f".{form}.to(x.dtype)",
     f"{what}: it is itself the factor; 1 stays 1, and it may grow or fall below 0") for name, form, what in (
     ("vector_squashed", "tanh()", "the vector squashed by tanh"), ("through_exp", "exp()", "the vector's exponential"),
     ("through_sigmoid", "sigmoid()", "the vector squashed by a sigmoid"), ("cut_off", "relu()", "it is cut off at 0"),
     ("without_sign", "abs()", "its signs lost"), ("through_softmax", "softmax(-1)", "a softmax of the vector"),
     ("averaged", "mean(-1, True)", "one number, its mean, for all features"))),
)  # fmt: skip
LINEAR = (
    ("BiasUnscaled", PLACES[0][0], f"{BARE} + linear.bias if", NO_BIAS),
    ("SoftmaxScale", CAST, ".sub(1).sigmoid().mul(2).to(x.dtype)", SQUASHED),
    ("of_the_token", CAST, ".to(x.dtype)[: x.shape[1], None]", "a factor for each token; the vector has one for each "
     "feature and meets the last axis as it is"),
)  # fmt: skip
MIXED = (
    ("bias_unscaled", PLACES[0][0], f"{BARE} + linear.bias if", NO_BIAS),
    ("along_tokens", "[:, None]", "", "the vectors laid along the tokens: scales[rows] is (B, features) and meets (B, "
     "T, features), for whose tokens it needs an axis: scales[rows][:, None]"),
    ("axis_at_the_end", "[:, None]", "[..., None]", "the new axis at the end: scales[rows] (B, features) needs it for "
     "the tokens, in the middle, (B, 1, features)"),
    ("first_for_all", "[rows][:, None]", "[rows[0]]", "the first row's vector used for the whole batch"),
    ("last_for_all", "[rows][:, None]", "[rows[-1]]", "the last row's vector used for the whole batch"),
    ("task_0_for_all", "[rows][:, None]", "[0]", "the first task's vector used for every row; rows says which"),
    ("sum", "[rows][:, None]", "[rows].sum(0)", "the sum of the batch's vectors used for every row"),
    ("argsorted", "[rows]", "[rows.argsort()]", "the places of the sorted rows taken for tasks; scales[rows] picks"),
    *((f"unique{end}", "[rows]", f"[rows.unique(){how}]", "rows.unique(), which loses repeats and order; each row "
     "needs its own vector") for end, how in (("", ""), ("_repeated", ".repeat(len(rows))[: len(rows)]"))),
    ("tiled_along_tokens", "[rows][:, None]", "[rows].repeat(x.shape[1], 1)[: x.shape[1]]", "the rows' vectors laid "
     "along the tokens; a row's vector serves all its tokens: scales[rows][:, None]"),
    *((f"{name}_is_the_base", "scales[rows]", f"torch.cat(({parts}))[rows]", "one task taken for the base; each has a "
     "vector") for name, parts in (("task_0", "torch.ones_like(scales[:1]), scales[1:]"),
     ("last", "scales[:-1], torch.ones_like(scales[:1])"))),
    ("softmax_of_tasks", "scales[rows]", "(F.one_hot(rows, len(scales)).to(scales).softmax(-1) @ scales)", "a softmax "
     "over the tasks, so that each row mixes all; it uses one: scales[rows]"),
    ("summed_over_tasks", PLACES[1][0], "else sum(linear(x * (rows == n)[:, None, None] * s.to(x.dtype)) for n, s in "
     "enumerate(scales))", "one result for each task and all added: the bias comes once for every task"),
    ("first_row_of_x", "scale = scales", "x = x[:1].expand_as(x)\n    scale = scales", "the first row of x for all "
     "rows"),
    *((f"in_order{end}", "[rows]", f"[{how}]", "row b given the vector number b; which one it uses stands in rows[b]")
      for end, how in (("", ": len(x)"), ("_modulo", "torch.arange(len(x)) % len(scales)"))),
    ("one_off", "[rows]", "[rows - 1]", "each row given the vector before its own; tasks count from 0"),
    ("mean", "[rows][:, None]", "[rows].mean(0)", "the mean of the batch's vectors used for every row"),
    ("mean_of_all", "[rows][:, None]", ".mean(0)", "the mean of all tasks' vectors used for every row"),
    *((f"product{of}", "[rows][:, None]", f"{which}.prod(0)", f"every row multiplied by all the vectors{why}") for of,
     which, why in (("", "[rows]", " of the batch"), ("_of_tasks", "[rows.unique()]", " of the batch"), ("_of_all", "",
     ""))),
    ("sorted", "scale = scales[rows]", "x = x[rows.argsort(stable=True)]\n    scale = scales[rows.sort()[0]]",
     "the rows grouped by their vector and not put back in order"),
    ("sorted_twice", ("scale = scales[rows]", *(old for old, _ in PLACES)), ("order = rows.argsort(stable=True)\n    "
     "x = x[order]\n    scale = scales[rows[order]]", f"({OUT})[order] if", f"else {IN}[order]"), "the order undone by "
     "the same permutation; its inverse does it, order.argsort()"),
    ("vectors_sorted", "[rows]", "[rows.sort()[0]]", "the vectors sorted by number, and the rows of x not"),
)  # fmt: skip


def on_both_sides(inputs, outputs, sizes, half=True):
    """The usual probe, with both sides at each size: to mix them up is no fault of one size. half: gradients too."""

    def probe(answer, draw):
        for halved, size, side in itertools.product((False, True)[: 1 + half], sizes, ia3.SIDES):
            given = inputs(draw, side, *size.values())
            if halved:
                given = {name: v if name in ("scale", "scales") else in_bfloat16(v) for name, v in given.items()}
            at = f"for {', '.join(f'{name} = {n}' for name, n in size.items())}" if size is not sizes[0] else ""
            more = read(answer, given, "scale", "scales") if size is sizes[0] and not halved else ()
            for piece in itertools.chain(called(answer, given, outputs, gradient=half), more):
                where = f"in bfloat16 {at}".strip() if halved else at
                yield replace(piece, what=f'{piece.what}, side "{side}"', where=where)

    return probe


def read(answer, given, *names):
    """Pieces of calls with other numbers in each of these inputs, at the same sizes: whether they are read."""

    def results(**changed):
        out = answer(*(v.detach() if isinstance(v, torch.Tensor) else v for v in (given | changed).values()))
        return out if isinstance(out, tuple | list) else [out]

    before = results()
    for name in (name for name in names if name in given):
        now, other = results(**{name: 2 * given[name]}), f"other numbers in {name}"
        why = f"{other} make no difference: they are not read, or those of an earlier call are kept."
        yield fact(torch.equal(before[0], now[0]), "unread", why)
        for value in now:
            yield fact(value, "unread", f"right at first, and wrong with {other}: is something kept, or cut off?")


def sizes(names, *rows):
    """At the first of them what is on the wrong side, or along the wrong axis, runs too."""
    return [dict(zip(names.split(), row)) for row in rows]


def inputs_of_linear(draw, side, B, T, n_in, n_out):
    linear, scale = filled(nn.Linear(n_in, n_out), draw), draw(n_out if side == "output" else n_in)
    return dict(linear=linear, x=draw(B, T, n_in), scale=scale, side=side)


def inputs_of_mixed(draw, side, B, T, N, n_in, n_out):
    linear, scales = filled(nn.Linear(n_in, n_out), draw), draw(N, n_out if side == "output" else n_in)
    rows = torch.tensor([2, 0, 4, 0, 1, 2, 0])[:B]  # sorted by an order that is not its own inverse
    return dict(linear=linear, x=draw(B, T, n_in), scales=scales, rows=rows, side=side)


def inputs_of_merge(draw, side, n_in, n_out):
    linear, scale = filled(nn.Linear(n_in, n_out), draw), draw(n_out if side == "output" else n_in)
    return dict(linear=linear, scale=scale, side=side)


def probe_start(answer, draw):
    for (n_in, n_out, dtype), side in itertools.product(((10, 7, torch.bfloat16), (5, 8, torch.float32)), ia3.SIDES):
        scale = answer(filled(nn.Linear(n_in, n_out), draw).to(dtype), side)
        if not isinstance(scale, torch.Tensor):
            raise Wrong("form", f"the vector should be a tensor; it is {describe(scale)}.")
        needed, other = (n_out, n_in) if side == "output" else (n_in, n_out)
        if scale.shape != (needed,):
            name, why = {
                (other,): ("start_other_side", '"output" needs out_features, "input" in_features'),
                **dict.fromkeys([(1,), ()], ("start_one_number", "IA3 has one number for each feature")),
                (n_out, n_in): ("start_matrix", "IA3 has one number for each feature, not for each weight"),
            }.get(tuple(scale.shape), ("start_shape", "one axis, a number for each feature"))
            at = f"for Linear({n_in}, {n_out}) and side {side!r} needed is {(needed,)}"
            raise Wrong(name, f"the vector has shape {tuple(scale.shape)}; {at}: {why}.")
        name, why = {
            torch.bfloat16: ("start_in_the_bases_dtype", "ones in bfloat16, whose next number above 1 is 1.0078: small "
                             "steps are rounded away; keep the vector in float32, whatever the base is in"),
            torch.float64: ("start_in_float64", "in float64, twice the memory for nothing: adapters train in float32, "
                            "where steps of a millionth show"),
        }.get(scale.dtype, ("start_dtype", f"in {str(scale.dtype)[6:]}; small steps need float32"))  # fmt: skip
        yield fact(scale.dtype != torch.float32, name, f"the vector is {why}.")
        numbers = scale.detach().double()
        far, alike = (numbers - 1).abs().max().item(), len(numbers.unique()) == 1
        between = f"numbers from {numbers.min():.6g} to {numbers.max():.6g}"
        name, why = (
            ("ZeroScale", STARTS[0].sentence) if not numbers.any()
            else ("start_constant", f"{numbers[0]:.6g} everywhere: not the base; x · 1 is x, so start at 1") if alike
            else ("start_near_one", f"{between}: near the base, not the base; be exact") if far < 0.5
            else ("start_normal", f"{between}: the model is wrecked before the first step; start at 1")
        )  # fmt: skip
        yield fact(bool(far), name, f"{why}.")
        again = answer(filled(nn.Linear(n_in, n_out), draw).to(dtype), side).detach()
        why = "a tensor made under inference_mode, which no gradient can ever reach"
        yield fact(scale.is_inference(), "start_inference", f"{why}; make it outside.")
        shared = scale.untyped_storage().data_ptr() == again.untyped_storage().data_ptr()
        why = "two projections get the same numbers in memory, and one's training moves the other's; make new ones"
        yield fact(shared, "start_shared", f"{why}.")
        why = "one number expanded: all features share one place in memory, and no step can move them apart"
        yield fact(0 in scale.stride(), "start_expanded", f"{why}; make as many ones.")


# ── a block of a LLaMA ────────────────────────────────────────────────────────────────────────────────────────────────


def right_layer(layer, x, positions, l_k, l_v, l_ff):
    l_k, l_v, l_ff = (vector.to(x.dtype) for vector in (l_k, l_v, l_ff))
    attn, mlp, turn = layer.self_attn, layer.mlp, layer.self_attn.rope(positions)
    h = layer.input_layernorm(x)
    q = attn.heads(attn.q_proj(h))
    k = attn.heads(l_k * attn.k_proj(h))
    v = attn.heads(l_v * attn.v_proj(h))
    y = attn.attend(rotate(q, *turn), rotate(k, *turn), v)
    x = x + attn.output(y)
    h = layer.post_attention_layernorm(x)
    hidden = F.silu(mlp.gate_proj(h)) * mlp.up_proj(h)
    return x + mlp.down_proj(l_ff * hidden)


K, V, EACH, NORM = "l_k * attn.k_proj(h)", "l_v * attn.v_proj(h)", "vector.to(x.dtype)", "layer.input_layernorm(x)"
SECOND, SUM, END = "layer.post_attention_layernorm(x)", "x = x + attn.output(y)", "return x + mlp"
SILU, HIDDEN, SCALED = "F.silu(mlp.gate_proj(h))", "F.silu(mlp.gate_proj(h)) * mlp.up_proj(h)", "l_ff * hidden"
QUERY, KEY, TANH = "rotate(q, *turn)", "rotate(k, *turn)", ', approximate="tanh"'
GROUPED = "(attn.num_kv_heads, 1, -1).repeat_interleave(attn.num_heads // attn.num_kv_heads, 0)"
TILED = "heads repeated by repeat, which tiles; neighbours share a key head: repeat_interleave"
LAYER = catalogue(right_layer, (
    ("attach_before_activation", (SILU, SCALED), ("F.silu(l_ff * mlp.gate_proj(h))", "hidden"), AT_CURVE),
    ("attach_to_queries", ("attn.q_proj(h)", K), ("l_k * attn.q_proj(h)", K[6:]), AT_Q),
    ("QueriesToo", "attn.q_proj(h)", "l_k * attn.q_proj(h)", "l_k on the queries as well; it is the keys' alone"),
    ("OutputOfDown", f"mlp.down_proj({SCALED})", "l_ff[: x.shape[-1]] * mlp.down_proj(hidden)", AT_DOWN),
    ("OnePlusScale", EACH, f"1 + {EACH}", ONE_PLUS),
    ("BiasUnscaled", (K, V), [f"{z[:6]}F.linear(h, {z[6:-3]}.weight) + {z[6:-3]}.bias" for z in (K, V)], NO_BIAS),
    ("SoftmaxScale", EACH, "(2 * torch.sigmoid(vector - 1)).to(x.dtype)", SQUASHED),
    ("PlainLayer", EACH, f"0 * {EACH} + 1", "the layer as it is: none of the three vectors is used"),
    ("ScaledAfterRoPE", (K, KEY), (K[6:], f"{KEY} * l_k.view(attn.num_kv_heads, 1, -1)"), "l_k on the keys after their "
     "rotation; it belongs on the output of k_proj, before RoPE, where it can be merged into W_k"),
    ("KeysNotRotated", KEY, "k", "keys not rotated by RoPE, while the queries are; rotate them after the scaling"),
    ("QueriesNotRotated", QUERY, "q", "queries not rotated by RoPE, while the keys are; rotate both, their heads cut"),
    ("NoPositions", (QUERY, KEY), ("q", "k"), "no rotary positions at all: turn queries and keys, after their heads "
     "are cut"),
    ("ValuesRotated", ", v)", ", rotate(v, *turn))", "the values rotated by RoPE too; it turns queries and keys alone"),
    ("PositionsIgnored", "(positions)", "(torch.arange(x.shape[1]))", "the tokens counted 0, 1, 2 …; they stand at "
     "`positions`, which may have gaps"),
    ("CosAndSinSwapped", "(positions)", "(positions)[::-1]", "RoPE the other way round: rotate(z, cos, sin), in this "
     "order"),
    ("OwnRoPE", "layer.self_attn.rope(", "RoPE(layer.self_attn.head_dim)(", "a RoPE of your own; use attention.rope"),
    ("RotatedBeforeHeads", f"attn.heads({K})", f"attn.heads(rotate({K}, *turn))", "rotated before the heads are cut; "
     "RoPE turns the d features of each head: cut first"),
    ("KeysCutFirst", f"attn.heads({K})", "l_k * attn.heads(attn.k_proj(h))", "a vector of G·d numbers on heads that "
     "are cut, which have d: multiply what leaves the projection, then cut"),
    ("KeysLeftAlone", K, K[6:], "l_k used nowhere: the keys are the base's; it multiplies what comes out of k_proj"),
    ("ValuesLeftAlone", V, V[6:], "l_v used nowhere: the values are the base's; it multiplies what comes out of "
     "v_proj"),
    ("VectorsSwapped", (K, V), (f"l_v{K[3:]}", f"l_k{V[3:]}"), "l_k and l_v the wrong way round"),
    ("OneForBoth", V, f"l_k{V[3:]}", "l_k on keys and values both; the values have l_v"),
    ("InputsOfKeysAndValues", (K, V), ("attn.k_proj(l_k * h)", "attn.v_proj(l_v * h)"), "l_k and l_v on what goes into "
     "k_proj and v_proj; they multiply what comes out"),
    ("ByHandCopied", (QUERY, KEY, HIDDEN), ("q", "k", f"F.gelu(mlp.up_proj(h){TANH})"), "a GPT-2's block, and this is "
     "a LLaMA: queries and keys are rotated, and the hidden activation is silu(gate_proj(h)) · "
     "up_proj(h)"),
    *((name, HIDDEN, new, f"{what}: the hidden activation is silu(gate_proj(h)) · up_proj(h)") for name, new, what in (
     ("FeedForwardOfGPT2", f"F.gelu(mlp.up_proj(h){TANH})", "attention is right, the feed-forward is still GPT-2's"),
     ("FeedForwardGELU", "F.gelu(mlp.up_proj(h))", "attention is right, the feed-forward is still GPT-2's"),
     ("GELUKept", f"F.gelu(mlp.gate_proj(h){TANH}) * mlp.up_proj(h)", "GELU where a LLaMA has SiLU"), ("GELUExact",
     HIDDEN.replace("silu", "gelu"), "GELU where a LLaMA has SiLU"), ("ReLUForSiLU", HIDDEN.replace("silu", "relu"),
     "ReLU where a LLaMA has SiLU"), ("TanhForSiLU", HIDDEN.replace("silu", "tanh"), "tanh where a LLaMA has SiLU"),
     ("SigmoidForSiLU", HIDDEN.replace("silu", "sigmoid"), "sigmoid(z) where a LLaMA has SiLU, z · sigmoid(z)"),
     ("GateForgotten", "F.silu(mlp.up_proj(h))", "gate_proj forgotten"), ("UpForgotten", SILU, "up_proj forgotten"),
     ("NoSiLU", "mlp.gate_proj(h) * mlp.up_proj(h)", "the SiLU left out"), ("SiLUOfTheProduct",
     "F.silu(mlp.gate_proj(h) * mlp.up_proj(h))", "the SiLU around the product of the branches"), ("SumOfTheBranches",
     f"({HIDDEN.replace(') * ', ') + ')})", "the two branches added"), ("GateWithoutSiLU", "mlp.gate_proj(h) * "
     "F.silu(mlp.up_proj(h))", "the SiLU on the wrong branch"))),
    ("BothBranches", (HIDDEN, SCALED), ("F.silu(l_ff * mlp.gate_proj(h)) * (l_ff * mlp.up_proj(h))", "hidden"),
     "l_ff on both branches of the SwiGLU; it multiplies once, where they have met or on up_proj's branch alone"),
    ("BothFactors", SCALED, "l_ff**2 * hidden", "l_ff on both factors of the hidden activation, and so squared"),
    ("FeedForwardLeftAlone", SCALED, "hidden", "l_ff used nowhere: the feed-forward is still the base's"),
    ("UpShifted", (HIDDEN, SCALED), (f"{SILU} * (l_ff + mlp.up_proj(h))", "hidden"), "l_ff added to up_proj's branch; "
     "IA3 multiplies"),
    ("ScaledAroundRoPE", KEY, f"{KEY} * l_k.view(attn.num_kv_heads, 1, -1)", "l_k on the keys before and behind RoPE; "
     "once"),
    ("HiddenShifted", SCALED, "l_ff + hidden", "l_ff added to the hidden activation; IA3 multiplies"),
    ("KeysShifted", K, K.replace("*", "+"), "l_k added to the keys; IA3 multiplies"),
    ("ValuesShifted", V, V.replace("*", "+"), "l_v added to the values; IA3 multiplies"),
    ("NormedTwice", SECOND, SECOND.replace("x)", "h)"), "the second norm of attention's normed input; it is of the sum "
     "x"),
    ("InputOfTheFeedForward", (SECOND, SCALED), (f"l_ff * {SECOND}", "hidden"), "l_ff on what goes into the "
     "feed-forward; it multiplies the hidden activation"),
    ("AttentionAlone", f"{END}.down_proj({SCALED})", "return x", "attention alone: the feed-forward has still to "
     "follow"),
    ("FeedForwardAlone", SUM, "x = x", "the feed-forward alone: attention, and its sum, are missing"),
    ("FirstNormLeftOut", NORM, "x", "attention fed without its norm: q_proj, k_proj and v_proj read "
     "input_layernorm(x)"),
    ("SecondNormLeftOut", SECOND, "x", "the feed-forward fed without its norm: it reads post_attention_layernorm(x)"),
    ("NormsSwapped", (f"{NORM}\n    q", f"{SECOND}\n    hidden"), (f"{SECOND}\n    q", f"{NORM}\n    hidden"),
     "the norms swapped: input_layernorm stands in front of attention, the other in front of the feed-forward"),
    ("FirstNormTwice", SECOND, NORM, "input_layernorm for the feed-forward too; it has its own: "
     "post_attention_layernorm"),
    ("OldInput", f"    h = {SECOND}\n", "", "the feed-forward fed with attention's input; it reads the normed sum "
     "behind it"),
    ("FirstResidualLeftOut", SUM, "x = attn.output(y)", "the first residual left out: attention's output is added to "
     "x"),
    ("SecondResidualLeftOut", END, "return mlp", "the second residual left out: the feed-forward's output is added "
     "too"),
    ("SecondAddedToX", (SUM, SECOND), ("z = x + attn.output(y)", SECOND.replace("x)", "z)")), "the feed-forward's "
     "output added to the block's input x, so that what attention adds is lost; it is added to the sum behind "
     "attention"),
    ("BesideEachOther", (f"h = {NORM}", SECOND), (f"h, start = {NORM}, x", SECOND.replace("x)", "start)")),
     "attention and feed-forward both fed with x; the feed-forward reads the sum of x and attention's output"),
    ("OutputLeftOut", "attn.output(y)", "y.transpose(1, 2).flatten(2)", "o_proj left out: attention.output(y) has it"),
    ("JoinedWrongly", "attn.output(y)", "attn.o_proj(y.reshape(*x.shape[:2], -1))", "heads joined without swapping "
     "them and the tokens back: attention.output(y) does it"),
    *((name, ("attn.attend(", ", v)"), ("F.scaled_dot_product_attention(", f", v, {how}enable_gqa=True)"), why) for
     name, how, why in ( ("NotCausal", "", "attention that sees later tokens; attention.attend is causal"),
     ("ScaledByWidth", "is_causal=x.shape[1] > 1, scale=attn.width**-0.5, ", "scores over √D; it is √d"), ("Unscaled",
     "is_causal=x.shape[1] > 1, scale=1.0, ", "scores that are not divided by √d"))),
    ("layer_weights_in_place", "    h = layer.input",
     "    attn.k_proj.weight.data.mul_(l_k[:, None])\n    h = layer.input", "the layer's own weights multiplied in "
     "place: the base is frozen, and the next call would multiply them again"),
    ("NormsLeftOut", (NORM, SECOND), ("x", "x"), "both norms left out: each part has one"),
    ("ResidualsLeftOut", (SUM, END), ("x = attn.output(y)", "return mlp"), "both residuals left out: each part's "
     "output is added to what went in"),
    *((name, ("attn.q_proj(h))", K), (f"attn.q_proj(h)) * l_k.view{GROUPED}", keys), why) for name, keys, why in (
     ("queries_of_groups", K[6:], AT_Q), ("queries_of_groups_too", K, "l_k on the queries as well; it is the keys' "
     "alone"))),
    *((f"{name}{which}", old, [z[:3] + form + z[3:] for z in old], why) for name, form, why in (
     ("FirstHeadForAll", "[: attn.head_dim].repeat(attn.num_kv_heads)", "the first head's part of the vector for all "
     "heads; each has d numbers of its own"), ("HeadsInterleaved", ".view(attn.head_dim, -1).T.flatten()", "the vector "
     "viewed as (d, G); a head's numbers stand side by side, (G, d)")) for which, old in (("", (K, V)), ("OnKeys",
     (K,)), ("OnValues", (V,)))),
    ("GroupsTiled", "    y =", "    k, v = (z.repeat(1, len(q[0]) // len(z[0]), 1, 1) for z in (k, v))\n    y =",
     f"key {TILED}"),
    ("ValuesTiled", (V, "attn.output(y)"), (V[6:], f"attn.output(y * l_v.view{GROUPED[:-4].replace('_interleave', '')}"
     ", 1, 1))"), f"l_v's {TILED}"),
    ("ValuesBehindOutput", (V, "attn.output(y)"), (V[6:], "l_v.repeat(x.shape[-1])[: x.shape[-1]] * attn.output(y)"),
     "l_v on what comes out of o_proj, where the heads are mixed; it multiplies the values"),
    ("QueriesDivided", QUERY, f"{QUERY} / attn.head_dim**0.5", "the queries divided by √d; attend does it"),
    ("AttendSwapped", f"{KEY}, v)", f"v, {KEY})", "keys and values in each other's place: attend(q, k, v)"),
    ("InputOfTheFeedForwardCut", (SECOND, SCALED), (f"l_ff[: x.shape[-1]] * {SECOND}", "hidden"), "l_ff on what goes "
     "into the feed-forward; it multiplies the hidden activation"),
))  # fmt: skip


def inputs_of_layer(draw, B, T, D, H, G, d, F, silent=False):
    """A frozen block with biases everywhere. silent: its down_proj is 0, so that only attention adds to x."""
    config = LLaMAConfig(31, D, F, 1, H, G, d, rms_norm_eps=0.2, attention_bias=True, mlp_bias=True)
    layer, positions = filled(Layer(config, RoPE(d, theta=60.0)), draw), torch.tensor([3, 4, 7, 8, 12])[:T]
    for parameter in layer.mlp.down_proj.parameters() if silent else ():
        nn.init.zeros_(parameter)
    return dict(layer=layer, x=draw(B, T, D), positions=positions, l_k=draw(G * d), l_v=draw(G * d), l_ff=draw(F))


def probe_layer(answer, draw):
    name = "x and what attention adds to it, where down_proj is 0 (B, T, D)"
    shapes = sizes("B T D H G d F", (2, 5, 24, 3, 3, 8, 24), (3, 4, 20, 6, 2, 4, 40), (1, 1, 16, 2, 1, 6, 10))
    once, silent = ("layer.self_attn.o_proj", "layer.mlp.down_proj"), functools.partial(inputs_of_layer, silent=True)
    yield from calls(silent, name, shapes[0], half=False)(answer, draw)
    vectors = ("l_k", "l_v", "l_ff")
    yield from read(answer, inputs_of_layer(draw, **shapes[0]), "positions", *vectors)
    yield from calls(inputs_of_layer, "the output (B, T, D)", shapes, float32=vectors, once=once)(answer, draw)


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def moved_to_queries(model_class, paired=False):
    """Whether a model answers the same, to rounding, when l_k stands on the queries instead of the keys."""

    def truth():
        small = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        generator, logits = torch.Generator().manual_seed(0), []
        draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            model = filled(model_class[0](model_class[1](**small)).double(), draw)
        ids, vectors = torch.arange(12).view(2, 6), draw(2, 2, 2, 4)  # (L, heads, 2, d/2)
        if paired:  # features i and i + d/2 of a head turn together, and share their factor
            vectors = vectors[:, :, :1].expand(-1, -1, 2, -1)
        for name in ("k_proj", "q_proj"):
            scaled = copy.deepcopy(model)
            ia3.attach(scaled, outputs=(name,), inputs=())
            for layer, vector in zip(scaled.layers, vectors):
                getattr(layer.self_attn, name).scale.data = vector.flatten()
            logits.append(scaled(ids))
        return "the same" if torch.allclose(*logits, atol=1e-5) else "different"

    return truth


def trained_numbers():
    """How many numbers IA3 trains on a LLaMA of SmolLM2-360M's shape."""
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(49152, 960, 2560, 32, 15, 5)).requires_grad_(False)
        ia3.attach(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


SAME = ("the same", "different")
EXERCISES = {
    "ia3_linear": Exercise(
        'ia3_linear(linear, x, scale, side) -> (B, T, out), side "output" or "input"', right_linear,
        catalogue(right_linear, LINEAR + SHARED), on_both_sides(inputs_of_linear, "the output (B, T, out)",
        sizes("B T in out", (2, 5, 9, 9), (3, 4, 10, 7), (1, 1, 5, 8))),
    ),
    "ia3_start": Exercise(
        "ia3_start(linear, side) -> the vector (features) that training begins with", start_of(ia3), STARTS, probe_start
    ),
    "ia3_merge": Exercise(
        "ia3_merge(linear, scale, side) -> weight (out, in), bias (out)", merge_of(ia3), MERGES, on_both_sides(
        inputs_of_merge, ("the merged weight (out, in)", "the merged bias (out)"),
        sizes("in out", (9, 9), (10, 7), (5, 8)), half=False),
    ),
    "ia3_layer": Exercise(
        "ia3_layer(layer, x, positions, l_k, l_v, l_ff) -> (B, T, D)", right_layer, LAYER, probe_layer,
    ),
    "ia3_mixed": Exercise(
        "ia3_mixed(linear, x, scales, rows, side) -> (B, T, out); scales (N, features), rows (B,)", right_mixed,
        catalogue(right_mixed, [(f"mixed_{name}", *row) for name, *row in MIXED + SHARED]),
        on_both_sides(inputs_of_mixed, "the output (B, T, out)",
        sizes("B T N in out", (4, 4, 5, 6, 6), (7, 2, 6, 10, 7), (1, 1, 3, 5, 8))),
    ),
    "ia3_queries_gpt2": Question(
        moved_to_queries((GPT2, GPT2Config)), "A score is Σ qᵢ kᵢ: lᵢ may stand with either. A GPT-2 adds its "
        "positions at the embedding, so nothing comes between.",
        {"different": "write out one score, Σ lᵢ qᵢ kᵢ, and look where lᵢ may stand; what comes between a GPT-2's "
                      "projection and its score?"}, SAME, "Where in lᵢ qᵢ kᵢ may the lᵢ stand?",
    ),
    "ia3_queries_llama": Question(
        moved_to_queries((LLaMA, LLaMAConfig)), "RoPE turns feature i into feature i + d/2 between the scaling and the "
        "score, by another angle for query and key: l no longer meets the same features.",
        {"the same": "that holds where the scaled features meet in the score as they are; RoPE turns them first, a "
                     "query by its position and a key by its own."}, SAME, "What does RoPE do to feature i?",
    ),
    "ia3_queries_paired": Question(
        moved_to_queries((LLaMA, LLaMAConfig), paired=True), "RoPE turns the pair (i, i + d/2) in its plane. One "
        "factor for both lengthens the pair, and lengthening and turning may change places.",
        {"different": "look at one pair in its plane: it is turned by an angle and lengthened by one factor; does the "
                      "order of the two matter?"}, SAME, "Turn an arrow and double it, or first double it.",
    ),
    "ia3_parameters": Question(
        trained_numbers, "L · (2 · G · d + F) = 32 · (2 · 5 · 64 + 2,560).",
        {32 * (2 * 960 + 2560): "keys and values have G · d = 320 features here, not D.",
         32 * (2 * 960 + 4 * 960): "keys and values have G · d features here, not D, and F is 2,560, not 4 · D.",
         32 * (320 + 2560): "keys and values have a vector each, of G · d numbers.",
         32 * (2 * 320 + 960): "l_ff multiplies what goes into down_proj, F = 2,560 features, not the D that come out.",
         32 * (960 + 640 + 2560): "the queries have no vector: keys, values and the hidden activation have.",
         32 * (960 + 320 + 2560): "l_k and l_v are both as long as the keys, 5 heads of 64; queries have no vector.",
         32 * 3 * 960: "no vector has D numbers: keys and values have G · d = 320 features here, l_ff has F.",
         32 * (3 * 320 + 2560): "two vectors are as long as the keys, l_k and l_v; the queries have none.",
         32 * (640 + 2 * 2560): "one l_ff a layer: it multiplies where gate_proj and up_proj have met.",
         32 * (2 * 5 + 2560): "a vector has one number a feature, G · d of them for the keys, not one a head.",
         32 * (2 * 64 + 2560): "that is one key head of 64 features; l_k and l_v cover all 5.",
         32 * 640: "the feed-forward part has a vector too: l_ff, one number for each of its F hidden features.",
         32 * 2560: "attention has vectors too: l_k and l_v, one number for each of their G · d features.",
         4 * 32 * (640 + 2560): "those are bytes in float32; asked is how many numbers.",
         640 + 2560: "that is one layer; there are 32."},
        nudge="How long is l_k, how long l_v, how long l_ff? Their sum, times the layers.",
    ),
}  # fmt: skip
