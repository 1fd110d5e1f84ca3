"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import torch
from torch import nn

from ...adapters import lora
from ...llama import LLaMAConfig
from .catalogue import catalogue, tables
from .judging import close
from .lora_layer import LAYER, Layer, begun, multiplied, probe_layer, said, steady
from .modules import merged, repeats, started, trained_numbers
from .observing import Exercise, Piece, Wrong, calls, describe, filled, floating, gradients, named
from .predictions import moved, questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one


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


def probe_start(answer, draw):
    for n_in, n_out, r in ((480, 250, 120), (300, 500, 64)):
        (_, A), (_, B) = named(("A (r, in)", "B (out, r)"), answer(n_in, n_out, r))
        yield from begun(A, B, n_in, n_out, r)
        yield said(repeats(answer, n_in, n_out, r), "same_A")
        yield Piece("A's shape, mean, width and rank", torch.tensor(A.shape))
        yield Piece("B (out, r)", B)


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
