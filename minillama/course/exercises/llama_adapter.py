"""Lesson 03: zero-init gated prefix attention and V2, with the wrong versions that one writes easily."""

from functools import partial

import torch
from torch import nn

import minillama

from ...adapters import llama_adapter, llama_adapter_v2
from ...attention import Attention, RoPE, rotate  # noqa: F401 (rows of the table keys_values name it)
from ...llama import RMSNorm
from .catalogue import catalogue, tables
from .modules import follows, merged, opened, own_of, reached, repeats, some, stale, started, trains
from .observing import Exercise, Piece, Wrong, as_function, calls, describe, filled, frozen, left_behind, named, teller
from .predictions import moved, questions

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one


def made_of(module, table, wrap):
    """The right answer and the mistakes, where both are made of a module."""
    return wrap(module), catalogue(module, TABLES[table], wrap=wrap)


def prefix_of(module):
    """The module's AdaptedAttention as a function of the attention, x, positions, prompt and gate."""
    return as_function(lambda base, prompt, gate: module.AdaptedAttention(base, len(prompt)), ("prompt", "gate"))


def start_of(module):
    """What the module's parameters start from, as a function of their sizes."""
    return lambda K, D, H: started(module.AdaptedAttention(Attention(D, H), K))


def scaled_by(module):
    return as_function(lambda base, **own: module.ScaledLinear(base), ("scale", "adapter_bias"))


PREFIXES = catalogue(llama_adapter, TABLES["prefixes"], wrap=prefix_of)
STARTS = catalogue(llama_adapter, TABLES["starts"], wrap=start_of)
SCALINGS = catalogue(llama_adapter_v2, TABLES["scalings"], wrap=scaled_by)
NORM = catalogue(llama_adapter_v2, TABLES["norm"], wrap=lambda module: module.TrainedNorm)
MERGED = catalogue(
    llama_adapter_v2, TABLES["merged_module"],
    wrap=lambda module: lambda linear, scale, shift: merged(module.ScaledLinear(linear), scale, shift),
)  # fmt: skip
PLANTED = PREFIXES[:25] + STARTS[:2] + SCALINGS[:1] + MERGED + NORM[:1]  # each must fail a test in the models
HARMLESS = {"BiasTwice": ("llama",), "HeadsInTheWrongOrder": ("llama", "gpt2")}  # no bias, nothing repeated there


def right_keys_values(attention, prompt):
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    k, v = (z.unflatten(-1, (attention.num_kv_heads, attention.head_dim)) for z in (k, v))  # (K, G, d)
    return k.transpose(0, 1), v.transpose(0, 1)


def right_merge(linear, scale, shift):
    return linear.weight * scale[:, None], (linear.bias + shift) * scale


def right_attach(model, wrap):
    model.requires_grad_(False)
    for layer in model.layers:
        layer.self_attn = wrap(layer.self_attn)
    return model


ATTACH = catalogue(right_attach, TABLES["attach"])
said = teller(TABLES, "starts", "attach")


# H · d is more than D, so that nothing can hide; G · d can be cut by D / H and by H too: a wrong cut shows in the shape
PREFIX_SIZES = (dict(B=2, T=5, K=7, H=6, G=3, d=8, D=18), dict(B=3, T=2, K=5, H=4, G=4, d=6, D=12),
                dict(B=1, T=1, K=1, H=2, G=1, d=4, D=8))  # fmt: skip


def probe_start(answer, draw):
    for K, D, H in ((50, 240, 6), (40, 300, 5)):
        (_, prompt), (_, gate) = named(("the prompt (K, D)", "the gate (H, 1, 1)"), answer(K, D, H))
        for which, value, shape in ("prompt", prompt, (K, D)), ("gate", gate, (H, 1, 1)):
            if not isinstance(value, torch.Tensor):
                raise Wrong("form", f"the {which} should be a float32 tensor; it is {describe(value)}.")
            if value.shape != shape:
                name, found = f"shape_of_{which}", tuple(value.shape)
                raise Wrong(name, said.sentences[name].format(found=found, needed=shape, K=K, D=D, H=H))
            yield said(value.dtype == torch.float32, "start_dtype", which=which, dtype=str(value.dtype)[6:])
        closed, empty = not gate.any(), not prompt.any()
        yield said(closed + 2 * empty, "OpenGate" if not empty else "ZeroPrompt" if closed else "wrong_one_zero")
        yield from drawn(prompt)
        yield said(repeats(answer, K, D, H), "same_prompt")


