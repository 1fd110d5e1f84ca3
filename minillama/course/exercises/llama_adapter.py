"""Lesson 03: zero-init gated prefix attention and V2, with the wrong versions that one writes easily."""

import torch
from torch import nn

import minillama

from ...adapters import llama_adapter, llama_adapter_v2
from ...attention import Attention, RoPE, rotate  # noqa: F401 (rows of KEYS_VALUES name it)
from ...llama import RMSNorm
from .catalogue import catalogue, tables
from .observing import (
    Exercise,
    Piece,
    Wrong,
    as_function,
    calls,
    describe,
    fact,
    filled,
    frozen,
    gradients,
    left_behind,
    named,
)  # fmt: skip
from .predictions import Question, moved

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one

# ── the modules themselves, whose mistakes are planted in the models too ──────────────────────────────────────────────


def prefix_of(module):
    """The module's AdaptedAttention as a function of the attention, x, positions, prompt and gate."""
    return as_function(lambda base, prompt, gate: module.AdaptedAttention(base, len(prompt)), ("prompt", "gate"))


def start_of(module):
    """What the module's parameters start from, as a function of their sizes."""

    def initial_values(K, D, H):
        wrapper = module.AdaptedAttention(Attention(D, H), K)
        return wrapper.prompt.detach(), wrapper.gate.detach()

    return initial_values


def scaled_by(module):
    return as_function(lambda base, **own: module.ScaledLinear(base), ("scale", "adapter_bias"))


def merged_by(module):
    """The module's merge as a function that returns weight and bias."""

    def scaled_merge(linear, scale, shift):
        wrapper = module.ScaledLinear(linear)
        wrapper.scale.data, wrapper.adapter_bias.data = scale, shift
        return wrapper.weight.detach(), wrapper.bias.detach()

    return scaled_merge


# what the rows below take the place of

PREFIX = TABLES["prefix"]
START_ROWS = TABLES["start_rows"]


# ── keys and values, and where prompt and gate start ──────────────────────────────────────────────────────────────────


def right_keys_values(attention, prompt):
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    k, v = (z.unflatten(-1, (attention.num_kv_heads, attention.head_dim)) for z in (k, v))  # (K, G, d)
    return k.transpose(0, 1), v.transpose(0, 1)


KEYS_VALUES = catalogue(right_keys_values, TABLES["keys_values"])


def attention_of(draw, H, G, d, D):
    """A frozen attention with grouped queries, RoPE and biases, wider than the model: nothing can hide."""
    return filled(Attention(D, H, G, d, RoPE(d), bias=True), draw)


# G · d can be cut by D / H and by H as well, so that a wrong cut is seen in the shape
KEYS_SIZES = (dict(K=7, H=6, G=3, d=8, D=18), dict(K=5, H=4, G=4, d=6, D=12), dict(K=1, H=2, G=1, d=4, D=8))


def uniform_prompt(K, D, H):
    """the prompt from torch.rand, uniform in 0 to 1; needed are normal numbers, N(0, 1), from torch.randn"""
    return torch.rand(K, D), torch.zeros(H, 1, 1)


def small_prompt(K, D, H):
    """a prompt drawn small, from N(0, 0.02²), where the paper's code and its peers draw from N(0, 1)"""
    return 0.02 * torch.randn(K, D), torch.zeros(H, 1, 1)


def wrong_one_zero(K, D, H):
    """the prompt at 0 and the gate not: the other one is to be 0"""
    return torch.zeros(K, D), torch.ones(H, 1, 1)


