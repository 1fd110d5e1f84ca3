"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import contextlib

import torch
from torch import nn

from ...adapters import lora
from ...llama import LLaMAConfig
from .catalogue import catalogue, tables
from .judging import close
from .modules import merged, opened, reached, repeats, started, trained_numbers, trains
from .observing import Exercise, Piece, Wrong, calls, describe, filled, floating, gradients, named
from .predictions import moved, questions
from .wording import teller, wording

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
    return lambda linear, A, B, alpha: merged(module.LoRALinear(linear, A.shape[0], alpha), A, B)[0]


def start_of(module):
    """What the module's parameters start from, as a function of their sizes."""
    return lambda n_in, n_out, rank: started(module.LoRALinear(nn.Linear(n_in, n_out), rank))


PATHS = catalogue(lora, TABLES["paths"], wrap=path_of)
STARTS = catalogue(lora, TABLES["start"], wrap=start_of)
MERGES = catalogue(lora, TABLES["merges"], wrap=merged_by)
PLANTED = PATHS[:14] + STARTS[:3] + MERGES[:5]  # each must fail a test in the models

# ── what a start is made of, and what a path multiplies by ────────────────────────────────────────────────────────────


def begun(A, B, n_in, n_out, r):
    """Pieces of A and B at the start: which of them is 0, how many directions A reads. Wrong where a shape is."""
    for what, value, shape in (("A (r, in)", A, (r, n_in)), ("B (out, r)", B, (n_out, r))):
        found = tuple(value.shape) if floating(value) else None
        if found != shape:
            name = {shape[::-1]: "turned_round", (n_out, r): "exchanged"}.get(found, "shape")
            needed = f"needed is a float32 tensor of shape {shape} for in = {n_in}, out = {n_out} and r = {r}"
            raise Wrong(name, f"{what} is {describe(value)}; {needed}.")
        yield said(value.dtype == torch.float32, "start_dtype", f"{what} in float32", which=what, value=describe(value))
        yield said(0 in value.stride(), "expanded", f"whether {what} is expanded", which=what)
    zero = [not A.any(), not B.any()]
    name = "BothZero" if all(zero) else "WrongOneZero" if zero[0] else "BothRandom"
    yield said(zero[0] + 2 * zero[1], name, "which of the two is 0")
    yield said(len(torch.unique(A.detach(), dim=0)) < r, "equal_rows")
    yield said(not zero[0] and bool((A == 0).double().mean() > 0.5), "mostly_zero")
    rank = int(torch.linalg.matrix_rank(A.detach().double(), rtol=1e-4))
    yield said(rank, "low_rank", rank=rank, r=r)
    if A.numel() > 9999:  # enough of them to measure how they are spread
        deviation, mean = A.detach().double().std().item(), A.detach().double().mean().item()
        yield said(abs(mean) > 0.1 * deviation, "not_centred")
        times = deviation * (3 * n_in) ** 0.5  # 1 where drawn as nn.Linear draws; each known width is told apart
        which = next((i for i, n in enumerate((1, 6**0.5, (3 * n_in) ** 0.5)) if abs(times / n - 1) < 0.05), -1)
        yield said(which, "too_wide" if times > 1 else "too_narrow", "how wide A is", times=times)


def probe_start(answer, draw):
    for n_in, n_out, r in ((480, 250, 120), (300, 500, 64)):
        (_, A), (_, B) = named(("A (r, in)", "B (out, r)"), answer(n_in, n_out, r))
        yield from begun(A, B, n_in, n_out, r)
        yield said(repeats(answer, n_in, n_out, r), "same_A")
        yield Piece("A's shape, mean, width and rank", torch.tensor(A.shape))
        yield Piece("B (out, r)", B)


def multiplied(found, product, alpha, r, when=""):
    """Facts: what the product B A is multiplied by in what was found, and whether it is rounded there."""
    factor = right = alpha / r
    least = ((found * product).sum() / product.square().sum()).item()
    multiple = close(found, least * product)
    factor = least if abs(least) > 1e-3 and multiple else right
    what = f"{when}what B A is multiplied by"
    yield said(factor, "factor", what, when=when, factor=factor, right=right, alpha=alpha, r=r)
    yield said(not multiple and close(found, right * product, 0.01), "rounded", f"{when}rounded", when=when)