def drawn(prompt):
    """Facts of a prompt's numbers, which should be those of N(0, 1), to a tenth, each drawn by itself."""
    numbers = prompt.detach().double()
    mean, deviation, flat = numbers.mean().item(), numbers.std().item(), numbers.flatten()
    alike = any(len(torch.unique(numbers, dim=i)) < numbers.shape[i] for i in (0, 1))
    yield said(alike, "equal_rows_of_prompt")
    yield said(bool((flat.diff() > 0).all()), "counted_prompt")
    kinds = len(flat.unique())
    yield said(kinds < len(flat) / 2, "few_numbers_in_prompt", kinds=kinds)
    kurtosis = ((numbers - mean) / deviation).pow(4).mean()  # 1.8 of uniform, 3 of normal ones
    yield said(bool(kurtosis < 2.1), "uniform_prompt")
    yield said(bool(numbers.abs().max() < 2.5) and abs(deviation - 1) < 0.1, "cut_prompt")
    for name, found, needed in ("mean", mean, 0), ("deviation", deviation, 1):
        near = needed if abs(found - needed) < 0.1 else round(found, 1 if abs(found) > 0.3 else 2)
        yield said(float(near), f"{name}_of_prompt", near=near)


def inputs_of_prefix(draw, B, T, K, H, G, d, D):
    positions = 4 + torch.arange(T) + 2 * (torch.arange(T) > 2)  # they need not start at 0, nor follow one another
    attention = filled(Attention(D, H, G, d, RoPE(d), bias=True), draw)
    return dict(attention=attention, x=draw(B, T, D), positions=positions, prompt=draw(K, D), gate=draw(H, 1, 1))


def next_step(answer, draw, given):
    """The same layer where the prompt has changed, and where the gate is closed."""
    yield from follows("prompt")(answer, draw, given)
    closed = torch.zeros_like(given["gate"]).requires_grad_(True)
    shut = answer(*(given | {"gate": closed}).values())
    yield Piece("the output at gate 0 (B, T, D)", shut)
    yield said(reached(shut, closed), "closed_for_good")


probe_prefix = calls(inputs_of_prefix, "the output (B, T, D)", PREFIX_SIZES, float32=("prompt", "gate"), then=next_step)


def prompted(module, own, draw, where, *inputs):
    """What is seen of a module that has a prompt and a gate: fresh, after the prompt has changed, and open."""
    prompt, gate = own["prompt"], own["gate"]
    yield said(bool(gate.any()), "OpenGate")
    yield said(bool(prompt.any()), "ZeroPrompt")
    yield from drawn(prompt) if len(prompt) == 50 else ()
    yield trains(own)
    fresh = module.eval()(*inputs)
    yield Piece("the fresh module's output, its gate at 0 (B, T, D)", fresh, where)
    yield said(reached(fresh, gate), "closed_for_good")
    gate.data = draw(*gate.shape)
    before, prompt.data = module(*inputs), draw(*prompt.shape)
    yield stale(torch.equal(module(*inputs), before))
    yield from opened(module, own, where, *inputs)


def probe_circulating(answer, draw):
    for i, size in enumerate(PREFIX_SIZES):
        B, T, K, H, G, d, D = size.values()
        given, K = inputs_of_prefix(draw, **size), K if i else 50
        attention, x, positions, where = *list(given.values())[:3], f"for B = {B}, T = {T}, K = {K}" if i else ""
        module = answer(attention, K)
        found = {name: tuple(p.shape) for name, p in own_of(module, attention).items()}
        own = {"prompt" if p.shape == (K, D) else "gate": p for p in own_of(module, attention).values()}
        if len(found) != 2 or len(own) != 2 or own["gate"].numel() != 1:
            needed = f"a prompt of shape ({K}, {D}) for prompt_length {K} and width {D}, and a gate of one number"
            raise Wrong("parameters", f"needed are two parameters of its own, {needed}; it has {found or 'none'}.")
        yield from prompted(module, {name: own[name] for name in ("prompt", "gate")}, draw, where, x, positions)
        yield from frozen(attention)
        yield Piece("the output (B, T, D)", module(draw(B + 1, T, D), positions), f"for another batch, of {B + 1}")
        yield from left_behind(module)