def probe_start(answer, draw):
    for K, D, H in ((50, 240, 6), (40, 300, 5)):
        (_, prompt), (_, gate) = named(("the prompt (K, D)", "the gate (H, 1, 1)"), answer(K, D, H))
        for what, value, shape in ("the prompt", prompt, (K, D)), ("the gate", gate, (H, 1, 1)):
            if not isinstance(value, torch.Tensor):
                raise Wrong("form", f"{what} should be a float32 tensor; it is {describe(value)}.")
            if value.shape != shape:
                needed = f"{what} has shape {tuple(value.shape)}; needed is {shape} for K = {K}, D = {D}, H = {H}"
                why = ": one number for each head, in front of two axes of 1, so that it multiplies (B, H, T, d)."
                raise Wrong(f"shape_of_{what[4:]}", f"{needed}{why if len(shape) == 3 else '.'}")
            why = f"{what} is {str(value.dtype)[6:]}; adapter numbers are float32, in which small steps are not lost."
            yield said(value.dtype == torch.float32, "start_dtype", why)
        closed, empty = not gate.any(), not prompt.any()
        mistake, why = {(True, True): ("ZeroPrompt", START_ROWS[0][3]),
                        (False, True): ("wrong_one_zero", wrong_one_zero.__doc__)}.get(
                            (closed, empty), ("OpenGate", START_ROWS[1][3]))  # fmt: skip
        yield said(closed + 2 * empty, mistake, f"{why}.")
        yield from drawn(prompt)
        made = [(torch.manual_seed(seed), answer.unseeded(K, D, H)[0], torch.get_rng_state()) for seed in (1, 2)]
        alike = any(torch.equal(one, other) for one, other in list(zip(*made))[1:])
        why = "two calls give the same prompt (a fixed seed, a cache), or set torch's seed: draw anew, and set none."
        yield said(alike, "same_prompt", why)


def drawn(prompt):
    """Pieces of a prompt's numbers, which should be those of N(0, 1), to a tenth, each drawn by itself."""
    numbers = prompt.detach().double()
    mean, deviation, flat = numbers.mean().item(), numbers.std().item(), numbers.flatten()
    alike = any(len(torch.unique(numbers, dim=i)) < numbers.shape[i] for i in (0, 1))
    why = "the prompt has equal rows or columns: they get equal gradients and stay equal; draw each number by itself."
    yield said(alike, "equal_rows_of_prompt", why)
    why = "the prompt's numbers only count up: nothing is random; needed are normal ones, N(0, 1), from torch.randn."
    yield said(bool((flat.diff() > 0).all()), "counted_prompt", why)
    kinds = len(flat.unique())
    why = f"the prompt has only {kinds} different numbers; needed are normal ones, N(0, 1), from torch.randn."
    yield said(kinds < len(flat) / 2, "few_numbers_in_prompt", why)
    uniform = (
        deviation > 0 and ((numbers - mean) / deviation).pow(4).mean().item() < 2.1
    )  # 1.8 of uniform, 3 of normal ones
    why = (
        "the prompt's numbers are uniform, as torch.rand draws them; needed are normal ones, N(0, 1), from torch.randn."
    )
    yield said(uniform, "uniform_prompt", why)
    for what, found, needed in ("mean", mean, 0), ("standard deviation", deviation, 1):
        near = needed if abs(found - needed) < 0.1 else round(found, 1 if abs(found) > 0.3 else 2)
        why = f"the prompt's {what} is {near:g}; needed is {needed}: N(0, 1), from torch.randn."
        yield said(float(near), f"{what.split()[-1]}_of_prompt", why)


def learns(out, gate):
    """Pieces: whether a gate at 0, of which `out` was made, gets a gradient."""
    why = "at gate 0 no gradient reaches the gate, so that it never opens: is the term left out there, or the gate "
    why += "detached? 0 times the term must be added too, for through that product the gate gets its gradient."
    yield said(bool(gradients(out, gate)[0].any()), "closed_for_good", why)


# ── the layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PREFIX_SIZES = tuple({"B": B, "T": T} | size for (B, T), size in zip(((2, 5), (3, 2), (1, 1)), KEYS_SIZES))


def inputs_of_prefix(draw, B, T, K, H, G, d, D):
    positions = 4 + torch.arange(T) + 2 * (torch.arange(T) > 2)  # they need not start at 0, nor follow one another
    return dict(attention=attention_of(draw, H, G, d, D), x=draw(B, T, D), positions=positions, prompt=draw(K, D),
                gate=draw(H, 1, 1))  # fmt: skip


calls_of_prefix = calls(inputs_of_prefix, "the output (B, T, D)", PREFIX_SIZES, float32=("prompt", "gate"))


