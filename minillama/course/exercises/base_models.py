"""Lesson 01: the parts of a LLaMA and of a GPT-2, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F

import minillama

from ...attention import Attention, RoPE, rotate
from ...llama import RMSNorm
from ..papers import smollm2
from .catalogue import catalogue, tables
from .observing import Exercise, Piece, calls, describe, fact, filled, floating, gradients, in_bfloat16, named
from .predictions import questions

# The mistakes, in the Markdown file beside this one. They edit no shipped module; what puts them in a part's place is
# tests/test_base_model_mistakes.py.
TABLES = tables(__file__)


def rms_norm(x, weight, eps):
    x32 = x.float()
    mean_square = x32.pow(2).mean(-1, keepdim=True)  # (B, T, 1)
    return (x32 / torch.sqrt(mean_square + eps) * weight).to(x.dtype)


def more_of_rms_norm(answer, draw):
    x, weight = draw(2, 5, 8), draw(8)
    yield Piece("the output (D)", answer(x[0, 0], weight, 0.3), "for one vector, x (D,),")
    yield Piece("the output (B, T, D)", answer(torch.zeros(1, 2, 8), weight, 1e-6), "for zeros")
    yield Piece("the output (B, T, D)", answer(1e-4 * x, weight, 1e-9), "for a small x and a small eps")
    large = answer((400 * x).half(), weight.half(), 0.3)
    why = f"{str(large.dtype)[6:]} returned for a float16 input; cast back with .to(x.dtype)."
    yield fact(large.dtype == torch.float16, "left_in_another_dtype", why, "the dtype in float16")
    lost = not large.isfinite().all() or bool(large.abs().max() < 0.01)
    squares = next(row for row in TABLES["rms_norm"] if row[0] == "squares_in_half_precision")
    overflow = squares[0], f"this equals a known mistake: {squares[-1]}."
    yield fact(lost, *overflow)
    tiny = answer(torch.full((1, 1, 8), 1e-8), torch.ones(8), 0.3).abs().max() > 3e-7
    yield fact(tiny, "eps_hard_coded", "a tiny x comes out large; eps, which is given, keeps it small.", "a tiny x")
    for dtype in (torch.bfloat16, torch.float16):
        x, one = draw(512, 8).index_fill(1, torch.tensor(0), 1.0).to(dtype), torch.ones(8, dtype=dtype)
        off = answer(x[None], one, 0.3)[0, :, 0] != rms_norm(x, one, 0.3)[:, 0]  # what 1 becomes, to the last digit
        yield fact(off.float().mean() > 0.02, *overflow, f"last digits in {dtype}")


probe_rms_norm = calls(
    lambda draw, B, T, D, eps: dict(x=draw(B, T, D) + 0.5, weight=draw(D), eps=eps), "the output (B, T, D)",
    (dict(B=2, T=5, D=8, eps=0.3), dict(B=3, T=3, D=3, eps=0.05), dict(B=1, T=1, D=6, eps=2.0)),
    again={}, last=more_of_rms_norm,
)  # fmt: skip


def rope(x, positions, theta):
    d = x.shape[-1]
    speeds = theta ** -(torch.arange(0, d, 2).float() / d)  # (d/2,) radians a position
    angle = positions[:, None].float() * speeds  # (T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)  # (B, H, T, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


probe_rope = calls(
    lambda draw, B, H, T, d, theta, start: dict(
        x=draw(B, H, T, d), positions=start + 7 * torch.arange(T) % 11, theta=theta,  # not in order, with gaps
    ), "the output (B, H, T, d)", (
        dict(B=2, H=3, T=5, d=8, theta=100.0, start=2), dict(B=1, H=2, T=4, d=6, theta=20000.0, start=301),
        dict(B=3, H=4, T=4, d=4, theta=500.0, start=0), dict(B=1, H=2, T=3, d=16, theta=10000.0, start=1200),
        dict(B=1, H=1, T=1, d=2, theta=50.0, start=2049),
    ), again=dict(theta=30.0, start=40),
)  # fmt: skip


def grouped_query_attention(q, k, v):
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))  # (B, H, T, d)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ v


def attention_of_one_token(answer, draw):
    """And of very low scores; without gradients: those of q and k are 0 up to rounding."""
    for B, H, G, d in ((2, 6, 2, 8), (1, 1, 1, 3)):
        out = answer(draw(B, H, 1, d), draw(B, G, 1, d), draw(B, G, 1, d))
        yield Piece("the output (B, H, T, d)", out, f"for B = {B}, H = {H}, G = {G}, T = 1, d = {d}")
    q, k = (draw(1, 1, 3, 4).index_fill(3, torch.tensor(0), number) for number in (-12.0, 13.0))  # scores near -78
    yield Piece("the output (B, H, T, d)", answer(q, k, draw(1, 1, 3, 4)), "where all scores lie far below 0")


probe_attention = calls(
    lambda draw, B, H, G, T, d: dict(q=draw(B, H, T, d), k=draw(B, G, T, d), v=draw(B, G, T, d)),
    "the output (B, H, T, d)", (
        dict(B=2, H=6, G=2, T=5, d=8), dict(B=3, H=4, G=4, T=3, d=6), dict(B=1, H=4, G=1, T=4, d=4),
        dict(B=1, H=2, G=1, T=20, d=2), dict(B=1, H=1, G=1, T=2, d=1),
    ), again={}, last=attention_of_one_token,
)  # fmt: skip


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


probe_swiglu = calls(
    lambda draw, B, T, D, F: dict(x=draw(B, T, D), gate=draw(F, D) / 2, up=draw(F, D) / 2, down=draw(D, F) / 3),
    "the output (B, T, D)", (dict(B=2, T=5, D=8, F=12), dict(B=3, T=2, D=4, F=4), dict(B=1, T=1, D=3, F=1)), again={},
)  # fmt: skip


def split_fused(weight, bias):
    matrices = torch.stack([part.T for part in weight.chunk(3, 1)])  # (3, D, D)
    return matrices, torch.stack(bias.chunk(3))


probe_split = calls(
    lambda draw, D: dict(weight=draw(D, 3 * D), bias=draw(3 * D)),
    ("the three matrices (3, D, D)", "the three biases (3, D)"), [dict(D=D) for D in (8, 6, 1)], again={},
)  # fmt: skip


def cached_attention(attention, x, past):
    S, T = 0 if past is None else past[0].shape[2], x.shape[1]
    q, k, v = attention.project(x, S + torch.arange(T))
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, G, S + T, d)
    all_k, all_v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    scores = q @ all_k.mT / q.shape[-1] ** 0.5  # (B, H, T, S + T)
    hidden = torch.ones(scores.shape[-2:]).triu(S + 1).bool()
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ all_v
    return attention.output(y), (k, v)


def pair(result):
    """The output and the cache that an answer returned."""
    (_, out), (_, past) = named(("the output", "the cache"), result)
    return out, tuple(value for _, value in named(("keys", "values"), list(past) if floating(past) else past))


def probe_cached(answer, draw):
    for halved in (False, True):
        for B, D, H, G, d, *portions in (2, 40, 6, 2, 8, 4, 3, 1), (1, 10, 3, 3, 4, 1, 2, 2), (3, 6, 4, 1, 2, 2, 1, 9):
            attention, past, xs = filled(Attention(D, H, G, d, RoPE(d, 50.0 * H), bias=True), draw), None, []
            attention = in_bfloat16(attention) if halved else attention
            for T in portions:
                S = sum(x.shape[1] for x in xs)
                where = f"for H = {H}, G = {G}, d = {d}, " * (D < 40)
                where += f"of {T} token{'s' * (T > 1)}" + f" behind {S} cached" * (S > 0) + ", in bfloat16" * halved
                xs.append(in_bfloat16(draw(B, T, D)) if halved else draw(B, T, D))
                xs[-1].requires_grad_()
                out, past = pair(answer(attention, xs[-1].clone(), past))
                yield Piece("the output (B, T, D)", out, where)
                yield from (Piece(f"the {kind} (B, G, S, d)", z, where) for kind, z in zip(("keys", "values"), past))
                # a single token that sees one key has no gradient but rounding; what came first, through the cache
                for x, of in ((xs[-1], "x"),) * (T > 1) + ((xs[0], "past"),) * (S > 0):
                    found = gradients(out, x)[0]
                    yield Piece(f"the gradient with respect to {of}", found, where, "gradient", of)
        if not halved:
            yield from probe_turns(answer, draw)


def probe_turns(answer, draw):
    """Two texts by turns, then the same past twice: whatever is kept between calls is another's."""
    attention, pasts = filled(Attention(40, 6, 2, 8, RoPE(8, 70.0), bias=True), draw), [None, None]
    for i, T in ((0, 4), (1, 2), (0, 3), (1, 3), (1, 1), (1, 1)):
        out, past = pair(answer(attention, draw(2, T, 40), pasts[i]))
        yield Piece("the output (B, T, D)", out, "where two texts take turns, each with its past given again")
        pasts[i] = past if T > 1 else pasts[i]


