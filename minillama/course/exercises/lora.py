"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import contextlib

import torch
from torch import nn

import minillama

from ...adapters import lora
from .catalogue import catalogue
from .judging import close
from .observing import Exercise, Piece, Wrong, calls, describe, fact, filled, floating, gradients, named
from .predictions import Question, moved

# ── the module itself, whose mistakes are planted in the models too ───────────────────────────────────────────────────


def path_of(module):
    """The module's LoRALinear as a function of the projection, the input, A, B and α."""

    def lora_linear(linear, x, A, B, alpha):
        with torch.random.fork_rng(devices=[]):  # so that a dropout draws as it would without A's start
            wrapper = module.LoRALinear(linear, A.shape[0], alpha).eval()
        return torch.func.functional_call(wrapper, {"A": A, "B": B}, (x,))

    return lora_linear


def merged_by(module):
    """The module's merge as a function that returns the weight."""

    def lora_merge(linear, A, B, alpha):
        wrapper = module.LoRALinear(linear, A.shape[0], alpha)
        wrapper.A.data, wrapper.B.data = A, B
        return wrapper.weight.detach()

    return lora_merge


def start_of(module):
    """What the module's parameters start from, as a function of their sizes."""

    def lora_start(in_features, out_features, rank):
        wrapper = module.LoRALinear(nn.Linear(in_features, out_features), rank, 16.0)
        return wrapper.A.detach(), wrapper.B.detach()

    return lora_start


def factors(old, right, width, by_alpha="ScaledByAlpha"):
    """Rows that put another factor in the place of α / r, in `old` as `right`; width: the number of features there."""
    r = right.removeprefix("alpha / ")
    return tuple(
        (name, old, old.replace(right, new), why) for name, new, why in (
            (by_alpha, "alpha", "α instead of α / r; r is the number of A's rows"),
            ("ScaledByRoot", f"alpha / {r}**0.5", "α / √r, which is another method (rsLoRA); here it is α / r"),
            ("divided_by_width", f"alpha / {width}",
             "α divided by the number of features; the rank is A.shape[0], or B.shape[1]"),
            ("rank_over_alpha", f"{r} / alpha", "the factor turned round, r / α; it is α / r"),
        )
    )  # fmt: skip