def probe_prefix(answer, draw):
    again = False
    for piece in calls_of_prefix(answer, draw):
        if piece.half and not again:  # the same layer, in the next step of training
            attention, x, positions, prompt, gate = inputs_of_prefix(draw, **PREFIX_SIZES[0]).values()
            answer(attention, x, positions, prompt, gate)
            changed = answer(attention, x, positions, prompt + 1, gate)
            yield Piece("the output (B, T, D)", changed, "after the prompt has changed")
            closed = (gate * 0).requires_grad_(True)
            shut = answer(attention, x, positions, prompt, closed)
            yield Piece("the output (B, T, D)", shut, "at gate 0")
            yield from learns(shut, closed)
            again = True
        yield piece


probe_prefix.inputs = calls_of_prefix.inputs


def circulating(module):
    """The module's AdaptedAttention as the layer that circulates is meant: one gate, no tanh."""
    return lambda attention, prompt_length: module.AdaptedAttention(attention, prompt_length, "layer", False)


def probe_circulating(answer, draw):
    for i, size in enumerate(PREFIX_SIZES):
        B, T, K, H, G, d, D = size.values()
        given, K = inputs_of_prefix(draw, **size), K if i else 50
        attention, x, positions, where = *list(given.values())[:3], f"for B = {B}, T = {T}, K = {K}" if i else ""
        module = answer(attention, K).eval()
        own = own_of(module, attention)
        prompts = [p for p in own.values() if p.shape == (K, D)]
        gates = [p for p in own.values() if p.numel() == 1 and p not in set(prompts)]
        if len(prompts) != 1 or len(gates) != 1 or len(own) != 2:
            needed = f"a prompt of shape ({K}, {D}) for prompt_length {K} and width {D}, and a gate of one number"
            found = {name: tuple(p.shape) for name, p in own.items()} or "none"
            raise Wrong("parameters", f"needed are two parameters of its own, {needed}; it has {found}.")
        (prompt,), (gate,) = prompts, gates
        yield said(bool(gate.any()), "OpenGate", f"{START_ROWS[1][3]}.")
        yield from drawn(prompt) if not i else ()
        yield from trains(own)
        fresh = module(x, positions)
        yield Piece("the fresh module's output: the base's (B, T, D)", fresh, where)
        yield from learns(fresh, gate)
        yield from frozen(attention)
        prompt.data, gate.data = draw(*prompt.shape), draw(*gate.shape)
        yield from opened(module, {"prompt": prompt, "gate": gate}, where, x, positions)
        x = draw(B + 1, T, D)
        yield Piece("the output (B, T, D)", module(x, positions), f"for another batch, of {B + 1}")
        prompt.data = prompt.data + 1
        yield Piece("the output (B, T, D)", module(x, positions), "after the prompt has changed")
        yield from left_behind(module)


def own_of(module, base):
    """The module's own parameters by name, without those of what it wraps."""
    if not isinstance(module, nn.Module):
        raise Wrong("form", f"needed is a module; it is {describe(module)}.")
    theirs = set(map(id, base.parameters()))
    return {name: p for name, p in module.named_parameters() if id(p) not in theirs}


def said(value, mistake, why):
    """A fact that is known by its mistake, whatever its sentence says."""
    return fact(value, mistake, why, mistake)


def trains(own):
    names = [name for name, p in own.items() if not p.requires_grad]
    yield said(len(names), "never_trains", f"{' and '.join(names)} must train: leave requires_grad True.")


def opened(module, own, where, x, *more):
    """Pieces of what a module makes of x, and the gradients of that."""
    x.requires_grad_(True)
    out = module(x, *more)
    yield Piece("the output (B, T, D)", out, where)
    for name, found in zip((*own, "x"), gradients(out, *own.values(), x)):
        found = found.flatten() if name == "gate" else found  # in whatever shape it was made
        yield Piece(f"the gradient with respect to {name}", found, where, "gradient", name)


def flowing(module):
    """The module's GatedPrefixAttention as the layer of its own that circulates is meant."""
    return lambda width, num_heads, prompt_length: module.GatedPrefixAttention(
        width, num_heads, prompt_length, "feature", False
    )