probe_cached.told = True


def answer_labels(prompt_ids, answer_ids):
    ids = torch.tensor(prompt_ids + answer_ids)
    labels = torch.tensor([-100] * len(prompt_ids) + answer_ids)
    return ids, labels


def probe_labels(answer, draw):
    long, first = [i * i % 53 for i in range(90)], []
    for prompt, reply in (([5, 9, 7, 5], [7, 0, 3]), ([4], [6, 2, 6, 4, 8, 2, 1]), ([3, 0, 8, 2, 6], [9]), ([2], [2]),
                          (long[:50], long[50:]), ([1, 2, 3, 4], [5, 6, 7])):  # fmt: skip
        given = list(prompt), list(reply)
        result = answer(*given)
        why = "your function changes a list it was given (`+=` lengthens it): write prompt_ids + answer_ids, a new one."
        yield fact(given != (prompt, reply), "in place", why)
        for what, value in named(("ids (T)", "labels (T)"), result):
            why = f"{what} should be a tensor of whole numbers, torch.int64; it is {describe(value)}."
            yield fact(getattr(value, "dtype", None) == torch.int64, "not_int64", why, f"whether {what} is int64")
            yield Piece(what, value, f"for {len(prompt)} + {len(reply)} ids" if first else "")
        first = first or result
    for what, value in zip(("ids (T)", "labels (T)"), first):
        yield Piece(what, value, "of the first call, looked at again at the end")


