"""Lesson 10: prompts that carry a picture, with the wrong versions that one writes easily."""

import torch

import minillama

from ...adapters import image_prompt
from ...attention import Attention, RoPE, rotate  # noqa: F401 (a row of the table names it)
from .catalogue import catalogue, tables
from .modules import follows, trained_numbers
from .observing import Exercise, calls, fact, filled
from .predictions import questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one
PLANTED = catalogue(image_prompt, TABLES["planted"])  # each must fail a test in the models
HARMLESS = {"ProjectedApart": ("llama",)}  # without biases the projections are linear, and it is the same


def right_places(prompt, features, weight, bias):
    tokens = features @ weight.T + bias  # (B, K, D)
    return prompt + tokens


def right_global(prompt, features, weight, bias):
    token = features.flatten(1) @ weight.T + bias  # (B, D)
    return prompt + token[:, None]


def right_attention(attention, x, positions, prompts, gate, shown):
    q, k, v = attention.project(x, positions)
    keys, values = attention.keys_values(prompts.to(x.dtype))
    repeat = attention.num_heads // attention.num_kv_heads
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    weights = (q @ keys.mT / attention.head_dim**0.5).softmax(-1)
    term = torch.tanh(gate).to(x.dtype) * (weights @ values)
    term = term * shown[:, None, None, None].to(x.dtype)
    return attention.output(attention.attend(q, k, v) + term)


# every axis another length, where it can be; the last what can be 1
PLACES = (dict(B=2, K=5, F=6, D=12), dict(B=4, K=3, F=2, D=7), dict(B=1, K=1, F=3, D=4))
GLOBAL = (dict(B=2, N=4, F=3, K=5, D=7), dict(B=4, N=3, F=5, K=2, D=6), dict(B=1, N=1, F=3, K=1, D=4))
LAYER = (dict(B=3, T=5, K=4, H=6, G=3, d=8, D=18), dict(B=4, T=2, K=5, H=4, G=4, d=6, D=12),
         dict(B=1, T=1, K=1, H=2, G=1, d=4, D=8))  # fmt: skip


def inputs_of_places(draw, B, K, F, D):
    return dict(prompt=draw(K, D), features=draw(B, K, F), weight=draw(D, F), bias=draw(D))


def inputs_of_global(draw, B, N, F, K, D):
    return dict(prompt=draw(K, D), features=draw(B, N, F), weight=draw(D, N * F), bias=draw(D))


def inputs_of_layer(draw, B, T, K, H, G, d, D):
    attention, shown = filled(Attention(D, H, G, d, RoPE(d), bias=True), draw), torch.arange(B) != 1
    given = dict(attention=attention, x=draw(B, T, D), positions=2 + torch.arange(T), prompts=draw(B, K, D))
    return given | dict(gate=draw(H, 1, 1), shown=shown)


def unseeing(answer, draw, given):
    """The same where no row has a picture: the base, bit for bit."""
    yield from follows("prompts")(answer, draw, given)
    out = answer(*(given | {"shown": torch.zeros_like(given["shown"])}).values())
    base = given["attention"](given["x"], given["positions"])
    why = "where no row has a picture, what comes out is not the base's bit for bit: is the term multiplied by shown?"
    yield fact(torch.equal(out, base), "seeing_nothing", why)


def model_that_sees(way="places", tokens=3):
    """(an adapted small LLaMA, ids (2, 6), what its rows see (2, N, 4))."""
    model = minillama.adapt(
        minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), "image_prompt", features=4, tokens=tokens, way=way
    )
    return model, torch.randint(0, 31, (2, 6)), torch.randn(2, tokens, 4)


def moved(steps):
    """Which parameters of a fresh adapter have moved after so many steps on rows with pictures."""

    def truth():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, ids, seen = model_that_sees()
            own = minillama.adapters.adapter_parameters(model)
            before = {name: p.detach().clone() for name, p in own.items()}
            for _ in range(steps):
                model.zero_grad()
                with minillama.seeing(model, seen):
                    minillama.answer_loss(model, ids, ids).backward()
                for p in own.values():
                    p.data -= 0.1 * p.grad
        names = {name for name, p in own.items() if not torch.equal(p, before[name])}
        return frozenset(name.partition("image_prompt.")[2].partition(".")[0] for name in names)

    return truth


@torch.no_grad()
def changed_by_a_picture(way):
    """What of the first layer's prefix attention another picture changes: "weights", "values"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _, seen = model_that_sees(way)
        layer, q = model.layers[0].self_attn.double(), torch.randn(2, 2, 5, 8).double()
        found = []
        for features in (seen, -seen):
            with minillama.seeing(model, features):
                k, v = layer.prefix(torch.float64)
            found.append(((q @ k.mT / 8**0.5).softmax(-1), v))
    (weights, values), (others, theirs) = found
    same = {"weights": torch.allclose(weights, others), "values": torch.allclose(values, theirs)}
    return frozenset(name for name, alike in same.items() if not alike)


def numbers_trained():
    return trained_numbers(minillama.LLaMAConfig(256, 128, 344, 4, 4), "image_prompt")


EXERCISES = {
    "prompts_by_places": Exercise(
        "prompts_by_places(prompt, features, weight, bias) -> (B, K, D)", right_places,
        catalogue(right_places, TABLES["places"]),
        calls(inputs_of_places, "the prompts (B, K, D)", PLACES, half=False),
    ),
    "prompts_global": Exercise(
        "prompts_global(prompt, features, weight, bias) -> (B, K, D)", right_global,
        catalogue(right_global, TABLES["global"]),
        calls(inputs_of_global, "the prompts (B, K, D)", GLOBAL, half=False),
    ),
    "seeing_attention": Exercise(
        "seeing_attention(attention, x, positions, prompts, gate, shown) -> (B, T, D)", right_attention,
        catalogue(right_attention, TABLES["attention"]),
        calls(inputs_of_layer, "the output (B, T, D)", LAYER, float32=("prompts", "gate"), then=unseeing),
    ),
    **questions(
        image_moves_first=moved(1), image_moves_second=moved(2), image_numbers=numbers_trained,
        what_global_changes=lambda: changed_by_a_picture("global"),
        what_places_change=lambda: changed_by_a_picture("places"),
    ),
}  # fmt: skip