FLOW = catalogue(llama_adapter, TABLES["flow"], wrap=flowing)


def probe_flow(answer, draw):
    for i, (D, H, K, B, T) in enumerate(((24, 4, 50, 2, 5), (12, 3, 4, 3, 2), (8, 1, 1, 1, 1))):
        module, where = answer(D, H, K), f"for D = {D}, H = {H}, K = {K}, T = {T}" if i else ""
        own = {name.removesuffix(".weight"): p for name, p in own_of(module, nn.Module()).items()}
        needed = {"prompt": (K, D), "gate": (1, D), "c_attn": (3 * D, D), "c_proj": (D, D)}
        shapes = {name: (1, D) if name == "gate" and p.numel() == D else tuple(p.shape) for name, p in own.items()}
        if shapes != needed:
            raise Wrong("parameters", f"needed are {needed}, matrices without biases, for width {D}, num_heads {H} and "
                        f"prompt_length {K}; it has {shapes}.")  # fmt: skip
        own = {name: own[name] for name in needed}
        yield said(bool(own["gate"].any()), "GateAtOne", "a gate that does not start at 0.")
        yield said(
            bool(own["prompt"].any()), "PromptAtZero", "a prompt at 0 behind a gate at 0: neither gets a gradient."
        )
        yield from drawn(own["prompt"]) if not i else ()
        yield from trains(own)
        for name, p in own.items():
            p.data = draw(*p.shape) * (D**-0.5 if name.startswith("c_") else 1)
        x = draw(B, T, D)
        yield from opened(module.eval(), own, where, x)
        own["gate"].data = own["gate"].data * 0
        shut = module(x)
        yield Piece("the output at gate 0 (B, T, D)", shut, where)
        yield from learns(shut, own["gate"])


# ── LLaMA-Adapter V2 ────────────────────────────────────────────────────────────────────────────────────────────────


def right_merge(linear, scale, shift):
    return linear.weight * scale[:, None], (linear.bias + shift) * scale


MERGES = catalogue(llama_adapter_v2, TABLES["merges_all"], wrap=merged_by) + catalogue(right_merge, TABLES["merges"])
SCALED_SIZES = (dict(B=2, T=5, n_in=10, n_out=7), dict(B=3, T=2, n_in=6, n_out=6), dict(B=1, T=1, n_in=3, n_out=5))


def inputs_of_scaled(draw, B, T, n_in, n_out):
    return dict(linear=filled(nn.Linear(n_in, n_out), draw), x=draw(B, T, n_in), scale=draw(n_out), shift=draw(n_out))


def inputs_of_merge(draw, **sizes):
    given = inputs_of_scaled(draw, **sizes)
    return {name: given[name] for name in ("linear", "scale", "shift")}


NORM = catalogue(llama_adapter_v2, TABLES["norm_all"], wrap=lambda module: module.TrainedNorm)


def probe_norm(answer, draw):
    for i, (norm, shape) in enumerate(((nn.LayerNorm(8, eps=0.3), (2, 5, 8)), (RMSNorm(6, eps=0.2), (1, 1, 6)))):
        norm, x, where = filled(norm, draw), draw(*shape), "for an RMSNorm" if i else ""
        module, before = answer(norm), norm(x)
        if not isinstance(module, nn.Module) or not hasattr(module, "active"):
            raise Wrong("form", "needed is a module with an attribute `active`, True at first.")
        yield said(module.active is True, "starts_inactive", "`active` is to be True at first.")
        yield Piece("the fresh module's output (B, T, D)", module(x), where)
        yield from frozen(norm)
        own = {}
        for name, p in norm.named_parameters():
            copies = [q for q in own_of(module, norm).values() if q.requires_grad and q.shape == p.shape]
            own.update((name, q) for q in copies if torch.equal(q, p))
        needed = len(list(norm.parameters()))
        number = sum(q.requires_grad for q in own_of(module, norm).values())
        why = f"{number} tensors of its own train; needed is a trained copy of each of the norm's {needed}."
        yield said(len(own) == needed == number, "copy_stays_frozen" if not number else "not_a_copy", why)
        for q in own.values():
            q.data = draw(*q.shape)
        yield from opened(module, own, where, x)
        module.active = False
        out = module(x)
        yield Piece("the output with `active` False: the base's (B, T, D)", out, where)
        why = "with `active` False no gradient reaches x, and the layers below get none: drop the no_grad or detach."
        yield said(bool(gradients(out, x)[0].any()), "inactive_cut_off", why)
        yield said(
            torch.equal(norm(x), before), "norm_changed", "the frozen norm itself has changed; leave it as it is."
        )
        module.active = True
        yield Piece("the output with `active` True again (B, T, D)", module(x), where)