def cache_numbers():
    """How many numbers SmolLM2-135M's cache holds for one token."""
    with minillama.device.shapes_only():
        model, cache = smollm2(), minillama.Cache()
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    return sum(layer.k.numel() + layer.v.numel() for layer in cache.layers)


@torch.no_grad()
def shifted(family, config, by=100):
    """Whether the logits stay the same when every position is `by` further on: "same" or "different"."""
    torch.manual_seed(0)
    model, ids, cache = family(config(31, 16, 32, 2, 2)), torch.randint(0, 31, (1, 6)), minillama.Cache()
    cache.length = by  # as many tokens before these, none of which is kept
    return "same" if torch.allclose(model(ids), model(ids, cache=cache), atol=1e-3) else "different"


INSTEAD = "does what you are to write here; do without it"
SIDE_BY_SIDE = "Which key head belongs to which query head? With H = 6 and G = 2: a a a b b b."
FUSED = F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention
FUSED_ATTENTION = *FUSED, torch._scaled_dot_product_attention_math
FORBIDDEN = {
    rms_norm: dict.fromkeys((F.rms_norm, torch.rms_norm), f"F.rms_norm, which nn.RMSNorm calls too, {INSTEAD}")
    | {RMSNorm.forward: f"minillama's RMSNorm {INSTEAD}"},
    rope: {rotate: f"attention.rotate {INSTEAD}", RoPE.__call__: f"attention.RoPE {INSTEAD}"},
    grouped_query_attention: dict.fromkeys(FUSED_ATTENTION, f"scaled_dot_product_attention {INSTEAD}")
    | {Attention.attend: f"attention.attend {INSTEAD}"},
    cached_attention: {Attention.attend: f"attention.attend, which attention(…) calls too, {INSTEAD}"},
}
EXERCISES = {
    right.__name__: Exercise(
        right.__name__ + call, right, catalogue(right, TABLES[right.__name__]), probe,
        hints={"H": SIDE_BY_SIDE} if right is grouped_query_attention else {}, forbidden=FORBIDDEN.get(right, {}),
    )
    for right, call, probe in (
        (rms_norm, "(x, weight, eps) -> (B, T, D)", probe_rms_norm),
        (rope, "(x, positions, theta) -> (B, H, T, d)", probe_rope),
        (grouped_query_attention, "(q, k, v) -> (B, H, T, d)", probe_attention),
        (swiglu, "(x, gate, up, down) -> (B, T, D)", probe_swiglu),
        (split_fused, "(weight, bias) -> matrices (3, D, D), biases (3, D)", probe_split),
        (cached_attention, "(attention, x, past) -> output (B, T, D), (keys, values)", probe_cached),
        (answer_labels, "(prompt_ids, answer_ids) -> ids (T,), labels (T,)", probe_labels),
    )
} | questions(
    cache_numbers=cache_numbers,
    shifted_llama=lambda: shifted(minillama.LLaMA, minillama.LLaMAConfig),
    shifted_gpt2=lambda: shifted(minillama.GPT2, minillama.GPT2Config),
)  # fmt: skip
