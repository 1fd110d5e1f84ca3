"""Lesson 02: prompt tuning, prefix tuning and a training step, with the wrong versions that one writes easily."""

from collections import Counter
from copy import copy

import torch
from torch import nn

import minillama

from ...adapters import adapter_parameters, prefix_tuning, prompt_tuning
from ...attention import Attention, Cache, LayerCache, embed
from ...rope import Llama3, RoPE, rotate
from .catalogue import catalogue, tables
from .modules import follows, some
from .observing import Exercise, Piece, Wrong, as_function, calls, describe, filled, gradients, teller
from .predictions import questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one; what is said of facts stands there too


def prompt_of(module):
    """The module's PromptEmbedding, with `embed`, as a function of the embedding, the ids and the prompt."""

    def soft_prompt(embedding, ids, prompt, past=0, active=True):
        wrapper, cache = module.PromptEmbedding(embedding, len(prompt)), Cache()
        del wrapper.prompt
        wrapper.prompt, wrapper.active, cache.length = prompt, active, past
        return embed(wrapper, ids, None, cache)[0]

    return soft_prompt


PROMPTS = catalogue(prompt_tuning, TABLES["prompts"], wrap=prompt_of)


def placed(embedding, ids, prompt, past=0, active=True):
    x = embedding(ids)
    if past or not active:
        return x
    p = prompt.to(x.dtype)
    return torch.cat((p.expand(len(x), -1, -1), x), dim=1)


def inputs_of_prompt(draw, B, T, K, D, past, active):
    ids = (draw(B, T).abs() * 40).long() % 11
    return dict(embedding=filled(nn.Embedding(11, D), draw), ids=ids, prompt=draw(K, D), past=past, active=active)


PROMPT_SIZES = [dict(zip(("B", "T", "K", "D", "past", "active"), size)) for size in (
    (2, 5, 3, 8, 0, True), (2, 4, 3, 8, 2, True), (3, 1, 4, 6, 1, True), (3, 2, 5, 6, 0, False), (2, 3, 2, 4, 9, True),
    (2, 3, 4, 4, 7, False), (4, 3, 2, 6, 0, True), (1, 1, 1, 5, 0, True),
)]  # fmt: skip
probe_prompt = calls(inputs_of_prompt, "what enters the first layer (B, S, D)", PROMPT_SIZES, float32=("prompt",),
                     then=follows("prompt"))  # fmt: skip


def right_turn_back(rope, keys):
    G, K, d = keys.shape
    return rotate(keys, *rope(torch.full((K,), -K)))


TURNED_KEYS = calls(
    lambda draw, G, K, d, rope: dict(rope=RoPE(d, *rope), keys=draw(G, K, d)), "the turned keys (G, K, d)",
    (dict(G=2, K=3, d=8, rope=(60.0,)), dict(G=3, K=5, d=4, rope=(900.0, Llama3(8.0, 1.0, 4.0, 64))),
     dict(G=1, K=1, d=6, rope=(9.0,))), half=False,
)  # fmt: skip


def probe_turn(answer, draw):
    keys = draw(2, 3, 8)
    both = [z for z in (keys, answer(RoPE(8, 60.0), keys)) if getattr(z, "shape", ()) == keys.shape]
    lengths = [z.unflatten(-1, (2, 4)).norm(dim=-2) for z in both]
    yield said(torch.allclose(lengths[0], lengths[-1], atol=1e-4), "no_rotation")
    yield from TURNED_KEYS(answer, draw)


def layer_of(module):
    """The module's PrefixAttention as a function, kept as long as the layer stays the same (see as_function)."""
    built = as_function(lambda base, keys, values: module.PrefixAttention(base, keys.shape[1]), ("keys", "values"))

    return lambda attention, x, positions, keys, values, cache=None: built(
        attention, x, positions, None, cache, keys, values
    )