# ── a whole model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def right_attach(model, wrap):
    model.requires_grad_(False)
    for layer in model.layers:
        layer.self_attn = wrap(layer.self_attn)
    return model


ATTACH = catalogue(right_attach, TABLES["attach"])


class Louder(nn.Module):
    """Another wrapper to try: what the attention says, times a number."""

    def __init__(self, base):
        super().__init__()
        self.base, self.volume = base, nn.Parameter(torch.ones(1))

    def forward(self, *inputs):
        return self.base(*inputs) * self.volume


def probe_attach(answer, draw):
    for L, kind in (3, lambda base: llama_adapter.AdaptedAttention(base, 3)), (1, Louder):
        config = minillama.LLaMAConfig(31, 16, 24, L, 4, 2, attention_bias=True, mlp_bias=True)
        model = filled(minillama.LLaMA(config), draw).requires_grad_(True)
        ids, inside, names, made = torch.arange(8).view(2, 4), [], dict(model.named_parameters()), []
        attentions, logits = [layer.self_attn for layer in model.layers], model(ids).detach()

        def wrap(attention, kind=kind, made=made, inside=inside):
            if not isinstance(attention, Attention) and not any(attention is wrapper for wrapper in made):
                raise Wrong("another_module", f"wrap was given {describe(attention)}; it is for a layer's self_attn.")
            inside.append(attention), made.append(kind(attention))
            return made[-1]

        try:
            result = answer(model, wrap)
        except Wrong as wrong:
            if wrong.args[1].startswith("it returned nothing"):
                raise Wrong("not_returned", "it returns nothing: end with `return model`.") from None
            raise
        yield said(
            result is model, "not_returned", "it returns something else than the model it was given; return model."
        )
        found = [layer.self_attn for layer in model.layers]
        at = [i for i, attention in enumerate(found) if any(attention is wrapper for wrapper in made)]
        why = f"only the layers {at} of {L} have a wrapper for their self_attn." if at else f"{ATTACH[9].sentence}."
        yield said(len(at), "not_every_layer" if at else "never_stored", why)
        yield said(len(set(map(id, found))), "shared", f"{ATTACH[8].sentence}.")
        twice = any(attention is wrapper for attention in inside for wrapper in made) or len(inside) > L
        yield said(twice, "wrapped_twice", "an attention is wrapped twice.")
        own = [getattr(new, "base", None) is old for new, old in zip(found, attentions)]
        yield said(sum(own), "another_attention", "a wrapper stands around another attention than its own layer's.")
        training = [name for name, p in names.items() if p.requires_grad]
        why = f"of the base these still train: {', '.join(training[:3])}{' …' * (len(training) > 3)}; freeze all of it."
        yield said(len(training), "base_trains", why)
        frozen_own = [
            p for wrapper in made for n, p in wrapper.named_parameters() if "base." not in n and not p.requires_grad
        ]
        yield said(len(frozen_own), "frozen_after", f"{ATTACH[0].sentence}.")
        why = "before a step the adapted model is not the base bit for bit; wrap, and change nothing else."
        yield said(torch.equal(model(ids), logits), "not_the_base", why)
        for layer in model.layers:
            for name, p in layer.self_attn.named_parameters():
                p.data = p.data if "base." in name else draw(*p.shape)
        yield Piece("the logits with open gates (B, T, V)", model(ids))