def probe_flow(answer, draw):
    for i, (D, H, K, B, T) in enumerate(((24, 4, 50, 2, 5), (12, 3, 4, 3, 2), (8, 1, 1, 1, 1))):
        module, where = answer(D, H, K), f"for D = {D}, H = {H}, K = {K}, T = {T}" if i else ""
        own = {name.removesuffix(".weight"): p for name, p in own_of(module, nn.Module()).items()}
        needed = {"prompt": (K, D), "gate": (1, D), "c_attn": (3 * D, D), "c_proj": (D, D)}
        shapes = {name: (1, D) if name == "gate" and p.numel() == D else tuple(p.shape) for name, p in own.items()}
        if shapes != needed:
            raise Wrong("parameters", f"needed are {needed}, matrices without biases, for width {D}, num_heads {H} and "
                        f"prompt_length {K}; it has {shapes}.")  # fmt: skip
        for name in ("c_attn", "c_proj"):
            own[name].data = draw(*needed[name]) / D**0.5
        yield from prompted(module, {name: own[name] for name in needed}, draw, where, draw(B, T, D))


SCALED_SIZES = (dict(B=2, T=5, n_in=10, n_out=7), dict(B=3, T=2, n_in=6, n_out=6), dict(B=1, T=1, n_in=3, n_out=5))


def inputs_of_scaled(draw, B, T, n_in, n_out):
    return dict(linear=filled(nn.Linear(n_in, n_out), draw), x=draw(B, T, n_in), scale=draw(n_out), shift=draw(n_out))


def probe_norm(answer, draw):
    for i, (norm, shape) in enumerate(((nn.LayerNorm(8, eps=0.3), (2, 5, 8)), (RMSNorm(6, eps=0.2), (1, 1, 6)))):
        norm, x, where = filled(norm, draw), draw(*shape), "for an RMSNorm" if i else ""
        module, before = answer(norm), norm(x)
        if not isinstance(module, nn.Module) or not hasattr(module, "active"):
            raise Wrong("form", "needed is a module with an attribute `active`, True at first.")
        yield said(module.active is True, "starts_inactive")
        yield Piece("the fresh module's output (B, T, D)", module(x), where)
        yield from frozen(norm)
        trained = [q for q in own_of(module, norm).values() if q.requires_grad]
        own = {name: q for name, p in norm.named_parameters() for q in trained if torch.equal(q, p)}
        needed, number = len(list(norm.parameters())), len(trained)
        if not number and module(x).requires_grad:
            hides = any(isinstance(value, list | tuple | dict) for n, value in vars(module).items() if n[0] != "_")
            yield said(False, "hidden_copy" if hides else "copy_in_forward")
        name = "not_a_copy" if number else "copy_stays_frozen"
        yield said(len(own) == needed == number, name, number=number, needed=needed)
        yield said(len(own_of(module, norm)) - number, "second_copy")
        for q in own.values():
            q.data = draw(*q.shape)
        yield from opened(module, own, where, x)
        module.active = False
        out = module(x)
        yield Piece("the output with `active` False: the base's (B, T, D)", out, where)
        yield said(reached(out, x), "inactive_cut_off")
        yield said(torch.equal(norm(x), before), "norm_changed")
        module.active = True
        yield Piece("the output with `active` True again (B, T, D)", module(x), where)


