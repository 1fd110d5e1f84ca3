"""Lesson 09: operations and bytes by hand, gradients of several processes, blocks of 8 bits, a card's memory."""

import torch

from ...llama import LLaMAConfig
from .catalogue import catalogue, tables
from .modules import trained_numbers
from .observing import Exercise, Piece, Wrong, calls, describe
from .predictions import questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one

# ── operations and bytes ──────────────────────────────────────────────────────────────────────────────────────────────


def right_forward(config, tokens):
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = D * H * d + D * G * d + D * G * d + H * d * D  # q, k, v, o
    matrices = L * (attention + 3 * D * F) + D * config.vocab_size
    scores = L * 4 * H * d * tokens * tokens
    return 2 * matrices * tokens + scores


def right_step(layer, layers, head, adapted, tokens, answers, frozen):
    forward = 2 * layers * layer * tokens + 2 * head * answers
    if not frozen:
        return 3 * forward
    backward = 2 * adapted * layer * tokens + 2 * head * answers
    return forward + backward


def right_decoding(config, rows, context, size):
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = 2 * D * H * d + 2 * D * G * d
    matrices = L * (attention + 3 * D * F) + D * config.vocab_size
    cache = 2 * L * G * d * context * rows
    return size * (matrices + cache)


def shaped(draw, V, D, F, L, H, G, d, **others):
    return dict(config=LLaMAConfig(V, D, F, L, H, G, d), **others)


SHAPES = [
    dict(V=23, D=14, F=19, L=3, H=6, G=2, d=4),
    dict(V=40, D=8, F=30, L=5, H=3, G=1, d=6),
    dict(V=11, D=6, F=7, L=1, H=1, G=1, d=2),
]


def given(draw, **sizes):
    return sizes


def numbers(inputs, what, sizes):
    return calls(inputs, what, sizes, half=False, gradient=False)


STEPS = [
    dict(layer=700, layers=5, head=90, adapted=3, tokens=11, answers=4, frozen=True),
    dict(layer=700, layers=5, head=90, adapted=3, tokens=11, answers=4, frozen=False),
    dict(layer=64, layers=4, head=130, adapted=4, tokens=7, answers=7, frozen=True),
    dict(layer=50, layers=1, head=10, adapted=1, tokens=1, answers=1, frozen=True),
]

# ── the roofline ──────────────────────────────────────────────────────────────────────────────────────────────────────


def right_seconds(operations, moved, ceiling, bandwidth):
    return max(operations / ceiling, moved / bandwidth)