PREFIXES = catalogue(llama_adapter, TABLES["prefixes"], wrap=prefix_of)
STARTS = catalogue(llama_adapter, START_ROWS, wrap=start_of)
SCALINGS = catalogue(llama_adapter_v2, TABLES["scalings"], wrap=scaled_by)
PLANTED = (*PREFIXES[: len(PREFIX)], *STARTS, SCALINGS[0], MERGES[0], NORM[0])  # each must fail a test in the models
HARMLESS = {
    "BiasTwice": ("llama",),
    "HeadsInTheWrongOrder": ("llama", "gpt2"),
}  # no bias there; nothing is repeated there

CIRCULATED = catalogue(llama_adapter, TABLES["circulated"], wrap=circulating)

EXERCISES = {
    "prefix_keys_values": Exercise(
        "prefix_keys_values(attention, prompt) -> keys (G, K, d), values (G, K, d)", right_keys_values, KEYS_VALUES,
        calls(lambda draw, K, H, G, d, D: dict(attention=attention_of(draw, H, G, d, D), prompt=draw(K, D)),
              ("the keys (G, K, d)", "the values (G, K, d)"), KEYS_SIZES),
    ),
    "gated_prefix_attention": Exercise(
        "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)", prefix_of(llama_adapter),
        PREFIXES,
        probe_prefix, {"T": "It depends on the token: is there a mask where there should be none?"},
    ),
    "initial_values": Exercise(
        "initial_values(K, D, H) -> prompt (K, D), gate (H, 1, 1)", start_of(llama_adapter),
        STARTS + catalogue(None, (), small_prompt, uniform_prompt, wrong_one_zero), probe_start,
    ),
    "moves_first": Question(
        moved("llama_adapter", prompt_length=3, steps=1),
        "At gate 0 the prompt's gradient carries the factor tanh(0) = 0, the gate's does not.",
        {frozenset(["gate", "prompt"]): "look again at what multiplies the prompt's gradient: the gate, and it is 0.",
         frozenset(["prompt"]): "the other way round: the prompt's gradient carries the gate as a factor, and it is 0.",
         frozenset(): "one of the two does move: the gate's gradient does not carry the gate."},
        ("gate", "prompt"), "Write the term as tanh(g) · z(P): what is its derivative by g at g = 0, and what by P?",
    ),
    "moves_second": Question(
        moved("llama_adapter", prompt_length=3, steps=2),
        "After one step the gate is open, and the prompt feels the loss.",
        {frozenset(["gate"]): "the gate is no longer 0: does the prompt's gradient still vanish?",
         frozenset(["prompt"]): "the gate moved in the first step; is there anything that holds it in the second?",
         frozenset(): "at least the gate moved in the first step, and what has moved counts."},
        ("gate", "prompt"), "What is the gate after the first step, and what does that make of the prompt's gradient?",
    ),
    "attach_adapters": Exercise("attach_adapters(model, wrap) -> the model", right_attach, ATTACH, probe_attach,
    changes=(0,)),
    "adaption_prompt_layer": Exercise(
        "a class: AdaptionPromptLayer(attention, prompt_length), called as layer(x, positions) -> (B, T, D)",
        circulating(llama_adapter),
        CIRCULATED, probe_circulating,
    ),
    "prefix_layer": Exercise(
        "a class: PrefixLayer(width, num_heads, prompt_length), called as layer(x) -> (B, T, D)",
        flowing(llama_adapter), FLOW,
        probe_flow,
    ),
    "scaled_linear": Exercise(
        "scaled_linear(linear, x, scale, shift) -> (B, T, out)", scaled_by(llama_adapter_v2), SCALINGS,
        calls(inputs_of_scaled, "the output (B, T, out)", SCALED_SIZES, float32=("scale", "shift"), once=("linear",)),
    ),
    "scaled_merge": Exercise(
        "scaled_merge(linear, scale, shift) -> weight (out, in), bias (out)", right_merge, MERGES,
        calls(inputs_of_merge, ("the merged weight (out, in)", "the merged bias (out)"), SCALED_SIZES, half=False,
              gradient=False),
    ),
    "trained_norm": Exercise(
        "a class: TrainedNorm(norm), a module with `active`, called as module(x) -> (B, T, D)",
        llama_adapter_v2.TrainedNorm, NORM, probe_norm,
    ),
}  # fmt: skip
