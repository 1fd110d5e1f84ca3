"""Lesson 05: bottleneck adapters, with the wrong versions that one writes easily."""

import contextlib

import torch

from ...adapters import bottleneck
from ...attention import RoPE
from ...llama import Layer, LLaMAConfig
from .catalogue import catalogue, tables
from .judging import close
from .modules import repeats
from .observing import Exercise, Piece, Wrong, calls, describe, fact, filled, named, other, teller
from .predictions import moved, questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one

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


# ── what an answer is the sum of ──────────────────────────────────────────────────────────────────────────────────────


def as_sum(value, terms, needed, right=None, given=""):
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
    total = " + ".join(parts).replace("+ -", "− ") or "0"
    why = f"{given}what it returns is {total}: hold that against the equation, term by term."
    found = [found.get(name, 0.0) + 0.0 for name in (*needed, *(term for term in terms if term not in needed))]
    return fact(torch.tensor(found), "sum", why, "the factors of its terms")


def around(inputs, sizes, once, terms, needed, right):
    """The usual probe of what surrounds bottlenecks, behind a look at the terms of the sum."""
    usual = calls(inputs, OUT, sizes, float32=("bottleneck", "first", "second"), once=once)

    def probe(answer, draw):
        given = inputs(draw, **sizes[0])
        wanted = right(*given.values()).detach().double()
        seen = {}  # what these modules first return
        with contextlib.ExitStack() as hooks:
            for name in (*once, *(name for name in ("first", "second") if name in given)):
                first, _, rest = name.partition(".")
                keep = lambda module, read, out, name=name: seen.setdefault(name, out)  # noqa: E731
                hooks.enter_context(given[first].get_submodule(rest).register_forward_hook(keep))
            out = answer(*given.values())
        at = f"for scale = {given['scale']} " if "scale" in given else ""
        yield as_sum(out, terms(given, seen), {name: given.get(n, n) for name, n in needed.items()}, wanted, at)
        so_far = isinstance(out, torch.Tensor) and close(out.detach().double(), wanted)
        for name in [name for name in ("x", "scale") if name in given]:
            again = so_far and torch.equal(out, answer(*(given | {name: other(given[name])}).values()))
            yield fact(again, "kept", f"called again with another {name}, it returns the same: something is kept.")
        yield from usual(answer, draw)

    probe.inputs = usual.inputs
    return probe


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


START = catalogue(right_start, TABLES["start"])
said = teller(TABLES, "start")


