"""What all adapter methods have in common: attaching, switching, merging them, and their files.

A method is a module of this folder with a function `attach(model, **options)` that puts wrappers around parts of the
model. A wrapper keeps what it wraps as `base` and has a switch, `active`; whatever parameters it has besides are the
adapter's own. Where the method can be folded into the base's weights, `merged()` returns the part that does so.
Nothing else is agreed between them.

Several adapters, each with a name, may stand on one base; an adapter may consist of several methods.
"""

import contextlib
import inspect

import torch

from . import bottleneck, ia3, llama_adapter, llama_adapter_v2, lora, prefix_tuning, prompt_tuning

METHODS = {
    "llama_adapter": llama_adapter,
    "llama_adapter_v2": llama_adapter_v2,
    "prefix_tuning": prefix_tuning,
    "prompt_tuning": prompt_tuning,
    "ia3": ia3,
    "bottleneck": bottleneck,
    "lora": lora,
}


def adapt(model, method, name="default", **options):
    """Freezes the model, attaches a method under the adapter's name, makes that adapter the active one, and returns
    the model. Only the active adapter's parameters require gradients.

    Options are those of the method's `attach`. Called again with the same name, it adds a second method to the adapter;
    with another name, it begins another adapter. Raises ValueError for an unknown method, option or value.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it can be {', '.join(METHODS)}")
    if getattr(model, "merged_from", None):
        raise ValueError("the model's adapters are merged into its weights: unmerge(model) first")
    adapters = getattr(model, "adapters", {})
    if any(part["method"] == method for part in adapters.get(name, ())):
        raise ValueError(f"the adapter {name!r} has {method} already: detach(model, {name!r}) takes it off, and another name begins another")
    attach = METHODS[method].attach
    known = list(inspect.signature(attach).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{method} has no option {unknown[0]!r}; it has {', '.join(known)}")
    before = {id(wrapper) for _, wrapper in wrappers(model)}
    attach(model, **options)
    for _, wrapper in wrappers(model):
        if id(wrapper) not in before:
            wrapper.adapter = name
    arguments = inspect.signature(attach).bind(model, **options)
    arguments.apply_defaults()
    part = {"method": method, **{option: arguments.arguments[option] for option in known}}
    model.adapters = {**adapters, name: [*adapters.get(name, ()), part]}
    model.requires_grad_(False)
    return activate(model, name)


def wrappers(model):
    """(name, module) of every wrapper in the model, outer ones before those inside them."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "active")]


def own_parameters(wrapper):
    """(name, parameter) of what a wrapper adds to its base."""
    return [(name, parameter) for name, parameter in wrapper.named_parameters() if not name.startswith("base.")]


def is_adapted(model):
    return bool(wrappers(model))


def adapter_parameters(model, name="default"):
    """One adapter's parameters: {"layers.3.self_attn.gate": ...}, named as if nothing else were attached."""
    return {
        f"{place}.{own}".replace(".base.", "."): parameter
        for place, wrapper in wrappers(model)
        if wrapper.adapter == name
        for own, parameter in own_parameters(wrapper)
    }


def trainable_parameters(model):
    """Whatever requires gradients, by name: after `adapt`, the active adapter's parameters and nothing else."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def openings(model):
    """How far the gates of prefix attention stand open, to watch in training: {"gates": {layer: [one number per head]}}."""
    gated = [(name, wrapper) for name, wrapper in wrappers(model) if hasattr(wrapper, "gate") and wrapper.active]
    opened = {name.split(".")[1]: llama_adapter.opening(wrapper.gate, wrapper.tanh) for name, wrapper in gated}
    return {"gates": {layer: gate.reshape(len(gate), -1).mean(-1).tolist() for layer, gate in opened.items()}} if opened else {}


def activate(model, *names):
    """Makes exactly these adapters the active ones, and the trainable ones; nothing is copied. Returns the model."""
    known = getattr(model, "adapters", {})
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}")
    for _, wrapper in wrappers(model):
        wrapper.active = wrapper.adapter in names
        for _, parameter in own_parameters(wrapper):
            parameter.requires_grad_(wrapper.active)
    return model


@contextlib.contextmanager
def disabled(model):
    """Within the block the model is its base again, bit for bit."""
    states = [(wrapper, wrapper.active) for _, wrapper in wrappers(model)]
    try:
        for wrapper, _ in states:
            wrapper.active = False
        yield model
    finally:
        for wrapper, state in states:
            wrapper.active = state


def detach(model, name=None):
    """Takes one adapter off, or all of them; what stays is as it was, the base still frozen. Returns the model."""
    for parent in list(model.modules()):
        for own, child in list(parent.named_children()):
            while hasattr(child, "active") and name in (None, child.adapter):
                child = child.base
            setattr(parent, own, child)
    model.adapters = {other: parts for other, parts in getattr(model, "adapters", {}).items() if name not in (None, other)}
    return model


def merge(model):
    """Folds the active adapters into weights of their own, so that they cost nothing at inference; returns the model.

    `unmerge` brings back what was before, bit for bit: the base's weights are not touched, nor copied.
    Raises ValueError where an active method cannot be merged.
    """
    if not is_adapted(model):
        raise ValueError("the model carries no adapter: there is nothing to merge")
    for place, wrapper in wrappers(model):
        if wrapper.active and not hasattr(wrapper, "merged"):
            raise ValueError(
                f"{place}: the adapter {wrapper.adapter!r} has a part ({type(wrapper).__name__}) that no fixed weight can stand for, "
                "since it is not linear in its input; ia3 and lora can be merged, save_adapter keeps the others in a small file"
            )
    model.merged_from = []
    for place, wrapper in reversed(wrappers(model)):  # inner ones first
        parent, _, own = place.rpartition(".")
        parent = model.get_submodule(parent)
        model.merged_from.append((parent, own, wrapper))
        setattr(parent, own, wrapper.merged() if wrapper.active else wrapper.base)
    return model


def unmerge(model):
    """Undoes `merge`, bit for bit, and returns the model."""
    for parent, own, wrapper in reversed(getattr(model, "merged_from", [])):
        setattr(parent, own, wrapper)
    model.merged_from = []
    return model


from .folder import load_adapter, save_adapter  # noqa: E402  (they use the names above)
from .mixed import mixed  # noqa: E402
