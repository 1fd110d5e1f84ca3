"""Lesson 04: IA3, with the wrong versions that one writes easily."""

import copy
import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters import ia3
from ...attention import RoPE, rotate
from ...gpt2 import GPT2, GPT2Config
from ...llama import Layer, LLaMA, LLaMAConfig
from .catalogue import catalogue, tables
from .modules import merged, started, trained_numbers
from .observing import Exercise, Wrong, called, calls, describe, fact, filled, in_bfloat16, teller
from .predictions import questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one


def start_of(module):
    return lambda linear, side: started(module.IA3Linear(linear, side))[0]


def merge_of(module):
    return lambda linear, scale, side: tuple(z.clone() for z in merged(module.IA3Linear(linear, side), scale))


STARTS = catalogue(ia3, TABLES["starts"], wrap=start_of)
MERGES = catalogue(ia3, TABLES["merges"], wrap=merge_of)
PLANTED = catalogue(ia3, TABLES["planted"]) + STARTS + MERGES[:3]  # each must fail a test where it stands in the models
HARMLESS = {"BiasUnscaled": ("llama",), "MergeForgetsBias": ("llama",), "attach_to_queries": ("gpt2",)}


def right_linear(linear, x, scale, side):
    scale = scale.to(x.dtype)
    return linear(x) * scale if side == "output" else linear(x * scale)


def right_mixed(linear, x, scales, rows, side):
    scale = scales[rows][:, None].to(x.dtype)  # (B, 1, features)
    return linear(x) * scale if side == "output" else linear(x * scale)


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
                if piece.kind == "value" and isinstance(piece.value, torch.Tensor):
                    memory = {tensor.untyped_storage().data_ptr() for tensor in given["linear"].parameters()}
                    yield said(piece.value.untyped_storage().data_ptr() in memory, "the_bases_own")

    return probe


def read(answer, given, *names):
    """Pieces of calls with other numbers in each of these inputs, at the same sizes: whether they are read."""

    def results(**changed):
        out = answer(*(v.detach() if isinstance(v, torch.Tensor) else v for v in (given | changed).values()))
        return out if isinstance(out, tuple | list) else [out]

    before = results()
    for name in (name for name in names if name in given):
        now, other = results(**{name: 10 * given[name]}), f"other numbers in {name}"
        why = f"{other} make no difference: they are not read, or those of an earlier call are kept."
        yield fact(torch.equal(before[0], now[0]), "unread", why)
        for value in now:
            yield fact(value, "unread", f"right at first, and wrong with {other}: is something kept, or cut off?")


def sizes(names, *rows):
    """At the first of them what is on the wrong side, or along the wrong axis, runs too."""
    return [dict(zip(names.split(), row)) for row in rows]


def inputs_of_linear(draw, side, *sizes):
    *tokens, n_in, n_out = sizes  # B and T, where there are tokens
    linear, scale = filled(nn.Linear(n_in, n_out), draw), draw(n_out if side == "output" else n_in)
    x = {"x": draw(*tokens, n_in)} if tokens else {}
    return dict(linear=linear, **x, scale=scale, side=side)


def inputs_of_mixed(draw, side, B, T, N, n_in, n_out):
    linear, scales = filled(nn.Linear(n_in, n_out), draw), draw(N, n_out if side == "output" else n_in)
    rows = torch.tensor([2, 0, 4, 0, 1, 2, 0])[:B]  # sorted by an order that is not its own inverse
    return dict(linear=linear, x=draw(B, T, n_in), scales=scales, rows=rows, side=side)


said = teller(TABLES, "starts")


def probe_start(answer, draw):
    for (n_in, n_out, dtype), side in itertools.product(((10, 7, torch.bfloat16), (5, 8, torch.float32)), ia3.SIDES):
        linear = filled(nn.Linear(n_in, n_out), draw).to(dtype)
        nn.init.zeros_(linear.weight[:2, :2])  # by which nothing can be divided
        scale, again = answer(linear, side), answer(copy.deepcopy(linear), side)
        if not isinstance(scale, torch.Tensor):
            raise Wrong("form", f"the vector should be a tensor; it is {describe(scale)}.")
        needed, other = (n_out, n_in) if side == "output" else (n_in, n_out)
        if scale.shape != (needed,):
            name = "start_other_side" if scale.shape == (other,) else "start_shape"
            at = f"for Linear({n_in}, {n_out}) and side {side!r} needed is {(needed,)}"
            raise Wrong(name, f"the vector has shape {tuple(scale.shape)}; {at}: {said.sentences[name]}")
        yield said(scale.dtype != torch.float32, "start_dtype", dtype=str(scale.dtype)[6:])
        numbers = scale.detach().double()
        name = "start_not_one" if numbers.any() else "ZeroScale"
        yield said(not (numbers == 1).all(), name, least=numbers.min().item(), most=numbers.max().item())
        yield said(scale.is_inference(), "start_inference")
        yield said(scale.untyped_storage().data_ptr() == again.untyped_storage().data_ptr(), "start_shared")
        yield said(0 in scale.stride(), "start_expanded")


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