def steady(function, unseeded, x, dropout):
    """Facts: whether nothing is drawn at random, each token goes by itself, and the path is linear in x."""
    at, t, mixed = [function(z) for z in (0 * x, x, -2 * x)], x.shape[1] // 2, False
    one, other = [(torch.manual_seed(seed), unseeded(x))[1] for seed in (1, 2)]
    yield said(not close(one, other), dropout)
    with contextlib.suppress(Exception):  # it may stop where T is another; that is looked at later
        mixed = not close(function(x[-1:, t : t + 1]), at[1][-1:, t : t + 1])
    yield said(mixed, "mixed")
    yield said(not close(at[2] - at[0], -2 * (at[1] - at[0])), "activated")


def with_factor(probe, base, product):
    """The probe, and before it what B A is multiplied by: the result should be base(given) + α / r · product(given)."""

    def longer(answer, draw):
        given = probe.inputs(draw)
        A, alpha, r = given["A"], given["alpha"], len(given["A"])
        with torch.no_grad():
            result, plain = answer(*given.values()), base(given)
            if not floating(result) or result.shape != plain.shape:
                why = f"needed is a tensor of shape {tuple(plain.shape)}; it is {describe(result)}."
                raise Wrong("shape" if floating(result) else "no_tensor", why)
            for when, rows in (("", A), ("where two rows of A are equal ", A[[0, 0, 2]])):
                now = given | {"A": rows}
                yield from multiplied(answer(*now.values()) - plain, product(now), alpha, r, when)
            if "x" in given:
                calls = (lambda x, f=f: f(*(given | {"x": x}).values()) for f in (answer, answer.unseeded))
                yield from steady(*calls, given["x"], "LoRADropoutInEval")
        yield from probe(answer, draw)

    longer.inputs = probe.inputs
    return longer


def further_calls(answer, draw):
    """Facts of lora_linear: without a bias, where x asks for no gradient, and after steps that change A in place."""
    linear, x, A, B = filled(nn.Linear(6, 4, bias=False), draw), draw(2, 3, 6), draw(3, 6), draw(4, 3)
    try:
        out = answer(linear, x, A.requires_grad_(), B.requires_grad_(), 3.0)
    except Exception:  # whatever it is, for a mistake of the catalogue may stop with another
        raise Wrong("needs_a_bias", said.sentences["needs_a_bias"]) from None
    yield said(not all(z.any() for z in gradients(out, A, B)), "learns_with_x_alone")
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        linear, x = linear.to(dtype), x.to(dtype)
        path = x @ A.to(dtype).T @ B.to(dtype).T
        yield said(close(answer(linear, x, A, B, 3.0), linear(x) + path), "stale_path")
        A.data *= -2


# ── the path and the merges ───────────────────────────────────────────────────────────────────────────────────────────


def inputs_of_path(draw, n_in, n_out, r, alpha, **tokens):
    x = {"x": draw(*tokens.values(), n_in)} if tokens else {}
    return dict(linear=filled(nn.Linear(n_in, n_out), draw), **x, A=draw(r, n_in), B=draw(n_out, r), alpha=alpha)


def inputs_of_conv1d(draw, n_in, n_out, r, alpha):
    return dict(weight=draw(n_in, n_out), A=draw(r, n_in), B=draw(n_out, r), alpha=alpha)


SIZES = [dict(n_in=i, n_out=o, r=r, alpha=a) for i, o, r, a in ((10, 7, 3, 5.0), (6, 6, 4, 3.0), (5, 8, 1, 0.5))]
TOKENS = dict(B=2, T=5), dict(B=4, T=2), dict(B=1, T=1)


def right_merge_turned(weight, A, B, alpha):
    return weight + alpha / A.shape[0] * (B @ A).T


def right_fused(A_q, B_q, A_v, B_v, alpha):
    zero = torch.zeros_like(B_q)
    A = torch.cat((A_q, A_v))
    B = torch.cat((torch.cat((B_q, zero), 1), torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)))
    return A, B, 2 * alpha