NARROW = "F.linear(self.dropout(x), self.A.to(x.dtype))"
BENT = "a non-linearity between A and B, as a bottleneck has one; LoRA's path is linear, which is why it can be merged"
LAID_OUT = "reshaped, by reshape or view, where .T is needed: the numbers are laid out anew and not turned"
LEFT_ON = "dropout in front of A in eval mode too; ask for it only while `self.training`, here not at all"
PATH = (
    *factors("= base, alpha / rank,", "alpha / rank", "base.in_features"),
    ("unscaled", "self.B.to(x.dtype)) * self.scaling", "self.B.to(x.dtype))", "the factor α / r left out"),
    ("ReadsOutput", NARROW, "F.linear(F.pad(y, (0, max(0, self.in_features - self.out_features)))[..., : "
     "self.in_features], self.A.to(x.dtype))", "the path fed with the projection's output; it stands beside the "
     "projection and reads the same x"),
    ("LoRADropoutInEval", "F.linear(self.dropout(x)", "F.linear(F.dropout(x, 0.1)", LEFT_ON),
    ("DetachedA", "self.A.to(x.dtype))", "self.A.detach().to(x.dtype))", "A detached from the graph (detach, .data or "
     "no_grad): only B ever learns"),
    ("detached_B", "self.B.to(x.dtype))", "self.B.detach().to(x.dtype))", "B detached from the graph (detach, .data or "
     "no_grad): at its start B is 0, and then nothing ever learns"),
    ("path_alone", "return y + F.linear(narrow", "return F.linear(narrow", "the path alone, without the frozen "
     "projection it is added to"),
    ("path_subtracted", "return y + F", "return y - F", "the path subtracted instead of added"),
    ("sum_scaled", "return y + F.linear(narrow, self.B.to(x.dtype))", "return (y + F.linear(narrow, "
     "self.B.to(x.dtype)))", "α / r on the whole sum; it multiplies the path alone"),
    ("relu", NARROW, f"F.relu({NARROW})", f"a ReLU is {BENT}"),
    ("activated", NARROW, f"F.gelu({NARROW})", BENT),
    # from here on what makes no difference in the models, or breaks them
    ("bias_scaled", "return y + F.linear(narrow, self.B.to(x.dtype))", "return self.base(x) + F.linear(narrow, "
     "self.B.to(x.dtype), self.bias)", "the projection's bias once more, and multiplied by α / r; linear(x) holds it "
     "already"),
    ("bias_twice", "return y + F", "return y + self.base.bias + F", "the projection's bias added twice: linear(x) "
     "holds it already"),
    ("bias_dropped", "y = self.base(x)\n        if", "y = F.linear(x, self.base.weight)\n        if", "the "
     "projection's bias left out: call linear(x), which adds it"),
    ("path_on_detached_x", "F.linear(self.dropout(x), ", "F.linear(self.dropout(x.detach()), ", "x detached in front "
     "of the path: the layers below learn nothing through it"),
    ("base_detached", "y = self.base(x)\n        if", "y = self.base(x).detach()\n        if", "the projection's "
     "product cut from the graph (no_grad or detach): its weight is frozen, but the gradient still goes through it to "
     "x"),
    ("untransposed", NARROW, "x @ self.A.to(x.dtype)", "x @ A: A is (r, in), so it is x @ A.T, or F.linear(x, A), "
     "which transposes by itself"),
    ("exchanged", NARROW, "F.linear(x, self.B.to(x.dtype))", "B before A: x goes through A first, down to r numbers"),
    ("B_first", NARROW, "x @ self.B.to(x.dtype)", "B before A: x goes through A first, down to r numbers"),
    ("fed_with_output", NARROW, "y @ self.A.to(x.dtype).T", "A applied to what linear returns; the path stands beside "
     "the projection and reads x itself"),
    ("without_B", "F.linear(narrow, self.B.to(x.dtype))", "narrow", "what is added to linear(x) has not its size: B is "
     "left out, x itself added, or A and B applied to linear(x) in the place of x"),
    ("not_in_the_dtype_of_x", (NARROW, "F.linear(narrow, self.B.to(x.dtype))"), (
     "F.linear(self.dropout(x).to(self.A.dtype), self.A)", "F.linear(narrow, self.B)"), "the path computed in A's "
     "dtype: on a bfloat16 base that gives a float32 output; cast A and B to x.dtype"),
    ("without_a_cast", ("self.A.to(x.dtype))", "self.B.to(x.dtype))"), ("self.A)", "self.B)"), "A and B not cast: a "
     "bfloat16 x and a float32 A cannot be multiplied; write A.to(x.dtype) and B.to(x.dtype)"),
)  # fmt: skip
DRAWN = "nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))"
ZEROS = "torch.zeros(base.out_features, rank, device=device)"
START = (
    ("BothZero", DRAWN, "nn.init.zeros_(self.A)", "A and B both at 0: the identity, but neither ever gets a gradient; "
     "A is drawn at random"),
    ("BothRandom", ZEROS, "0.02 * torch.randn(base.out_features, rank)", "B is not 0: the model is not the base at the "
     "start, however small B is; A is random and B is 0"),
    ("WrongOneZero", (DRAWN, ZEROS), ("nn.init.zeros_(self.A)", "torch.randn(base.out_features, rank)"), "A at 0 and B "
     "not: the identity, but not the paper's start, which is A random and B at 0"),
    ("turned_round", ("empty(rank, base.in_features", "zeros(base.out_features, rank"), ("empty(base.in_features, rank",
     "zeros(rank, base.out_features"), "A and B turned round; A has a row for each direction it reads, (r, in), and B "
     "a column for each, (out, r)"),
    ("deviation_of_one", DRAWN, "nn.init.normal_(self.A)", "A from N(0, 1): √(3 · in) times as wide as nn.Linear draws "
     "it, so that the first steps are too long"),
    ("kaiming_without_a", DRAWN, "nn.init.kaiming_uniform_(self.A)", "kaiming_uniform_ without a=√5: √6 times as wide "
     "as nn.Linear draws its weight"),
    ("not_centred", DRAWN, "nn.init.uniform_(self.A, 0, 2 * base.in_features**-0.5)", "A's numbers are not centred on "
     "0, as torch.rand's are not: draw them on both sides of it"),
    ("equal_rows", DRAWN, "self.A.data = nn.Linear(base.in_features, 1).weight.data.repeat(rank, 1)", "A has equal "
     "rows: they get equal gradients and stay equal, so that A's rank stays smaller; draw each by itself"),
)  # fmt: skip
SUM = "weight + self.scaling * (self.B @ self.A)"
MERGE = (
    ("MergeUnscaled", SUM, "weight + self.B @ self.A", "a merge that forgets α / r"),
    ("change_alone", SUM, "self.scaling * (self.B @ self.A)", "the change (α / r) B A alone, without the weight it is "
     "added to"),
    ("wrong_order", "self.B @ self.A", "self.A.T @ self.B.T", "Aᵀ Bᵀ, the product turned round; only where in = out "
     "does it fit at all: (out, r) @ (r, in) is B @ A"),
    ("change_subtracted", SUM, SUM.replace("+", "-"), "the change subtracted, which undoes a merge; to merge, add"),
    ("sum_scaled", SUM, "self.scaling * (weight + self.B @ self.A)", "α / r on the weight too; it multiplies B A "
     "alone"),
    ("turned_at_the_end", f"({SUM}).to(weight.dtype)", f"({SUM}).to(weight.dtype).T",
     "the weight transposed; nn.Linear keeps (out, in), and so does linear.weight: nothing is to be turned"),
    ("multiplied", SUM, SUM.replace("+", "*"), "the weight multiplied by the change; add it"),
    ("bias_added", SUM, f"{SUM} + self.bias[:, None]", "the bias added to the weight; a layer keeps it by itself"),
    ("reshaped", "self.B @ self.A", "(self.A.T @ self.B.T).reshape(weight.shape)", f"a product {LAID_OUT}"),
    ("product_turned", "self.B @ self.A", "self.A @ self.B", "A @ B does not fit: (out, r) @ (r, in) is B @ A"),
    ("not_in_the_dtype_of_the_weight", f"({SUM}).to(weight.dtype)", f"({SUM})", "the merged weight in A's dtype: a "
     "bfloat16 layer needs it back in linear.weight.dtype"),
)  # fmt: skip