def probe_attach(answer, draw):
    for L, gate in (3, "head"), (1, "layer"):
        config = minillama.LLaMAConfig(31, 16, 24, L, 4, 2, attention_bias=True, mlp_bias=True)
        model = filled(minillama.LLaMA(config), draw).requires_grad_(True)
        ids, inside, names, made = torch.arange(8).view(2, 4), [], dict(model.named_parameters()), []
        layers, attentions = list(model.layers), [layer.self_attn for layer in model.layers]
        logits = model(ids).detach()

        def wrap(attention, gate=gate, made=made, inside=inside):
            if not isinstance(attention, Attention) and not any(attention is wrapper for wrapper in made):
                raise Wrong("another_module", f"wrap was given {describe(attention)}; it is for a layer's self_attn.")
            inside.append(attention), made.append(llama_adapter.AdaptedAttention(attention, 3, gate))
            return made[-1]

        result = answer(model, wrap)
        yield said(result is model, "not_returned")
        yield said(list(model.layers) == layers, "layer_replaced")
        found = [layer.self_attn for layer in layers]
        at = [i for i, attention in enumerate(found) if any(attention is wrapper for wrapper in made)]
        yield said(len(at), "not_every_layer" if at else "never_stored", at=at, L=L)
        yield said(len(set(map(id, found))), "shared")
        twice = any(attention is wrapper for attention in inside for wrapper in made) or len(inside) > L
        yield said(twice, "wrapped_twice")
        yield said(sum(getattr(new, "base", None) is old for new, old in zip(found, attentions)), "another_attention")
        training = [name for name, p in names.items() if p.requires_grad]
        yield said("requires_grad" in vars(model), "mere_attribute")
        yield said(len(training), "base_trains", names=f"{', '.join(training[:3])}{' …' * (len(training) > 3)}")
        own = [p for wrapper in made for n, p in wrapper.named_parameters() if "base." not in n]
        yield said(sum(not p.requires_grad for p in own), "frozen_after")
        yield said(torch.equal(model(ids), logits), "not_the_base")
        for layer in model.layers:
            for name, p in layer.self_attn.named_parameters():
                p.data = p.data if "base." in name else draw(*p.shape)
        yield Piece("the logits with open gates (B, T, V)", model(ids))


EXERCISES = {
    "prefix_keys_values": Exercise(
        "prefix_keys_values(attention, prompt) -> keys (G, K, d), values (G, K, d)", right_keys_values,
        catalogue(right_keys_values, TABLES["keys_values"]),
        calls(some(inputs_of_prefix, "attention", "prompt"), ("the keys (G, K, d)", "the values (G, K, d)"),
              PREFIX_SIZES, then=follows("prompt")),
    ),
    "gated_prefix_attention": Exercise(
        "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)", prefix_of(llama_adapter),
        PREFIXES, probe_prefix, {"T": "It depends on the token: is there a mask where there should be none?"},
    ),
    "initial_values": Exercise(
        "initial_values(K, D, H) -> prompt (K, D), gate (H, 1, 1)", start_of(llama_adapter),
        STARTS, probe_start,
    ),
    **questions(
        moves_first=moved("llama_adapter", prompt_length=3, steps=1),
        moves_second=moved("llama_adapter", prompt_length=3, steps=2),
    ),
    "attach_adapters": Exercise(
        "attach_adapters(model, wrap) -> the model", right_attach, ATTACH, probe_attach, changes=(0,)
    ),
    "adaption_prompt_layer": Exercise(
        "a class: AdaptionPromptLayer(attention, prompt_length), called as layer(x, positions) -> (B, T, D)",
        *made_of(llama_adapter, "circulated", lambda mod: partial(mod.AdaptedAttention, gate="layer", tanh=False)),
        probe_circulating,
    ),
    "prefix_layer": Exercise(
        "a class: PrefixLayer(width, num_heads, prompt_length), called as layer(x) -> (B, T, D)",
        *made_of(llama_adapter, "flow", lambda mod: partial(mod.GatedPrefixAttention, gate="feature", tanh=False)),
        probe_flow,
    ),
    "scaled_linear": Exercise(
        "scaled_linear(linear, x, scale, shift) -> (B, T, out)", scaled_by(llama_adapter_v2), SCALINGS,
        calls(inputs_of_scaled, "the output (B, T, out)", SCALED_SIZES, float32=("scale", "shift"), once=("linear",)),
    ),
    "scaled_merge": Exercise(
        "scaled_merge(linear, scale, shift) -> weight (out, in), bias (out)", right_merge,
        MERGED + catalogue(right_merge, TABLES["merges"]),
        calls(some(inputs_of_scaled, "linear", "scale", "shift"),
              ("the merged weight (out, in)", "the merged bias (out)"), SCALED_SIZES, half=False, gradient=False),
    ),
    "trained_norm": Exercise(
        "a class: TrainedNorm(norm), a module with `active`, called as module(x) -> (B, T, D)",
        llama_adapter_v2.TrainedNorm, NORM, probe_norm,
    ),
}  # fmt: skip