def rows_of_change(result, n_in, n_out, r):
    """The change (α / rank) B A that A, B and α make, as the rows of query, key and value."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise Wrong("three_things", f"needed are A, B and the new α; it returned {describe(result)}.")
    A, B, alpha = result
    found = [tuple(z.shape) if floating(z) else None for z in (A, B)]
    if found != [(2 * r, n_in), (3 * n_out, 2 * r)]:
        known = {(3 * n_out, r): "not_as_wide", (2 * r, 3 * n_out): "turned_round",
                 (2 * n_out, 2 * r): "no_rows_for_keys", (2 * r, n_in): "exchanged"}  # fmt: skip
        name = "side_by_side" if found[0] == (r, 2 * n_in) else known.get(found[1], "shape")
        if floating(A) and found == [(len(A), n_in), (3 * n_out, len(A))]:
            name = "another_rank"
        why = said.sentences.get(name, "")
        needed = f"for paths of rank {r} from {n_in} inputs to {n_out} outputs needed are ({2 * r}, {n_in}) and "
        raise Wrong(name, f"{why} A and B are {found[0]} and {found[1]}; {needed}({3 * n_out}, {2 * r}).".lstrip())
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
    rows = torch.cat((query, key, value))
    yield said(bool(rows.any() and not rows[1::3].any()), "interleaved")
    yield said(bool(key.any()), "keys_changed")
    yield said(bool(query.any() and not value.any()), "no_value")
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
said = teller(wording(__file__)["said"], (*PATHS, *STARTS, *LAYER))


def probe_layer(answer, draw):
    for sizes in ((2, 5), 10, 7, 3, 5.0), ((3, 2), 6, 6, 4, 3.0), ((1, 1), 5, 8, 1, 0.5), ((1, 2), 300, 250, 64, 5.0):
        yield from facts_of_layer(answer, draw, *sizes)


def facts_of_layer(answer, draw, tokens, n_in, n_out, r, alpha):
    """One after another, in the order in which they are to be mended."""
    linear, x = filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), draw(*tokens, n_in)
    twin = answer(filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), r, alpha)
    layer = answer(linear, r, alpha)
    if not isinstance(layer, nn.Module) or not {"A", "B"} <= {name for name, _ in layer.named_parameters()}:
        raise Wrong("form", f"needed is a module with the parameters A and B; it is {describe(layer)}.")
    layer.eval(), twin.eval()
    before, plain = linear.weight.detach().clone(), linear(x).detach()

    def only_path_trains(name="BaseStillTrains"):
        yield trains({"A": layer.A, "B": layer.B})
        more = [p for own, p in layer.named_parameters() if p.requires_grad and own not in ("A", "B")]
        yield said(any(p is linear.weight or p is linear.bias for p in more), name)
        yield said(len(more), "third_trains")

    def output(times):
        """With B multiplied by a number, by which a path shows."""
        layer.B.data = times * B
        out = layer(x).detach()
        layer.B.data = B.clone()
        return out

    yield from only_path_trains()
    yield said(bool(layer.A.any() and layer.B.any()), "RandomB")
    yield from begun(layer.A, layer.B, n_in, n_out, r)
    fresh = layer(x)
    yield said(linear.weight.requires_grad and reached(fresh, linear.weight), "BaseStillTrains")
    if not floating(fresh) or fresh.shape != plain.shape:
        raise Wrong("no_output", f"needed is a tensor of shape {tuple(plain.shape)}; it is {describe(fresh)}.")
    yield said(close(fresh.detach(), plain), "not_the_base")
    yield said(close(layer.train()(x).detach(), plain), "drops_base")
    layer.eval()
    A, B = draw(r, n_in), draw(n_out, r)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    out, product = layer(x).detach(), x.detach() @ A.T @ B.T
    yield from steady(layer, layer.forward, x.detach(), "DropoutStays")
    yield from multiplied(out - plain, product, alpha, r)
    yield from opened(layer, {"A": layer.A, "B": layer.B}, "", x, when="with an open path ", axes="(B, T, out)")
    try:
        layer.unmerge()
    except Exception as error:
        why = said.sentences["UnmergesUnmerged"]
        raise Wrong("UnmergesUnmerged", f"{why} It stopped with {error!r}.") from None
    yield said(torch.equal(layer(x), out), "UnmergesUnmerged")
    layer.merge()
    folded, twice = layer(x).detach(), plain + 2 * alpha / r * product
    yield said(torch.equal(layer.A, A) and torch.equal(layer.B, B), "path_lost")
    yield said(close(folded, twice), "PathOnTop")
    yield said(close(folded, plain), "MergeFlagsOnly")
    yield from multiplied(folded - plain, product, alpha, r, "after merge() ")
    yield Piece("the output after merge() (B, T, out)", folded)
    yield from only_path_trains("merged_trains")
    yield said(close(output(2), folded), "still_a_path")
    yield said(close(layer.train()(x).detach(), folded), "path_in_training")
    layer.eval()
    for name in ("KeptIsNoCopy", "CopyOverwritten"):
        layer.unmerge()
        again = layer(x).detach()
        yield said(close(again, plain), "StaysMerged")
        yield said(close(again, twice), name)
        yield said(close(output(0), plain, 0.01), "NeverUnmerges")
        yield said(close(again, out, 1e-5), "copy_rounded")
        if name == "KeptIsNoCopy":
            layer.merge()
            layer.merge()
            yield said(close(layer(x).detach(), folded), "MergesTwice")
            yield said(close(output(2), folded), "toggles")
    yield said(torch.equal(linear.weight, before) and torch.equal(again, out), "UnmergeSubtracts")
    yield from only_path_trains()
    yield from opened(layer, {"A": layer.A, "B": layer.B}, "", x, when="after unmerge() ", axes="(B, T, out)")
    A, B = draw(r, n_in), draw(n_out, r)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    layer.train().merge()
    changed = layer.eval()(x).detach()
    yield said(close(output(2), changed), "in_eval_only")
    yield said(close(changed, folded), "stale")
    yield Piece("the output after more training and another merge() (B, T, out)", changed)
    twin.A.data, twin.B.data = draw(r, n_in), draw(n_out, r)
    layer.unmerge()
    out, others = layer(x), twin(x)
    layer.merge()
    alone = twin(x)
    twin.merge()
    layer.unmerge()
    yield said(close(alone, others) and close(layer(x), out) and close(twin(x), others), "shared")


def rank_of(changes):
    """The rank of the sum of so many changes (α / r) B A with r = 4."""
    torch.manual_seed(0)
    B, A = (torch.randn(changes, *shape, dtype=torch.float64) for shape in ((48, 4), (4, 64)))
    return int(torch.linalg.matrix_rank((16 / 4 * B @ A).sum(0)))


EXERCISES = {
    "lora_start": Exercise(
        "lora_start(in_features, out_features, rank) -> A (r, in), B (out, r)", start_of(lora), STARTS, probe_start,
    ),
    **questions(
        lora_moves_first=moved("lora", rank=2, steps=1),
        lora_moves_second=moved("lora", rank=2, steps=2),
        lora_parameters=lambda: trained_numbers(LLaMAConfig(), "lora", rank=8),
        lora_rank=lambda: rank_of(1),
        lora_rank_of_two=lambda: rank_of(2),
    ),
    "lora_linear": Exercise(
        "lora_linear(linear, x, A, B, alpha) -> (B, T, out)", path_of(lora), PATHS,
        with_factor(calls(inputs_of_path, "the output (B, T, out)", [a | b for a, b in zip(TOKENS, SIZES)], ("A", "B"),
                          last=further_calls),
                    lambda of: of["linear"](of["x"]), lambda of: of["x"] @ of["A"].T @ of["B"].T),
    ),
    "lora_merge": Exercise(
        "lora_merge(linear, A, B, alpha) -> weight (out, in)", merged_by(lora), MERGES,
        with_factor(calls(inputs_of_path, "the merged weight (out, in)", SIZES, ("A", "B"), gradient=False),
                    lambda of: of["linear"].weight, lambda of: of["B"] @ of["A"]),
    ),
    "lora_merge_conv1d": Exercise(
        "lora_merge_conv1d(weight, A, B, alpha) -> weight (in, out)", right_merge_turned,
        catalogue(right_merge_turned, TABLES["conv1d_all"]),
        with_factor(calls(inputs_of_conv1d, "the merged weight (in, out)", SIZES, half=False, gradient=False),
                    lambda of: of["weight"], lambda of: (of["B"] @ of["A"]).T),
    ),
    "lora_fused": Exercise(
        "lora_fused(A_q, B_q, A_v, B_v, alpha) -> A (2r, in), B (3 · out, 2r), alpha", right_fused,
        catalogue(right_fused, TABLES["fused"]), probe_fused,
    ),
    "lora_layer": Exercise(
        "a class: LoRALayer(linear, rank, alpha) with merge() and unmerge(), called as layer(x) -> (B, T, out)",
        Layer, LAYER, probe_layer,
    ),
}  # fmt: skip