def probe_seconds(answer, draw):
    for i, case in enumerate(
        ((6e12, 4e9, 2e12, 1e9), (6e12, 1e9, 2e12, 1e9), (5.0, 0.0, 2.0, 3.0), (3e9, 7e9, 1e12, 2e10))
    ):
        found = answer(*case)
        try:
            found = torch.tensor(float(found), dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong("form", f"needed is a number of seconds; it returned {describe(found)}.") from None
        yield Piece(
            "the least time in seconds", found, f"for operations = {case[0]:g} and moved = {case[1]:g}" if i else ""
        )


# ── several processes, fewer bits, a card's memory ────────────────────────────────────────────────────────────────────


def right_combined(gradients, targets):
    everywhere = sum(targets)
    return sum(number / everywhere * gradient for gradient, number in zip(gradients, targets))


def inputs_of_combined(draw, targets, N):
    return dict(gradients=[draw(N) for _ in targets], targets=list(targets))


def right_quantise(weight):
    blocks = weight.unflatten(1, (-1, 32))  # (out, in / 32, 32)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scales).nan_to_num(0).round().to(torch.int8)
    return codes.flatten(1), scales.squeeze(-1).to(torch.float16)


def inputs_of_quantise(draw, n_out, n_in, zeros):
    weight = draw(n_out, n_in) * draw(n_out, n_in).exp()  # blocks of unlike height
    weight[:zeros, :32] = 0
    return dict(weight=weight)


def right_dequantise(codes, scales):
    blocks = codes.unflatten(1, (-1, 32)).float()
    return (blocks * scales.float().unsqueeze(-1)).flatten(1)


def inputs_of_dequantise(draw, n_out, n_in):
    codes = (40 * draw(n_out, n_in)).round().clamp(-127, 127).to(torch.int8)
    return dict(codes=codes, scales=draw(n_out, n_in // 32).abs().to(torch.float16))


def right_card(weights, layer, kept, cards, sharded):
    if not sharded:
        return weights + kept
    return weights // cards + 2 * layer + kept


CARDS = [
    dict(weights=8400, layer=130, kept=2700, cards=4, sharded=True),
    dict(weights=8400, layer=130, kept=2700, cards=4, sharded=False),
    dict(weights=600, layer=50, kept=11, cards=2, sharded=True),
]

# ── the exercises ─────────────────────────────────────────────────────────────────────────────────────────────────────

EXERCISES = {
    "forward_flops": Exercise(
        "forward_flops(config, tokens) -> a whole number", right_forward,
        catalogue(right_forward, TABLES["forward"]),
        numbers(shaped, "the operations", [dict(size, tokens=t) for size, t in zip(SHAPES, (5, 9, 1))]),
    ),
    "step_flops": Exercise(
        "step_flops(layer, layers, head, adapted, tokens, answers, frozen) -> a whole number", right_step,
        catalogue(right_step, TABLES["step"]), numbers(given, "the operations", STEPS),
    ),
    "decoding_bytes": Exercise(
        "decoding_bytes(config, rows, context, size) -> a whole number", right_decoding,
        catalogue(right_decoding, TABLES["decoding"]),
        numbers(shaped, "the bytes", [
            dict(size, rows=rows, context=S, size=n)
            for size, rows, S, n in zip(SHAPES, (3, 2, 1), (7, 50, 1), (2, 4, 1))
        ]),
    ),
    "least_seconds": Exercise(
        "least_seconds(operations, moved, ceiling, bandwidth) -> seconds", right_seconds,
        catalogue(right_seconds, TABLES["seconds"]), probe_seconds,
    ),
    "combined_gradient": Exercise(
        "combined_gradient(gradients, targets) -> (N)", right_combined,
        catalogue(right_combined, TABLES["combined"]),
        numbers(inputs_of_combined, "the gradient (N)", [
            dict(targets=(5, 1, 10), N=6), dict(targets=(0, 3), N=4), dict(targets=(2, 2, 2, 2), N=3),
            dict(targets=(7,), N=1),
        ]),
    ),
    "quantise_rows": Exercise(
        "quantise_rows(weight) -> codes (out, in), scales (out, in / 32)", right_quantise,
        catalogue(right_quantise, TABLES["quantise"]),
        numbers(inputs_of_quantise, ("codes (out, in)", "scales (out, in / 32)"), [
            dict(n_out=40, n_in=96, zeros=0), dict(n_out=5, n_in=64, zeros=2), dict(n_out=64, n_in=32, zeros=1),
            dict(n_out=1, n_in=32, zeros=0),
        ]),
    ),
    "dequantise_rows": Exercise(
        "dequantise_rows(codes, scales) -> (out, in)", right_dequantise,
        catalogue(right_dequantise, TABLES["dequantise"]),
        numbers(inputs_of_dequantise, "the matrix (out, in)", [
            dict(n_out=6, n_in=96), dict(n_out=3, n_in=64), dict(n_out=1, n_in=32),
        ]),
    ),
    "memory_a_card": Exercise(
        "memory_a_card(weights, layer, kept, cards, sharded) -> a whole number", right_card,
        catalogue(right_card, TABLES["card"]), numbers(given, "the bytes", CARDS),
    ),
    **questions(
        full_over_frozen=lambda: right_step(9, 7, 5, 7, 3, 3, False) / right_step(9, 7, 5, 7, 3, 3, True),
        decoding_rate=lambda: 4.2e12 / 13.2e9,
        decoding_rows=lambda: 8,
        run_twice=lambda: frozenset(("q_proj", "v_proj", "o_proj")),  # the lesson counts the rows of each
        message=lambda: 4 * trained_numbers(LLaMAConfig(), "llama_adapter"),
    ),
}  # fmt: skip