LAYERS = catalogue(prefix_tuning, TABLES["layers_all"], wrap=layer_of)


def inputs_of_layer(draw, B, T, K, D, H, G, d, theta):
    attention, steps = filled(Attention(D, H, G, d, RoPE(d, theta), bias=True), draw), torch.arange(T)
    steps, (keys, values) = steps + 2 * (steps > 1), draw(2, G, K, d)
    return dict(attention=attention, x=draw(B, T, D), positions=steps, keys=keys, values=values)


def with_a_cache(answer, draw, given):
    attention, x, positions, keys, values = given.values()
    (B, T, D), cache, changed = x.shape, LayerCache(), answer(attention, x, positions, keys + 1, values - 1)
    yield Piece("the output after the prefix has changed (B, T, D)", changed)
    x = torch.cat((x, draw(B, 3, D).to(x.dtype)), 1)
    positions = torch.cat((positions, positions[-1] + torch.tensor([1, 2, 5])))  # with a gap
    for a, b, which in ((0, T, "the first tokens"), (T, T + 2, "two more tokens"), (T + 2, T + 3, "one more token")):
        out = answer(attention, x[:, a:b], positions[a:b], keys, values, cache)
        yield said(b if cache.k is None else cache.k.shape[2], "PrefixInTheCacheOnce", f"cached after {which}")
        yield Piece(f"the output for {which} with a cache (B, T, D)", out)


probe_layer = calls(inputs_of_layer, "the output (B, T, D)", (
    dict(B=3, T=5, K=4, D=20, H=6, G=2, d=8, theta=50.0), dict(B=2, T=3, K=5, D=12, H=3, G=3, d=4, theta=900.0),
    dict(B=1, T=1, K=1, D=6, H=2, G=1, d=2, theta=9.0),
), ("keys", "values"), once=tuple(f"attention.{name}_proj" for name in "qkvo"), then=with_a_cache)  # fmt: skip


def right_split(q, k, v, prefix_keys, prefix_values):
    scale, T, K = q.shape[-1] ** 0.5, q.shape[2], prefix_keys.shape[1]
    on_prefix, on_tokens = q @ prefix_keys.mT / scale, q @ k.mT / scale
    on_tokens = on_tokens.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    share = torch.cat((on_prefix, on_tokens), -1).softmax(-1)[..., :K].sum(-1)
    return share, on_tokens.softmax(-1) @ v, on_prefix.softmax(-1) @ prefix_values


def share_of(split):
    """The share that comes out of a function like right_split, for what it is made of."""
    return lambda q, k, prefix_keys: split(q, k, k, prefix_keys, prefix_keys)[0]


def whole_gradient(answer, draw, given):
    """The gradients of all three together: those of one may be 0 in one way of writing, and rounding in another."""
    given = {name: z.requires_grad_() for name, z in given.items()}
    whole = torch.cat([z.flatten() for z in answer(*given.values())])
    for name, found in zip(given, gradients(whole, *given.values())):
        yield Piece(f"the gradient with respect to {name}", found, kind="gradient", of=name)
    yield from large_scores(answer, draw, given)


def large_scores(answer, draw, given):
    given = {name: z.detach() for name, z in given.items()}
    q, k, before = (given[name] for name in ("q", "k", "prefix_keys"))
    last, low = torch.arange(k.shape[2])[:, None] == k.shape[2] - 1, -999 / q.shape[-1] ** 0.5
    for where, of_q, of_k, of_prefix in (
        ("all scores lie hundreds below 0", q + 8, k - 8, before - 8),
        ("all scores are hundreds", q + 8, k + 8, before + 8),
        ("the last token's score is hundreds, and the others lie hundreds below", q + 8, k - 8 + 16 * last, before - 8),
        ("all scores are -999", 0 * q + 1, 0 * k + low, 0 * before + low),
    ):  # fmt: skip
        found = answer(*(given | dict(q=of_q, k=of_k, prefix_keys=of_prefix)).values())
        yield Piece(f"the share where {where} (B, H, T)", found[0] if "v" in given else found)