PATHS = catalogue(lora, PATH, wrap=path_of)
STARTS = catalogue(lora, START, wrap=start_of)
MERGES = catalogue(lora, MERGE + PATH[:4], wrap=merged_by)
PLANTED = PATHS[:14] + STARTS[:3] + MERGES[:5]  # each must fail a test in the models
HARMLESS = {}  # {mistake's name: kinds of model where it makes no difference}


def begun(A, B, n_in, n_out, r):
    """Pieces of A and B at the start: which of them is 0, how many directions A reads. Wrong where a shape is."""
    for what, value, shape in (("A (r, in)", A, (r, n_in)), ("B (out, r)", B, (n_out, r))):
        found = tuple(value.shape) if floating(value) else None
        if found != shape:
            name = {shape[::-1]: "turned_round", (n_out, r): "exchanged"}.get(found, "shape")
            needed = f"needed is a float32 tensor of shape {shape} for in = {n_in}, out = {n_out} and r = {r}"
            raise Wrong(name, f"{what} is {describe(value)}; {needed}.")
        why = f"{what} is {describe(value)}; adapter numbers are float32, in which small steps are not lost."
        yield fact(value.dtype == torch.float32, "start_dtype", why, f"whether {what} is float32")
    zero = [not A.any(), not B.any()]
    row = START[0 if all(zero) else 2 if zero[0] else 1]
    yield fact(zero[0] + 2 * zero[1], row[0], f"{row[3]}.", "which of the two is 0")
    yield fact(len(torch.unique(A.detach(), dim=0)) < r, "equal_rows", f"{START[-1][3]}.", "equal rows of A")
    rank = int(torch.linalg.matrix_rank(A.detach().double(), rtol=1e-4))
    why = f"A has rank {rank}, and not {r}: rows of it are 0, or made of other rows; draw each number by itself."
    yield fact(rank, "low_rank", why, "A's rank")


def drawn(A, n_in):
    """Facts of the numbers in A at its start: their mean, and how wide they are."""
    deviation, mean = A.detach().double().std().item(), A.detach().double().mean().item()
    yield fact(abs(mean) > 0.1 * deviation, "not_centred", f"{START[-2][3]}.")
    times = deviation * (3 * n_in) ** 0.5  # 1 where drawn as nn.Linear draws; each known width is told apart
    which = next((i for i, n in enumerate((1, 6**0.5, (3 * n_in) ** 0.5)) if abs(times / n - 1) < 0.05), -1)
    why = f"A is drawn {times:.2g} times as wide as nn.Linear draws its weight, whose deviation is 1 / √(3 · in)."
    yield fact(which, "too_wide" if times > 1 else "too_narrow", why, "how wide A is")


def probe_start(answer, draw):
    for n_in, n_out, r in ((480, 250, 120), (300, 500, 64)):
        (_, A), (_, B) = named(("A (r, in)", "B (out, r)"), answer(n_in, n_out, r))
        yield from begun(A, B, n_in, n_out, r)
        yield from drawn(A, n_in)
        sizes = n_in, n_out, r
        (one, state), (two, other) = twice(lambda at=sizes: (answer.unseeded(*at)[0], torch.get_rng_state()))
        why = "two calls give the same A (a fixed seed, table, cache), or set torch's seed: draw anew, and set none."
        yield fact(torch.equal(one, two) or torch.equal(state, other), "same_A", why)
        yield Piece("A's shape, mean, width and rank", torch.tensor(A.shape))
        yield Piece("B (out, r)", B)


def twice(call):
    """What a call returns from two states of torch's random numbers."""
    return [(torch.manual_seed(seed), call())[1] for seed in (1, 2)]


def multiplied(found, product, alpha, r, when=""):
    """Facts: what the product B A is multiplied by in what was found, and whether it is rounded there."""
    factor = right = alpha / r
    least = ((found * product).sum() / product.square().sum()).item()
    multiple = close(found, least * product)
    factor = least if abs(least) > 1e-3 and multiple else right
    why = f"{when}B A is multiplied by {factor:.3g} for α = {alpha:g} and r = {r}; needed is α / r = {right:.3g}."
    yield fact(factor, "factor", why, f"{when}what B A is multiplied by")
    rounded = not multiple and close(found, right * product, 0.01)
    yield fact(rounded, "rounded", f"{when}it is rounded as half precision is; float32 numbers stay float32.")


def steady(function, unseeded, x, dropout, why):
    """Facts: whether nothing is drawn at random, each token goes by itself, and the path is linear in x."""
    at, t, mixed = [function(z) for z in (0 * x, x, -2 * x)], x.shape[1] // 2, False
    yield fact(not close(*twice(lambda: unseeded(x))), dropout, f"{why}.")
    with contextlib.suppress(Exception):  # it may stop where T is another; that is looked at later
        mixed = not close(function(x[-1:, t : t + 1]), at[1][-1:, t : t + 1])
    yield fact(mixed, "mixed", "a token's path depends on other tokens, or is another's: each row of x goes by itself.")
    yield fact(not close(at[2] - at[0], -2 * (at[1] - at[0])), "activated", f"{BENT}.")