def places_of(tensor):
    """Where each number of a float32 tensor lies in memory."""
    memory = tensor.untyped_storage()
    cells = torch.arange(memory.nbytes() // 4).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return memory.data_ptr() // 4 + cells.flatten()


def probe_start(answer, draw):
    for D, m in ((240, 12), (400, 100), (300, 1)):
        result = answer(D, m)
        if not isinstance(result, tuple | list) or len(result) != 4:
            raise Wrong("form", f"needed are four tensors, {', '.join(TENSORS)}; it returned {describe(result)}.")
        found, again = named(TENSORS, result), answer(D, m)
        for name, value in found:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                raise Wrong("start_dtype", f"{name} should be a float32 tensor; it is {describe(value)}.")
        shapes, got = [(m, D), (m,), (D, m), (D,)], [tuple(value.shape) for _, value in found]
        mistake = "order" if sorted(got) == sorted(shapes) else "shapes"
        for (name, value), shape in zip(found, shapes):
            if value.shape != shape:
                needed = said.sentences[mistake].format(shape=shape, D=D, m=m)
                raise Wrong(mistake, f"{name} has shape {tuple(value.shape)}; {needed}")
            if not value.isfinite().all():
                raise Wrong("not_finite", f"{name} holds NaN or infinity: torch.empty holds anything; fill it.")
            if isinstance(value, torch.nn.Parameter) and not value.requires_grad:
                raise Wrong("frozen", f"{name} is a parameter with requires_grad=False: it never learns.")
        places = torch.cat([places_of(value) for value in (*result, *again)])
        yield said(len(places.unique()) < len(places), "shared")
        zero = [not value.any() for _, value in found]  # needed: only down's weight is not
        name = ("AllZero" if all(zero) else "mostly_zero" if zero[0] and zero[2] else "down_zero" if zero[0]
                else "as_linear_draws_them" if not any(zero[1:]) else "UpNotZero" if not zero[2]
                else "down_bias_kept" if zero[3] else "up_bias_kept")  # fmt: skip
        yield said(torch.tensor(zero), name, "which of the four are 0")
        down = found[0][1].detach().double()
        size, rank = down.std(), torch.linalg.matrix_rank(down, rtol=1e-5)
        yield said((down == 0).all(1).any(), "unit_at_zero")
        yield said(len(down.unique(dim=0)) < m, "units_alike")
        yield said(len(down.unique()) > D / 2 and len(down.sort(1).values.unique(dim=0)) < m, "units_reordered")
        yield said((down == 0).double().mean() > 0.5, "mostly_zero")
        yield said((down == down[:, :1]).all(), "features_alike")
        yield said(rank < m, "low_rank")
        yield said(abs(down.mean()) > 0.4 * size, "not_centred")
        yield said(not size < 0.115, "down_too_large")
        yield said(not size > 0.0008, "down_too_small")
        yield said(repeats(answer, D, m), "same_start")


# ── in a block, and how many numbers train ────────────────────────────────────────────────────────────────────────────


def right_layer(layer, x, positions, first, second):
    a = layer.input_layernorm(x)
    y = layer.self_attn(a, positions)
    h = x + y + first(y)
    b = layer.post_attention_layernorm(h)
    z = layer.mlp(b)
    return h + z + second(z)


def parameters(D, m, L, places):
    return L * places * (2 * m * D + D + m)


def probe_parameters(answer, draw):
    sizes = torch.randint(1, 10, (40, 4), generator=torch.Generator().manual_seed(0))
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
SCALED = [dict(size, scale=scale) for size, scale in zip(SIZES, (5.5, -1.37, 0.0))]
LAYERS = (dict(positions=[3, 4, 6, 9, 14], B=2, D=24, H=4, G=2), dict(positions=[0, 5], B=3, D=12, H=3, G=3),
          dict(positions=[7], B=1, D=16, H=2, G=1))  # fmt: skip


def learned(steps, *prepare):
    """Which of a fresh adapter's tensors have moved after so many steps of gradient descent."""
    return moved("bottleneck", steps, *prepare, names=lambda name: ".".join(name.split(".")[-2:]), size=3)


NETWORK = catalogue(bottleneck, TABLES["bottleneck_network"], wrap=network_of)
BEHIND = catalogue(bottleneck, TABLES["adapted_sublayer"], wrap=behind)
PLANTED = NETWORK[:4] + BEHIND[:4] + catalogue(bottleneck, TABLES["planted"])  # each must fail a test in the models

EXERCISES = {
    "bottleneck_network": Exercise(
        "bottleneck_network(x, down_weight, down_bias, up_weight, up_bias) -> (B, T, D)", network_of(bottleneck),
        NETWORK, calls(inputs_of_network, OUT, SIZES, float32=TENSORS),
    ),
    "bottleneck_start": Exercise(
        "bottleneck_start(D, m) -> down_weight (m, D), down_bias (m), up_weight (D, m), up_bias (D)", right_start,
        START, probe_start,
    ),
    **questions(
        bottleneck_moves_first=learned(1),
        bottleneck_moves_second=learned(2),
        bottleneck_all_zero=learned(20, lambda own: [p.data.zero_() for p in own.values()]),
    ),
    "adapted_sublayer": Exercise(
        "adapted_sublayer(sublayer, x, bottleneck) -> (B, T, D)", behind(bottleneck), BEHIND,
        around(inputs_of_sublayer, SIZES, ("sublayer",), terms_of_sublayer,
               {"sublayer(x)": 1, "bottleneck(sublayer(x))": 1}, behind(bottleneck)),
    ),
    "parallel_sublayer": Exercise(
        "parallel_sublayer(sublayer, x, bottleneck, scale) -> (B, T, D)", beside(bottleneck),
        catalogue(bottleneck, TABLES["parallel_sublayer"], wrap=beside),
        around(inputs_of_sublayer, SCALED, ("sublayer",), terms_of_sublayer,
               {"sublayer(x)": 1, "bottleneck(x)": "scale"}, beside(bottleneck)),
    ),
    "houlsby_layer": Exercise(
        "houlsby_layer(layer, x, positions, first, second) -> (B, T, D)", right_layer,
        catalogue(right_layer, TABLES["layer"]),
        around(inputs_of_layer, LAYERS, ("layer.self_attn", "layer.mlp"), terms_of_layer,
               dict.fromkeys(("x", *(f"the output of {name}" for name in ("self_attn", "first", "mlp", "second"))), 1),
               right_layer),
    ),
    "bottleneck_parameters": Exercise(
        "bottleneck_parameters(D, m, L, places) -> a whole number", parameters,
        catalogue(parameters, TABLES["parameters"]), probe_parameters,
    ),
}  # fmt: skip
