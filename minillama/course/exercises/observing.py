"""What is seen of an answer: a probe calls it on random inputs, every gate open, and yields what came of it.

A probe is a generator, probe(answer, draw), of Pieces. `calls` makes the usual one: it calls a function at several
sizes, in float32 and in bfloat16, and yields what it returns, the gradient of that for every input, what it changed in
passing, and how often it ran a module. What an answer makes of a class is probed by hand, with the same Pieces.
running.py runs a probe.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn


class Wrong(Exception):
    """What a probe raises when it cannot go on with an answer: Wrong(mistake's name, sentence)."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thing seen.

    what: its name with its axes, "the output (B, T, D)".  value: a tensor.
    where: at which sizes and dtype, "" for the first.  kind: "value", "gradient" (of the input `of`), "fact", or
    "count", a fact that may be smaller.
    mistake, why: for a fact, the name of the mistake and the sentence to say where it is not as it should be.
    """

    what: str
    value: torch.Tensor
    where: str = ""
    kind: str = "value"
    of: str = ""
    mistake: str = ""
    why: str = ""

    @property
    def half(self):
        return "bfloat16" in self.where

    def __str__(self):
        return f"{self.what} {self.where}".rstrip()


@dataclasses.dataclass(frozen=True)
class End:
    """How an observation ended before its end: the mistake's name and the sentence."""

    mistake: str
    why: str

    @property
    def plain(self):
        """But for where it stood and what the call was given, which do not matter."""
        given = r", at `.*?`| The dtypes: .*| It was called.*| of tensor [ab] \(\d+\)"  # a * b or b * a
        return self.mistake, re.sub(given, "", self.why)


def fact(value, mistake, why, what=None):
    """A Piece that is a number, and what to say where it is another."""
    return Piece(what or why, torch.as_tensor(value), kind="fact", mistake=mistake, why=why)


def teller(tables, *titles):
    """A function that makes a fact of a value and a mistake's name, so that a topic's module is code alone: the
    sentence stands in the topic's Markdown file, in its section "said" or in the tables of these titles.

    what: the fact's own name, where that of its mistake may differ.  numbers: what stands in the sentence's braces.
    """
    sentences = {name: f"{sentence}." for title in titles for name, _, _, sentence in tables[title]} | tables["said"]

    def tell(value, name, what=None, /, **numbers):
        return fact(value, name, sentences[name].format(**numbers) if numbers else sentences[name], what or name)

    tell.sentences = sentences
    return tell


@dataclasses.dataclass(frozen=True, eq=False)
class Exercise:
    """What an answer is held against.

    call:      how the answer is called and what it returns, for messages: "rms_norm(x, weight, eps) -> (B, T, D)";
               where it ends in "-> a whole number", nothing but a whole number will do.
    right:     the right answer.
    mistakes:  wrong ones (catalogue.py).
    probe:     see above.
    hints:     what to say where an answer is wrong at some places of an axis only, {"T": sentence}.
    forbidden: {function: sentence}, what an answer is to do without: torch's, or any written in Python.
    changes:   places of the arguments that the answer is there to change: the model of a training step.
    """

    call: str
    right: Callable
    mistakes: tuple
    probe: Callable
    hints: dict = dataclasses.field(default_factory=dict)
    forbidden: dict = dataclasses.field(default_factory=dict)
    changes: tuple = ()


# ── the usual probe ─────────────────────────────────────────────────────────────────────────────────────────────────


def calls(inputs, outputs, sizes, float32=(), once=(), half=True, gradient=True, then=None, again=None, last=None):
    """A probe of a function.

    inputs:  inputs(draw, **sizes) -> {parameter's name: value}, in the order of the call.
    outputs: the name of what it returns, or a tuple of names.
    sizes:   dicts, at least two; at the first everything that can differ does, at the last what can be 1 is 1.
    float32: names of the inputs that stay float32 where the others are bfloat16.
    once:    names of modules, "layer.mlp", each of whose rows is to be computed only once.
    half: whether to ask in bfloat16 too; "told" where the task says nothing of dtypes: what fails there is only said.
    gradient: whether to ask for gradients.
    then: then(answer, draw, given) yields more Pieces, of further calls on the same inputs.
    again: what differs, {} or more, where the first size comes again with other numbers, by which a state shows.
    last: last(answer, draw) yields more Pieces, after all the calls.
    """
    sizes = [sizes] if isinstance(sizes, dict) else list(sizes)

    def probe(answer, draw):
        first = []
        for halved in (False, True) if half else (False,):
            repeated = [] if again is None or halved else [{**sizes[0], **again}]
            for i, size in enumerate(sizes + repeated):
                given = inputs(draw, **size)
                if halved:
                    given = {name: v if name in float32 else in_bfloat16(v) for name, v in given.items()}
                where = f"for {', '.join(f'{name} = {n}' for name, n in size.items())}" if i else ""
                where = "where the first size comes again" if i == len(sizes) else where
                where = f"in bfloat16 {where}".strip() if halved else where
                more = then(answer, draw, given) if then else ()
                for piece in itertools.chain(called(answer, given, outputs, once, gradient), more):
                    yield dataclasses.replace(piece, where=where)
                    if not i and not halved and piece.kind == "value":
                        first.append(dataclasses.replace(piece, where="of the first call, looked at again at the end"))
            yield from () if halved else first  # no copies: a later call may have written over them
        yield from last(answer, draw) if last else ()

    probe.inputs, probe.told = lambda draw: inputs(draw, **sizes[0]), half == "told"
    return probe


def in_bfloat16(value):
    return value.bfloat16() if isinstance(value, nn.Module) or floating(value) else value


def called(answer, given, outputs, once=(), gradient=True):
    """Pieces of one call: what it returns, its gradients, and what it changed. given: {name: value}."""
    leaves = {name: x.requires_grad_(gradient) for name, x in given.items() if floating(x)}
    modules = {name: x for name, x in given.items() if isinstance(x, nn.Module)}
    for name, module in modules.items():
        leaves.update({f"{name}'s {own}": p for own, p in module.named_parameters() if p.requires_grad})
    # a copy behind each, so that what is changed in place is seen and not refused by torch
    handed = {name: x.clone() if name in leaves else x for name, x in given.items()}
    rows = dict.fromkeys(once, 0)
    with contextlib.ExitStack() as hooks:
        for name in once:

            def count(module, inputs, output, name=name):
                rows[name] += output.numel() // output.shape[-1]

            first, _, rest = name.partition(".")
            hooks.enter_context(modules[first].get_submodule(rest).register_forward_hook(count))
        result = answer(*handed.values())
    pairs = [(outputs, result)] if isinstance(outputs, str) else named(outputs, result)
    pieces = [Piece(*pair) for pair in pairs]
    yield from pieces
    for name, number in rows.items():
        why = f"it runs {name} twice on the same rows: keep what it returns, and use it again."
        yield Piece(f"how many rows {name} computes", torch.tensor(number), kind="count", mistake="run_twice", why=why)
    for piece in pieces if gradient else ():
        if floating(piece.value):
            short = re.sub(r" \([^)]*\)$", "", piece.what)
            of = f" of {short}" if len(pieces) > 1 else ""
            for name, found in zip(leaves, gradients(piece.value, *leaves.values())):
                yield Piece(f"the gradient{of} with respect to {name}", found, kind="gradient", of=name)


def floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def named(names, result):
    """Pairs (name, tensor) of an answer that returns several tensors."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        needed = f"needed are {len(names)} things, {' and '.join(names)}"
        raise Wrong("how_many_things", f"{needed}; it returned {describe(result)}.")
    return list(zip(names, result))


def gradients(out, *inputs):
    """The gradient of a fixed weighting of `out` with respect to each input; zeros where none flows."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    weighting = torch.linspace(-1, 1.1, out.numel()).view(out.shape).to(out.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad((out * weighting).sum(), wanted, retain_graph=True, materialize_grads=True)
    found = dict(zip(map(id, wanted), found))
    return [found.get(id(x), torch.zeros_like(x)) for x in inputs]


def frozen(module):
    """Pieces of a base that must not train."""
    number = sum(p.requires_grad for p in module.parameters())
    yield fact(number, "unfrozen", "the base's own weights train: they stay frozen, requires_grad_(False).")


def left_behind(module):
    """Pieces of a module: how many plain tensors `.to(device)` leaves where they are."""
    names = [n for part in module.modules() for n, v in vars(part).items() if isinstance(v, torch.Tensor)]
    why = f"{' and '.join(names)}: a plain tensor, which stays behind when the module moves to another device"
    yield fact(len(names), "left_behind", f"{why}; make it a parameter, register_buffer it, or do without it.")


# ── what probes share ───────────────────────────────────────────────────────────────────────────────────────────────


def describe(value):
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{'an' if name[0] == 'i' else 'a'} {name} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(dict.fromkeys(map(describe, value)))}"
    return f"{value!r}" if value is None else f"{'an' if type(value) is int else 'a'} {type(value).__name__}"


def other(value):
    """Another value of the same form, or None."""
    if floating(value):
        return value.flip(-1) * 1.5 + 0.25
    if isinstance(value, torch.Tensor):
        return value.flip(-1)
    return value * 2 + 1 if isinstance(value, int | float) and not isinstance(value, bool) else None


def filled(module, draw):
    """The module frozen, in eval mode, every number drawn: matrices by N(0, 1/fan_in), vectors by 1 + 0.3 · N(0, 1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = draw(*parameter.shape)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * drawn)
    return module.requires_grad_(False).eval()


def as_function(build, names):
    """A wrapper class as a function of what it wraps, the inputs, and its own parameters by these names.

    build(base, **own) makes the module, given its parameters by name. It is kept as long as the base stays the same,
    so that whatever it wrongly keeps shows in the next call.
    """
    made = {}

    def function(base, *arguments):
        first = len(arguments) - len(names)
        inputs, own = arguments[:first], dict(zip(names, arguments[first:]))
        if made.get("base") is not base:
            made.update(base=base, module=build(base, **own))
        return torch.func.functional_call(made["module"], own, inputs)

    return function


planted = mock.patch.object  # planted(module, name, mistake): within the block the module's name stands for the mistake