def with_factor(probe, base, product):
    """The probe, and before it what B A is multiplied by: the result should be base(given) + α / r · product(given)."""

    def longer(answer, draw):
        given = probe.inputs(draw)
        A, B, alpha, r = given["A"], given["B"], given["alpha"], len(given["A"])
        with torch.no_grad():
            result, plain = answer(*given.values()), base(given)
            if not floating(result) or result.shape != plain.shape:
                why = f"needed is a tensor of shape {tuple(plain.shape)}; it is {describe(result)}."
                raise Wrong("shape" if floating(result) else "no_tensor", why)
            for when, rows in (("", A), ("where two rows of A are equal ", A[[0, 0, 2]])):
                now = given | {"A": rows}
                yield from multiplied(answer(*now.values()) - plain, product(now), alpha, r, when)
            turned = {"A": A.reshape(A.shape[::-1]).T}, {"B": B.reshape(B.shape[::-1]).T}
            fewer = ({"A": A[k], "B": B[:, k]} for k in (slice(1, None), slice(-1), slice(1)))
            change = alpha / r * product(given)
            for name, why, wrong in (
                ("direction_lost", "the first, the last or all but the first of the r directions are lost", fewer),
                ("reshaped", f"A or B {LAID_OUT}", (*turned, turned[0] | turned[1])),
            ):
                found = (alpha / r * product(given | other) for other in wrong)
                yield fact(any(close(result - plain, other) for other in found), name, f"{why}.")
            yield fact(close(result - plain, plain * change), "multiplied", "multiplied by 1 + change; add the change.")
            yield fact(close(result - plain, change.abs()), "absolute", "the change has lost its signs.")
            if "x" in given:
                calls = (lambda x, f=f: f(*(given | {"x": x}).values()) for f in (answer, answer.unseeded))
                yield from steady(*calls, given["x"], "LoRADropoutInEval", LEFT_ON)
        yield from probe(answer, draw)

    longer.inputs = probe.inputs
    return longer


# ── the path and the merges ───────────────────────────────────────────────────────────────────────────────────────────


def inputs_of_path(draw, n_in, n_out, r, alpha, **tokens):
    x = {"x": draw(*tokens.values(), n_in)} if tokens else {}
    return dict(linear=filled(nn.Linear(n_in, n_out), draw), **x, A=draw(r, n_in), B=draw(n_out, r), alpha=alpha)


def inputs_of_conv1d(draw, n_in, n_out, r, alpha):
    return dict(weight=draw(n_in, n_out), A=draw(r, n_in), B=draw(n_out, r), alpha=alpha)


SIZES = (
    dict(n_in=10, n_out=7, r=3, alpha=5.0), dict(n_in=6, n_out=6, r=4, alpha=3.0),
    dict(n_in=5, n_out=8, r=1, alpha=0.5),
)  # fmt: skip
TOKENS = dict(B=2, T=5), dict(B=4, T=2), dict(B=1, T=1)


def right_merge_turned(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * (B @ A).T


CONV1D = catalogue(right_merge_turned, (
    ("not_turned", "(B @ A).T", "(B @ A)", "B A added as it is, (out, in), to a weight that is stored (in, out): only "
     "where in = out does it fit at all, and then it is wrong"),
    ("turned_and_returned", "weight + alpha / A.shape[0] * (B @ A).T", "weight.T + alpha / A.shape[0] * (B @ A)", "the "
     "merged weight returned as (out, in), which nn.Linear would want; a Conv1D wants it back as (in, out)"),
    ("turned_unscaled", "alpha / A.shape[0] * ", "", "turned rightly, and α / r forgotten"),
    ("turned_alone", "weight + alpha", "alpha", "the change alone, without the weight it is added to"),
    ("turned_subtracted", "weight + alpha", "weight - alpha", "the change subtracted, which undoes a merge; add it"),
    ("sum_scaled", "weight + alpha / A.shape[0] * (B @ A).T", "alpha / A.shape[0] * (weight + (B @ A).T)", "α / r on "
     "the weight too; it multiplies B A alone"),
    ("product_turned", "(B @ A).T", "(A @ B)", "A @ B does not fit; (in, out) is (B @ A).T, or A.T @ B.T"),
    ("only_one_turned", "(B @ A).T", "(A.T @ B)", "A.T @ B: turned is a product with both turned, A.T @ B.T"),
    ("reshaped", "(B @ A).T", "(B @ A).reshape(weight.shape)", f"a product {LAID_OUT}"),
    *factors("alpha / A.shape[0] *", "alpha / A.shape[0]", "A.shape[1]"),
))  # fmt: skip


def right_fused(A_q, B_q, A_v, B_v, alpha):
    zero = torch.zeros_like(B_q)
    A = torch.cat((A_q, A_v))
    B = torch.cat((torch.cat((B_q, zero), 1), torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)))
    return A, B, 2 * alpha