def inputs_of_layer(draw, B, T, D, H, G, d, F):
    """A frozen block with biases everywhere."""
    config = LLaMAConfig(31, D, F, 1, H, G, d, rms_norm_eps=0.2, attention_bias=True, mlp_bias=True)
    layer, positions = filled(Layer(config, RoPE(d, theta=60.0)), draw), torch.tensor([3, 4, 7, 8, 12])[:T]
    return dict(layer=layer, x=draw(B, T, D), positions=positions, l_k=draw(G * d), l_v=draw(G * d), l_ff=draw(F))


def probe_layer(answer, draw):
    shapes = sizes("B T D H G d F", (2, 5, 24, 3, 3, 8, 24), (3, 4, 20, 6, 2, 4, 40), (1, 1, 16, 2, 1, 6, 10))
    once, vectors = ("layer.self_attn.o_proj", "layer.mlp.down_proj"), ("l_k", "l_v", "l_ff")
    yield from read(answer, inputs_of_layer(draw, **shapes[0]), "positions", *vectors)
    yield from calls(inputs_of_layer, "the output (B, T, D)", shapes, float32=vectors, once=once)(answer, draw)


def moved_to_queries(model_class, config_class, paired=False):
    """Whether a model answers the same, to rounding, when l_k stands on the queries instead of the keys."""

    def truth():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = filled(model_class(config_class(31, 16, 24, 2, 2)).double(), torch.randn)
            ids, vectors, logits = torch.arange(12).view(2, 6), torch.randn(2, 2, 2, 4), []  # (L, heads, 2, d/2)
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


SMOLLM2 = LLaMAConfig(49152, 960, 2560, 32, 15, 5)  # of 360M parameters
EXERCISES = {
    "ia3_linear": Exercise(
        'ia3_linear(linear, x, scale, side) -> (B, T, out), side "output" or "input"', right_linear,
        catalogue(right_linear, TABLES["ia3_linear"]), on_both_sides(inputs_of_linear, "the output (B, T, out)",
        sizes("B T in out", (2, 5, 9, 9), (3, 4, 10, 7), (1, 1, 5, 8))),
    ),
    "ia3_start": Exercise(
        "ia3_start(linear, side) -> the vector (features) that training begins with", start_of(ia3), STARTS, probe_start
    ),
    "ia3_merge": Exercise(
        "ia3_merge(linear, scale, side) -> weight (out, in), bias (out)", merge_of(ia3), MERGES, on_both_sides(
        inputs_of_linear, ("the merged weight (out, in)", "the merged bias (out)"),
        sizes("in out", (9, 9), (10, 7), (5, 8)), half=False),
    ),
    "ia3_layer": Exercise(
        "ia3_layer(layer, x, positions, l_k, l_v, l_ff) -> (B, T, D)", right_layer,
        catalogue(right_layer, TABLES["layer"]), probe_layer,
    ),
    "ia3_mixed": Exercise(
        "ia3_mixed(linear, x, scales, rows, side) -> (B, T, out); scales (N, features), rows (B,)", right_mixed,
        catalogue(right_mixed, TABLES["ia3_mixed"]),
        on_both_sides(inputs_of_mixed, "the output (B, T, out)",
        sizes("B T N in out", (4, 4, 5, 6, 6), (7, 2, 6, 10, 7), (1, 1, 3, 5, 8))),
    ),
    **questions(
        ia3_queries_gpt2=moved_to_queries(GPT2, GPT2Config),
        ia3_queries_llama=moved_to_queries(LLaMA, LLaMAConfig),
        ia3_queries_paired=moved_to_queries(LLaMA, LLaMAConfig, True),
        ia3_parameters=lambda: trained_numbers(SMOLLM2, "ia3"),
    ),
}  # fmt: skip