def inputs_of_heads(draw, B, T, K, H, d):
    names = "q", "k", "v", "prefix_keys", "prefix_values"
    return dict(zip(names, (*draw(3, B, H, T, d), *draw(2, H, K, d))))


PARTS = "the share (B, H, T)", "the tokens' part (B, H, T, d)", "the prefix's part (B, H, T, d)"
HEADS_SIZES = dict(B=2, T=5, K=3, H=4, d=8), dict(B=3, T=2, K=5, H=1, d=4), dict(B=1, T=1, K=1, H=2, d=6)
probe_share = calls(some(inputs_of_heads, "q", "k", "prefix_keys"), PARTS[0], HEADS_SIZES, half=False,
                    then=large_scores)  # fmt: skip
probe_split = calls(inputs_of_heads, PARTS, HEADS_SIZES, half=False, gradient=False, then=whole_gradient)


def right_step(model, optimizer, ids, labels):
    optimizer.zero_grad()
    loss = minillama.answer_loss(model, ids, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


STEPS = catalogue(right_step, TABLES["steps"])
said = teller(TABLES, "layers_all", "steps")


def watched(model, optimizer, own):
    """A count of what happens from now on: rows read, calls in eval mode, gradients, steps, and steps before any."""
    seen, first = Counter(), next(iter(own.values()))
    first.register_hook(lambda gradient: seen.update(backward=1, gradient=gradient.clone()))

    def stepped(*_):
        changed = first.grad is None or bool((first.grad - seen["gradient"]).abs().max() > 1e-5)
        seen.update(steps=1, early=not seen["backward"], changed=changed)

    optimizer.register_step_post_hook(stepped)
    model.layers[0].register_forward_pre_hook(lambda layer, x: seen.update(rows=len(x[0]), eval=not layer.training))
    return seen


def probe_step(answer, draw):
    for method, B, T in (("llama_adapter", 3, 6), ("lora", 2, 4), ("ia3", 1, 2)):
        model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 24, 2, 2)), method).train()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(draw(*p.shape) / p.shape[-1] ** 0.5 + (p.dim() == 1))
                p.grad = draw(*p.shape) if p.requires_grad else None  # left there by whatever came before
        own = adapter_parameters(model)
        base = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
        if method == "llama_adapter":
            optimizer = torch.optim.AdamW(own.values(), lr=0.03, eps=1e-3)
        else:  # given the frozen weights too
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        seen = watched(model, optimizer, own)
        for step in (1, 2, 3):
            seen.clear()
            ids = (draw(B, T).abs() * 40).long() % 31
            first = T // 2 - torch.arange(B)[:, None] % 2  # the answer's first token, another in every second row
            loss = answer(model, optimizer, ids, torch.where(torch.arange(T) < first, -100, ids))
            tensor = isinstance(loss, torch.Tensor) and loss.numel() == 1
            if not tensor and not hasattr(loss, "__float__"):
                raise Wrong("form", f"needed is the loss as a float; it returned {describe(loss)}.")
            for name, value in {
                "loss_with_its_graph": tensor and loss.requires_grad, "loss_as_a_tensor": tensor,
                "in_eval_mode": seen["eval"] > 0, "left_in_eval_mode": not model.training,
                "everything_trains": any(p.requires_grad or p.grad is not None for p, _ in base),
                "frozen_moved": not all(torch.equal(p, before) for p, before in base),
                "adapter_frozen": not all(p.requires_grad for p in own.values()),
                "backward_forgotten": not seen["backward"], "step_forgotten": not seen["steps"],
                "two_steps": seen["steps"] > 1, "step_before_backward": seen["early"] > 0,
                "gradients_changed": seen["changed"] > 0,
            }.items():  # fmt: skip
                yield said(value, name, f"{name} in step {step}")
            why = said.sentences["run_twice"]
            yield Piece("rows", torch.tensor(seen["rows"]), kind="count", mistake="run_twice", why=why)
            yield Piece(f"the loss of step {step}", torch.tensor(float(loss.detach() if tensor else loss)))
            yield from (Piece(f"{name} after step {step}", p) for name, p in own.items())