ORDER = "c_attn's outputs are queries, keys, values in this order"
FUSED = catalogue(right_fused, (
    ("alpha_as_it_was", "2 * alpha", "alpha", "the change is halved: the fused path has rank 2r, so that α / rank "
     "is half of what it was; double α, and leave A and B"),
    ("alpha_halved", "2 * alpha", "alpha / 2", "α halved; the rank has doubled, so that α must be doubled"),
    ("value_in_the_place_of_key", "torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)", "torch.cat((zero, B_v), 1), "
     "torch.cat((zero, zero), 1)", f"the value's block in the key's rows; {ORDER}"),
    ("both_read_both", ("(B_q, zero)", "(zero, B_v)"), ("(B_q, B_q)", "(B_v, B_v)"), "no zeros beside the blocks, or "
     "one A, the sum, for both: the query's rows read A_v's directions too, and the value's A_q's"),
    ("blocks_crossed", ("(B_q, zero)", "(zero, B_v)"), ("(zero, B_q)", "(B_v, zero)"), "the blocks crossed: the "
     "query's rows read A_v's directions, and the value's A_q's"),
    ("one_A_for_both", "(A_q, A_v)", "(A_q, A_q)", "the value's rows read A_q's directions (A_q twice in A, or "
     "B_v in the first r columns); they read A_v's"),
    ("B_q_for_B_v", "(zero, B_v)", "(zero, B_q)", "B_q in the value's rows as well; there stands B_v"),
    ("no_zeros", ("(B_q, zero)", "(zero, B_v)"), ("(B_q, B_v)", "(B_q, B_v)"), "no zeros: query and value both get the "
     "sum of the two changes; beside B_q and beside B_v stand zeros"),
    ("keys_changed", "torch.cat((zero, zero), 1)", "torch.cat((B_q, B_v), 1)", "the key's rows changed too; only query "
     "and value have a path, the key's rows are zeros"),
    ("query_and_value_swapped", "torch.cat((B_q, zero), 1), torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)",
     "torch.cat((zero, B_v), 1), torch.cat((zero, zero), 1), torch.cat((B_q, zero), 1)", f"the value's path in the "
     f"query's rows and the query's in the value's; {ORDER}"),
))  # fmt: skip


