"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import contextlib

import torch
from torch import nn

import minillama

from ...adapters import lora
from .catalogue import catalogue, tables
from .judging import close
from .observing import Exercise, Piece, Wrong, calls, describe, fact, filled, floating, gradients, named
from .predictions import Question, moved

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one

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


BENT = "a non-linearity between A and B, as a bottleneck has one; LoRA's path is linear, which is why it can be merged"
LAID_OUT = "reshaped, by reshape or view, where .T is needed: the numbers are laid out anew and not turned"
LEFT_ON = "dropout in front of A in eval mode too; ask for it only while `self.training`, here not at all"
START = TABLES["start"]

PATHS = catalogue(lora, TABLES["paths"], wrap=path_of)
STARTS = catalogue(lora, START, wrap=start_of)
MERGES = catalogue(lora, TABLES["merges"], wrap=merged_by)
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


CONV1D = catalogue(right_merge_turned, TABLES["conv1d_all"])


def right_fused(A_q, B_q, A_v, B_v, alpha):
    zero = torch.zeros_like(B_q)
    A = torch.cat((A_q, A_v))
    B = torch.cat((torch.cat((B_q, zero), 1), torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)))
    return A, B, 2 * alpha


FUSED = catalogue(right_fused, TABLES["fused"])


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


LAYER = catalogue(Layer, TABLES["layer_all"])
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