def zero_share(n):
    """What 5 zero keys take of the softmax of a token that sees n tokens, itself among them, each with score 0."""
    return lambda: share_of(right_split)(*torch.zeros(2, 1, 1, n, 8), torch.zeros(1, 5, 8))[0, 0, -1].item()


def zero_prefix_makes():
    """What twenty tokens of zero keys and values do to the output of attention, where ten stood."""
    attention, x = Attention(16, 2, rope=RoPE(8)).requires_grad_(False), torch.randn(1, 6, 16)
    layer, places = layer_of(prefix_tuning), torch.arange(6)
    ten, twenty = (layer(copy(attention), x, places, *torch.zeros(2, 2, K, 8)).norm() for K in (10, 20))
    return "same" if torch.isclose(twenty, ten) else "smaller" if twenty < ten else "larger"


def tokens_after_zeros():
    """How many different tokens a prefix of five has after five steps, three begun at zero and two from N(0, 1)."""
    torch.manual_seed(0)
    model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), "prefix_tuning", prefix_length=5)
    own, ids = list(adapter_parameters(model).values()), torch.randint(0, 31, (2, 6))  # (G, K, d) each
    for p in own:
        p.data[:, :3] = 0
    optimizer = torch.optim.AdamW(own, lr=0.1)
    for _ in range(5):
        right_step(model, optimizer, ids, ids)
    tokens = torch.cat([p.detach().transpose(0, 1).flatten(1) for p in own], 1)  # (K, everything of a token)
    return len(torch.unique(tokens.mul(1e4).round(), dim=0))


PLANTED = (*PROMPTS, *LAYERS[: len(TABLES["planted_in_layers"])])  # each must fail a test where it stands in the models
HARMLESS = {"PrefixAtTheWordsPlace": ("gpt2",)}  # whose positions are no part of the keys

EXERCISES = {
    "soft_prompt": Exercise(
        "soft_prompt(embedding, ids, prompt, past=0, active=True) -> (B, K + T, D), "
        "or (B, T, D) where past > 0 or not active",
        prompt_of(prompt_tuning), PROMPTS + catalogue(placed, TABLES["places_all"]), probe_prompt,
    ),
    "turn_back": Exercise(
        "turn_back(rope, keys) -> (G, K, d)", right_turn_back, catalogue(right_turn_back, TABLES["turns_all"]),
        probe_turn,
    ),
    "prefix_attention": Exercise(
        "prefix_attention(attention, x, positions, keys, values, cache=None) -> (B, T, D)",
        layer_of(prefix_tuning), LAYERS, probe_layer,
    ),
    **questions(
        share_of_ten=zero_share(10), share_of_the_first=zero_share(1), longer_zero_prefix=zero_prefix_makes,
        tokens_after_zeros=tokens_after_zeros,
    ),
    "prefix_share": Exercise(
        "prefix_share(q, k, prefix_keys) -> (B, H, T)", share_of(right_split),
        catalogue(right_split, TABLES["shares_all"], wrap=share_of), probe_share,
    ),
    "training_step": Exercise(
        "training_step(model, optimizer, ids, labels) -> the loss as a float", right_step, STEPS, probe_step,
        changes=(0, 1),
    ),
    "split_softmax": Exercise(
        "split_softmax(q, k, v, prefix_keys, prefix_values) -> share (B, H, T), tokens (B, H, T, d), "
        "prefix (B, H, T, d)", right_split, catalogue(right_split, TABLES["splits_all"]), probe_split,
    ),
}  # fmt: skip