def rows_of_change(result, n_in, n_out, r):
    """The change (α / rank) B A that A, B and α make, as the rows of query, key and value."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise Wrong("three_things", f"needed are A, B and the new α; it returned {describe(result)}.")
    A, B, alpha = result
    found = [tuple(z.shape) if floating(z) else None for z in (A, B)]
    if found != [(2 * r, n_in), (3 * n_out, 2 * r)]:
        known = {(3 * n_out, r): ("not_as_wide", "B reads r directions, and A has 2r: widen B with zeros. "),
                 (2 * r, 3 * n_out): ("turned_round", "B is turned round. "),
                 (2 * n_out, 2 * r): ("no_rows_for_keys", "B has no rows for the keys, which need zeros. "),
                 (2 * r, n_in): ("exchanged", "A and B are in each other's place. ")}  # fmt: skip
        name, why = known.get(found[1], ("shape", ""))
        if floating(A) and found == [(len(A), n_in), (3 * n_out, len(A))]:
            name, why = "another_rank", f"A and B make a path of rank {len(A)}. "
        needed = f"for paths of rank {r} from {n_in} inputs to {n_out} outputs needed are ({2 * r}, {n_in}) and "
        raise Wrong(name, f"{why}A and B are {found[0]} and {found[1]}; {needed}({3 * n_out}, {2 * r}).")
    if not isinstance(alpha, int | float) and getattr(alpha, "ndim", 1):
        raise Wrong("alpha_no_number", f"α should be a number; it is {describe(alpha)}.")
    return (float(alpha) / len(A) * (B @ A)).split(n_out)  # 3 times (out, in)


def inputs_of_fused(draw, n_in, n_out, r, alpha):
    return dict(A_q=draw(r, n_in), B_q=draw(n_out, r), A_v=draw(r, n_in), B_v=draw(n_out, r), alpha=alpha)


ROWS = tuple(f"the change (α / rank) B A in the {name}'s rows (out, in)" for name in ("query", "key", "value"))


def probe_fused(answer, draw):
    def changes(A_q, B_q, A_v, B_v, alpha):
        return rows_of_change(answer(A_q, B_q, A_v, B_v, alpha), A_q.shape[1], *B_q.shape)

    given = inputs_of_fused(draw, 10, 6, 3, 5.0)
    query, key, value = changes(**given)
    yield fact(bool(key.any()), "keys_changed", "the key's rows are not 0; only query and value have a path.")
    yield from multiplied(query, given["B_q"] @ given["A_q"], 5.0, 3, "in the query's rows ")
    yield from multiplied(value, given["B_v"] @ given["A_v"], 5.0, 3, "in the value's rows ")
    yield from calls(inputs_of_fused, ROWS, SIZES, half=False)(changes, draw)


# ── a layer that merges itself ────────────────────────────────────────────────────────────────────────────────────────


class Layer(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scaling, self.kept = linear.requires_grad_(False), alpha / rank, None
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / (3 * linear.in_features) ** 0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def path(self, x):
        return x @ self.A.T @ self.B.T * self.scaling

    def forward(self, x):
        return self.linear(x) if self.kept is not None else self.linear(x) + self.path(x)

    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.clone()
            self.linear.weight += self.scaling * self.B @ self.A

    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight.copy_(self.kept)
            self.kept = None


KEEP, ADD, PUT = "self.kept = self.linear.weight.clone()", "+= self.scaling * self.B @ self.A", "copy_(self.kept)"
LAYER = catalogue(Layer, (
    *factors("alpha / rank", "alpha / rank", "linear.in_features", "PathTimesAlpha"),
    ("PathUnscaled", " * self.scaling\n", "\n", "α / rank left out of the path"),
    ("BaseStillTrains", "linear.requires_grad_(False)", "linear.requires_grad_(True)", "the base's weight and bias "
     "still train: requires_grad_(False) freezes them"),
    ("RandomB", "torch.zeros(linear", "0.02 * torch.randn(linear", "B random at the start: the fresh layer is not the "
     "base's; B starts at 0"),
    ("DropoutStays", "return x @ self.A.T", "return nn.functional.dropout(x, 0.1) @ self.A.T", "dropout in eval mode "
     "too; ask for it only while `self.training`"),
    ("PathOnTop", "self.linear(x) if self.kept is not None else self.linear(x) + self.path(x)", "self.linear(x) + "
     "self.path(x)", "the path added on top of the merged weight, so that it counts twice"),
    ("MergesTwice", f"if self.kept is None:\n            {KEEP}", f"if True:\n            {KEEP} if self.kept is None "
     f"else self.kept", "a second merge() that adds the path a second time; remember whether it is merged"),
    ("UnmergeSubtracts", f"self.linear.weight.{PUT}", "self.linear.weight -= self.scaling * self.B @ self.A", "an "
     "unmerge() that subtracts what was added: (w + d) - d is not w in floating point; keep a copy of the weight, or "
     "leave it alone"),
    ("UnmergesUnmerged", f"if self.kept is not None:\n            self.linear.weight.{PUT}", "if self.kept is None:\n  "
     "          self.linear.weight -= self.scaling * self.B @ self.A\n        else:\n" f"            "
     f"self.linear.weight.{PUT}", "an unmerge() of a layer that is not merged changes it; let it do nothing there"),
    ("KeptIsNoCopy", KEEP, KEEP.replace("clone()", "data"), "after merge() and unmerge() the weight is still the "
     "merged one, with the path on top: put back a copy, .clone(), taken before the adding (.data is no copy)"),
    ("CopyOverwritten", f"{ADD}\n", f"{ADD}\n        else:\n            {KEEP}\n", "a second merge() overwrites the "
     "copy that is kept for unmerge() with the merged weight; keep the first"),
    ("MergeFlagsOnly", f"            self.linear.weight {ADD}\n", "", "a merge() that folds nothing into a weight and "
     "leaves the path out"),
    ("MergeUnscaled", ADD, "+= self.B @ self.A", "a merge() that forgets α / rank"),
    ("NeverUnmerges", f"self.linear.weight.{PUT}\n            self.kept = None", "pass", "an unmerge() that leaves the "
     "merged weight in use"),
    ("change_alone", f"self.linear.weight {ADD}", "self.linear.weight.copy_(self.scaling * self.B @ self.A)", "a "
     "merge() to the change alone, without the weight it is added to"),
    ("sum_scaled", "else self.linear(x) + self.path(x)", "else (self.linear(x) + x @ self.A.T @ self.B.T) * "
     "self.scaling", "α / rank on the whole sum; it multiplies the path alone"),
    ("StaysMerged", "            self.kept = None\n", "", "a layer that still calls itself merged after unmerge()"),
    ("MergeForgotten", f"{KEEP}\n", "pass\n", "a merge() that adds the path to the weight and does not remember it: "
     "the path then counts twice, and nothing can be unmerged"),
    ("merged_without_bias", "return self.linear(x) if", "return x @ self.linear.weight.T if", "the merged layer leaves "
     "out the projection's bias"),
    ("PathDetached", "x @ self.A.T", "x @ self.A.detach().T", "A detached from the graph: it never learns"),
    ("AllDetached", "x @ self.A.T @ self.B.T", "(x @ self.A.T @ self.B.T).detach()", "the path detached from the "
     "graph: neither A nor B ever learns"),
    ("still_a_path", ("self.linear(x) if self.kept is not None else ", f"            self.linear.weight {ADD}\n"), ("",
     ""), "a merge() that only sets a flag: the layer still computes with A and B; fold B A into one weight that stays "
     "as it is"),
))  # fmt: skip
SAID = {mistake.name: f"{mistake.sentence}." for mistake in LAYER} | {
    "third_trains": "a third parameter trains beside A and B; a fixed number, such as the scaling, is no Parameter.",
    "not_the_base": "fresh, the layer is not the base, though B is 0: use the weight and the bias that are given.",
    "drops_base": "fresh, in training mode, the layer is not the base: drop what goes into A alone.",
    "copy_rounded": "unmerge() brings the weight back rounded: keep the copy in the weight's own dtype.",
    "toggles": "a second merge() unmerges; it should do nothing.",
    "in_eval_only": "merge() does nothing in training mode; it should merge there too.",
    "shared": "two layers share what they keep (on the class): merging one changes the other; keep it on self.",
    "never_trains": "A and B must train: leave their requires_grad True.",
    "merged_trains": "after merge() the merged weight trains; keep a tensor, no Parameter.",
    "path_lost": "merge() changes A or B; they are needed after unmerge().",
    "stale": "after unmerge(), more training and another merge() the layer computes with the old merged weight.",
}


def probe_layer(answer, draw):
    """One fact after another, in the order in which they are to be mended."""
    for n_in, n_out, r, alpha, shape in ((10, 7, 3, 5.0, (2, 5)), (6, 6, 4, 3.0, (3, 2)), (5, 8, 1, 0.5, (1, 1))):
        linear, x = filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), draw(*shape, n_in).requires_grad_()
        twin = answer(filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), r, alpha)
        layer = answer(linear, r, alpha)
        if not isinstance(layer, nn.Module) or not {"A", "B"} <= {name for name, _ in layer.named_parameters()}:
            raise Wrong("form", f"needed is a module with the parameters A and B; it is {describe(layer)}.")
        yield from facts_of_layer(layer.eval(), twin.eval(), linear, x, n_in, n_out, r, alpha, draw)


def facts_of_layer(layer, twin, linear, x, n_in, n_out, r, alpha, draw):
    before, plain = linear.weight.detach().clone(), linear(x).detach()

    def told(right, name):
        return fact(bool(right), name, SAID[name])

    def trains(name="BaseStillTrains"):
        named = {name: p.requires_grad for name, p in layer.named_parameters()}
        yield told(named["A"] and named["B"], "never_trains")
        more = {p.shape for own, p in layer.named_parameters() if p.requires_grad and own not in ("A", "B")}
        yield told(not more & {before.shape, before.shape[:1]}, name)
        yield told(not more, "third_trains")

    def seen(when):
        out = layer(x)
        yield Piece(f"the output {when} (B, T, out)", out)
        for name, found in zip(("A", "B", "x"), gradients(out, layer.A, layer.B, x)):
            yield Piece(f"the gradient {when} with respect to {name}", found, kind="gradient", of=name)

    yield from trains()
    yield told(not (layer.A.any() and layer.B.any()), "RandomB")
    yield from begun(layer.A, layer.B, n_in, n_out, r)
    fresh = layer(x)
    yield told(not linear.weight.requires_grad or not gradients(fresh, linear.weight)[0].any(), "BaseStillTrains")
    if not floating(fresh) or fresh.shape != plain.shape:
        raise Wrong("no_output", f"needed is a tensor of shape {tuple(plain.shape)}; it is {describe(fresh)}.")
    yield told(close(fresh.detach(), plain), "not_the_base")
    yield told(close(layer.train()(x).detach(), plain), "drops_base")
    layer.eval()
    A, B = draw(r, n_in), draw(n_out, r)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    out, product = layer(x).detach(), x.detach() @ A.T @ B.T
    yield from steady(layer, layer.forward, x.detach(), "DropoutStays", SAID["DropoutStays"][:-1])
    yield from multiplied(out - plain, product, alpha, r)
    yield from seen("with an open path")
    try:
        layer.unmerge()
    except Exception as error:
        raise Wrong("UnmergesUnmerged", f"{SAID['UnmergesUnmerged']} It stopped with {error!r}.") from None
    yield told(torch.equal(layer(x), out), "UnmergesUnmerged")
    layer.merge()
    merged = layer(x).detach()
    yield told(torch.equal(layer.A, A) and torch.equal(layer.B, B), "path_lost")
    yield told(not close(merged, plain + 2 * alpha / r * product), "PathOnTop")
    yield told(not close(merged, plain), "MergeFlagsOnly")
    yield from multiplied(merged - plain, product, alpha, r, "after merge() ")
    yield Piece("the output after merge() (B, T, out)", merged)
    yield from trains("merged_trains")
    layer.B.data = 2 * B
    yield told(close(layer(x).detach(), merged), "still_a_path")
    layer.B.data = B.clone()
    for name in ("KeptIsNoCopy", "CopyOverwritten"):
        layer.unmerge()
        again = layer(x).detach()
        yield told(not close(again, plain), "StaysMerged")
        yield told(not close(again, plain + 2 * alpha / r * product), name)
        layer.B.data = 0 * B
        yield told(close(layer(x).detach(), plain, 0.01), "NeverUnmerges")
        layer.B.data = B.clone()
        yield told(close(again, out, 1e-5), "copy_rounded")
        if name == "KeptIsNoCopy":
            layer.merge()
            layer.merge()
            yield told(close(layer(x).detach(), merged), "MergesTwice")
            layer.B.data = 2 * B
            yield told(close(layer(x).detach(), merged), "toggles")
            layer.B.data = B.clone()
    yield told(torch.equal(linear.weight, before) and torch.equal(again, out), "UnmergeSubtracts")
    yield from trains()
    yield from seen("after unmerge()")
    layer.A.data, layer.B.data = draw(r, n_in), draw(n_out, r)
    layer.train().merge()
    changed = layer.eval()(x).detach()
    layer.B.data = layer.B.data * 2
    yield told(close(layer(x).detach(), changed), "in_eval_only")
    yield told(not close(layer(x).detach(), merged), "stale")
    yield Piece("the output after more training and another merge() (B, T, out)", layer(x))
    twin.A.data, twin.B.data = draw(r, n_in), draw(n_out, r)
    layer.unmerge()
    out, others = layer(x), twin(x)
    layer.merge()
    alone = twin(x)
    twin.merge()
    layer.unmerge()
    yield told(close(alone, others) and close(layer(x), out) and close(twin(x), others), "shared")


def trained_on_llama_7b():
    """What LoRA of rank 8 on query and value trains in LLaMA-7B's shape."""
    with torch.device("meta"):
        model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig()), "lora", rank=8)
    return sum(p.numel() for p in minillama.adapters.adapter_parameters(model).values())


