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
from .catalogue import catalogue, tables
from .observing import Exercise, Wrong, called, calls, describe, fact, filled, in_bfloat16
from .predictions import Question

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one

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


FORWARD = catalogue(ia3, TABLES["forward"], wrap=linear_of)
ELSEWHERE = catalogue(ia3, TABLES["elsewhere"])
STARTS = catalogue(ia3, TABLES["starts"], wrap=start_of)
MERGES = catalogue(ia3, TABLES["merges"], wrap=merge_of)
PLANTED = FORWARD + ELSEWHERE + STARTS + MERGES[:3]  # each must fail a test where it stands in the models
HARMLESS = {"BiasUnscaled": ("llama",), "MergeForgetsBias": ("llama",), "attach_to_queries": ("gpt2",)}

# ── one projection, and a batch of several tasks ──────────────────────────────────────────────────────────────────────


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


LAYER = catalogue(right_layer, TABLES["layer"])


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
        catalogue(right_linear, TABLES["ia3_linear"]), on_both_sides(inputs_of_linear, "the output (B, T, out)",
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
        catalogue(right_mixed, TABLES["ia3_mixed"]),
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
