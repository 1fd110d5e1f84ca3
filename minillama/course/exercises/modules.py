"""What several topics' probes ask of modules, and how a module becomes a function."""

import torch
from torch import nn

import minillama

from .observing import Piece, Wrong, describe, fact, gradients


def started(wrapper):
    """What a wrapper's own parameters start from."""
    return tuple(getattr(wrapper, name).detach() for name in wrapper.own)


def merged(wrapper, *own):
    """The weight and bias of the projection that a wrapper amounts to, where its own parameters are these."""
    for name, value in zip(wrapper.own, own):
        getattr(wrapper, name).data = value
    return wrapper.weight.detach(), wrapper.bias.detach()


def trained_numbers(config, method, **options):
    """How many numbers a method trains on a LLaMA of that shape, which takes no memory here."""
    with minillama.device.shapes_only():
        model = minillama.adapt(minillama.LLaMA(config), method, **options)
    return sum(p.numel() for p in minillama.adapters.adapter_parameters(model).values())


def own_of(module, base):
    """The module's own parameters by name, without those of what it wraps."""
    if not isinstance(module, nn.Module):
        raise Wrong("form", f"needed is a module; it is {describe(module)}.")
    theirs = set(map(id, base.parameters()))
    return {name: p for name, p in module.named_parameters() if id(p) not in theirs}


def trains(own):
    """A fact: whether all of a module's own parameters, {name: parameter}, train."""
    names = [name for name, p in own.items() if not p.requires_grad]
    why = f"{' and '.join(names)} must train: leave requires_grad True."
    return fact(len(names), "never_trains", why, "never_trains")


def opened(module, own, where, x, *more, when="", axes="(B, T, D)"):
    """Pieces of what a module makes of x, and the gradients of that."""
    out = module(x.requires_grad_(True), *more)
    yield Piece(f"the output {when}{axes}", out, where)
    for name, found in zip((*own, "x"), gradients(out, *own.values(), x)):
        found = found.flatten() if name == "gate" else found  # in whatever shape it was made
        yield Piece(f"the gradient {when}with respect to {name}", found, where, "gradient", name)


def reached(out, x):
    """Whether a gradient of `out` reaches x."""
    return bool(gradients(out, x)[0].any())


def repeats(answer, *sizes):
    """Whether the first of the tensors that a start draws, or torch's random state behind it, is the same twice."""
    made = [
        (torch.default_generator.manual_seed(seed), answer.unseeded(*sizes)[0], torch.get_rng_state())
        for seed in (1, 2)
    ]
    return any(torch.equal(one, other) for one, other in list(zip(*made))[1:])


def some(inputs, *names):
    """Of what another exercise is given, these."""
    return lambda draw, **sizes: {name: value for name, value in inputs(draw, **sizes).items() if name in names}


def follows(*names):
    """For the `then` of `calls`: a fact, whether what is returned follows these inputs, which training changes."""

    def then(answer, draw, given):
        changed = {name: value + 1 if name in names else value for name, value in given.items()}
        both = [answer(*values.values()) for values in (given, changed)]
        yield stale(torch.equal(*both) if isinstance(both[0], torch.Tensor) else all(map(torch.equal, *both)))

    return then


def stale(same):
    """A fact: whether what comes out is the same where a prompt has changed."""
    why = "the prompt has changed, as each step of training changes it, and what comes out has not: is something kept?"
    return fact(same, "stale", f"{why} Make it anew in each call.", "stale")