def rank_of(changes):
    """The rank of the sum of so many changes (α / r) B A with r = 4."""
    torch.manual_seed(0)
    B, A = (torch.randn(changes, *shape, dtype=torch.float64) for shape in ((48, 4), (4, 64)))
    return int(torch.linalg.matrix_rank((16 / 4 * B @ A).sum(0)))


EXERCISES = {
    "lora_start": Exercise(
        "lora_start(in_features, out_features, rank) -> A (r, in), B (out, r)", start_of(lora), STARTS, probe_start,
    ),
    "lora_moves_first": Question(
        moved("lora", rank=2, steps=1), "A's gradient carries B as a factor, and B is 0; B's carries A, which is not.",
        {frozenset(["A", "B"]): "look again at what multiplies A's gradient.",
         frozenset(["A"]): "the other way round: which of the two is a factor of A's gradient, and what is it?",
         frozenset(): "one of the two does move: not both gradients have a 0 as a factor."},
        ("A", "B"), "Write out y = B A x, and the gradient of y by A and by B: which factor stands in each?",
    ),
    "lora_moves_second": Question(
        moved("lora", rank=2, steps=2), "After one step B is no longer 0, and A feels the loss.",
        {frozenset(["B"]): "does A's gradient still vanish, after B has moved?",
         frozenset(["A"]): "what moved in the first step has moved after the second as well.",
         frozenset(): "the first step has moved one of them already."},
        ("A", "B"), "What has moved after the first step still counts; and what is B now?",
    ),
    "lora_parameters": Question(
        trained_on_llama_7b, "32 layers, two projections each, and each of them r · (in + out) = 8 · (4,096 + 4,096).",
        {32 * 2 * 8 * 4096: "that counts A or B alone, or one projection of the two that each layer adapts.",
         32 * 2 * 4096 * 4096: "that is what the two frozen projections have themselves.",
         32 * 4 * 8 * 8192: "that counts four projections a layer; adapted are query and value.",
         32 * 2 * 8192: "that is rank 1; the rank is 8.", 2 * 8 * 8192: "that is one layer; there are 32."},
        nudge="How many numbers have A (r, in) and B (out, r) together? Times how many projections, how many layers?",
    ),
    "lora_rank": Question(
        lambda: rank_of(1), "A maps onto r numbers, and no matrix B behind it makes more than r directions of them; "
        "α / r only stretches them.",
        {16: "16 is α, which stretches the change and adds no direction.",
         48: "48 is what a matrix of this shape could have; how many numbers does everything pass through?",
         64: "64 is the number of inputs; how many numbers does everything pass through?",
         8: "A and B are multiplied, and their ranks do not add."},
        nudge="Through how many numbers does every input pass between A and B?",
    ),
    "lora_rank_of_two": Question(
        lambda: rank_of(2), "The rank of a sum is at most the sum of the ranks, and with random directions it is "
        "reached: adding changes up may leave what rank 4 can hold.",
        {4: "do the two use the same directions?", 16: "the ranks of a sum add at most; they do not multiply."},
        nudge="Write B₁A₁ + B₂A₂ as one product: how many columns has the first factor?",
    ),
    "lora_linear": Exercise(
        "lora_linear(linear, x, A, B, alpha) -> (B, T, out)", path_of(lora), PATHS,
        with_factor(calls(inputs_of_path, "the output (B, T, out)", [a | b for a, b in zip(TOKENS, SIZES)], ("A", "B")),
                    lambda of: of["linear"](of["x"]), lambda of: of["x"] @ of["A"].T @ of["B"].T),
    ),
    "lora_merge": Exercise(
        "lora_merge(linear, A, B, alpha) -> weight (out, in)", merged_by(lora), MERGES,
        with_factor(calls(inputs_of_path, "the merged weight (out, in)", SIZES, ("A", "B"), gradient=False),
                    lambda of: of["linear"].weight, lambda of: of["B"] @ of["A"]),
    ),
    "lora_merge_conv1d": Exercise(
        "lora_merge_conv1d(weight, A, B, alpha) -> weight (in, out)", right_merge_turned, CONV1D,
        with_factor(calls(inputs_of_conv1d, "the merged weight (in, out)", SIZES, half=False, gradient=False),
                    lambda of: of["weight"], lambda of: (of["B"] @ of["A"]).T),
    ),
    "lora_fused": Exercise(
        "lora_fused(A_q, B_q, A_v, B_v, alpha) -> A (2r, in), B (3 · out, 2r), alpha", right_fused, FUSED, probe_fused,
    ),
    "lora_layer": Exercise(
        "a class: LoRALayer(linear, rank, alpha) with merge() and unmerge(), called as layer(x) -> (B, T, out)",
        Layer, LAYER, probe_layer,
    ),
}  # fmt: skip
