"""The adapter protocol, and what all methods have in common: attaching, switching, merging, and their files.

A method is a module of this folder with a function `attach(model, **options)` that puts wrappers around parts of the
model; it freezes nothing, `adapt` does. A wrapper is an nn.Module that stands in the place of what it wraps and has

    base        what it wraps: kept, called, never changed
    active      its switch: False, and it is its base again, bit for bit
    own         names of the attributes that are the adapter's: parameters, which train; buffers, which do not; modules
    mergeable   (may be missing) True where its `weight` and `bias` say all that it computes

and, around a linear layer, `weight`, `bias`, `in_features` and `out_features`, for code that reads them: a wrapper that
amounts to another linear layer gives that layer's. `adapt` notes on it which `adapter` and `method` it is part of.

Everything else follows. The name of a part is the one it has in the bare base, whatever stands around it; the name of
an adapter's tensor is that place, the method and the tensor's own, "layers.3.self_attn.llama_adapter.gate", so that no
two share one. Any number of adapters, each with a name and of one method or several, stand on one base in any order.

Beside its `attach`, a method's module has LEARNING_RATES (the peak that suits it on the bundled bases, and on a real
model), and where the PEFT library has the method too, PEFT_TYPE, `to_peft` and `from_peft` (peft.py).
"""

import contextlib
import inspect

import torch
from torch import nn

from .. import train
from . import bottleneck, dora, ia3, image_prompt, llama_adapter, llama_adapter_v2, lora, prefix_tuning, prompt_tuning
from .options import accepted, known_options

METHODS = {
    "llama_adapter": llama_adapter,
    "llama_adapter_v2": llama_adapter_v2,
    "prefix_tuning": prefix_tuning,
    "prompt_tuning": prompt_tuning,
    "ia3": ia3,
    "bottleneck": bottleneck,
    "lora": lora,
    "dora": dora,
    "image_prompt": image_prompt,
}
TEXT_METHODS = tuple(name for name in METHODS if name != "image_prompt")  # those that learn from text alone


def learning_rate(method, real=False):
    """The peak that suits a method, or "full", which trains all weights: on the bundled bases, or on a real model."""
    return {"full": train, **METHODS}[method].LEARNING_RATES[real]


# ── where everything stands ──────────────────────────────────────────────────────────────────────────────────────────


def is_wrapper(module):
    return hasattr(module, "own") and hasattr(module, "active")


def walk(module, place=""):
    """(place, module) of every part of the base and of every wrapper, outer ones first; what is a wrapper's own is not
    entered. A place is the name that a part has in the bare base."""
    yield place, module
    wraps = is_wrapper(module)
    for name, child in module.named_children():
        if not wraps:
            inner = place if name == "_orig_mod" else f"{place}.{name}".removeprefix(".")  # torch.compile's own wrapper
            yield from walk(child, inner)
        elif name == "base":
            yield from walk(child, place)


def wrappers(model):
    """(place, wrapper) of every wrapper in the model, outer ones before those inside them."""
    return [(place, module) for place, module in walk(model) if is_wrapper(module)]


def outermost(model):
    """(parent, attribute, wrapper) of the outermost wrapper at each place that has any."""
    return [
        (parent, name, child)
        for _, parent in walk(model)
        for name, child in parent.named_children()
        if is_wrapper(child) and not is_wrapper(parent)
    ]


def own_tensors(wrapper):
    """(name, tensor) of what a wrapper adds to its base: parameters and buffers."""
    for name in wrapper.own:
        mine = getattr(wrapper, name)
        if isinstance(mine, nn.Module):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in mine.named_parameters())
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in mine.named_buffers())
        else:
            yield name, mine


def adapter_tensors(model, name="default"):
    """One adapter's parameters and buffers by name; a tensor that several wrappers share stands there once."""
    tensors, seen = {}, set()
    for place, wrapper in wrappers(model):
        for own, tensor in own_tensors(wrapper) if wrapper.adapter == name else ():
            if id(tensor) not in seen:
                tensors[f"{place}.{wrapper.method}.{own}"] = tensor
            seen.add(id(tensor))
    return tensors


def base_tensors(model):
    """The base's parameters and buffers by their names in the bare base, whatever is attached."""
    return {
        f"{place}.{name}".removeprefix("."): tensor
        for place, module in walk(model)
        if not is_wrapper(module)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def adapter_parameters(model, name="default"):
    """One adapter's parameters: {"layers.3.self_attn.llama_adapter.gate": ...}, whatever else is attached."""
    return {key: tensor for key, tensor in adapter_tensors(model, name).items() if isinstance(tensor, nn.Parameter)}


def trainable_parameters(model):
    """Whatever requires gradients, by name: after `adapt`, the active adapter's parameters and nothing else."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapters(model):
    """{adapter's name: its parts, the arguments of `adapt` for each}."""
    return getattr(model, "adapters", {})


def require(model, *names):
    """Refuses the name of an adapter that the model does not have."""
    known = adapters(model)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}")


@torch.no_grad()
def gates(model):
    """How far the active gates of prefix attention stand open, to watch in training: {"gates": {layer: [one number per
    head]}}. Where several adapters have gates, the adapter's name stands beside the layer's number."""
    gated = [(place.split(".")[1], wrapper) for place, wrapper in wrappers(model) if "gate" in wrapper.own]
    gated = [(layer, wrapper) for layer, wrapper in gated if wrapper.active]
    several = len({wrapper.adapter for _, wrapper in gated}) > 1
    found = {}
    for layer, wrapper in gated:
        gate = llama_adapter.opening(wrapper.gate, wrapper.tanh)
        key = f"{layer} {wrapper.adapter}" if several else layer
        found[key] = gate.reshape(len(gate), -1).mean(-1).tolist()
    return {"gates": found} if found else {}


# ── attaching, switching, taking off ─────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def whole_or_not_at_all(model):
    """When the block fails, the model's structure, adapters, switches and requires_grad are as they were."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    switches = [(wrapper, wrapper.active) for _, wrapper in wrappers(model)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = adapters(model)
    try:
        yield
    except BaseException:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for wrapper, active in switches:
            wrapper.active = active
        for parameter, required in trained:
            parameter.requires_grad_(required)
        model.adapters = before
        raise


@contextlib.contextmanager
def bare(model):
    """Within the block wrappers show nothing but what they wrap: whoever looks for parts of the model finds the base's
    alone, never a layer that is another adapter's own."""
    hidden = [(wrapper, dict(wrapper._modules)) for _, wrapper in wrappers(model)]
    try:
        for wrapper, modules in hidden:
            for name in modules.keys() - {"base"}:
                del wrapper._modules[name]
        yield
    finally:
        for wrapper, modules in hidden:
            wrapper._modules.update({name: module for name, module in modules.items() if name != "base"})


def adapt(model, method, name="default", **options):
    """Freezes the model, attaches a method under the adapter's name, makes that adapter the active one, and returns
    the model. Only the active adapter's parameters require gradients.

    Options are those of the method's `attach`. Called again with the same name, it adds a second method to the adapter;
    with another name, it begins another adapter. Raises ValueError for an unknown method, option or value; the model is
    then as it was.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it can be {', '.join(METHODS)}")
    refuse_stand_ins(model)
    if any(part["method"] == method for part in adapters(model).get(name, ())):
        raise ValueError(
            f"the adapter {name!r} has {method} already: delete_adapter(model, {name!r}) takes it off, "
            "and another name begins another"
        )
    attach = METHODS[method].attach
    known = known_options(attach)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{method} has no option {unknown[0]!r}; it has {', '.join(known)}")
    options = accepted(attach, options)
    arguments = inspect.signature(attach).bind(model, **options)
    arguments.apply_defaults()
    part = {"method": method, **{option: plain(arguments.arguments[option]) for option in known}}
    before = {id(wrapper) for _, wrapper in wrappers(model)}
    with whole_or_not_at_all(model):
        with bare(model):
            attach(model, **options)
        for _, wrapper in wrappers(model):
            if id(wrapper) not in before:
                wrapper.adapter, wrapper.method = name, method
        model.adapters = {**adapters(model), name: [*adapters(model).get(name, ()), part]}
        model.requires_grad_(False)
        return set_adapter(model, name)


def plain(value):
    """An option as JSON can hold it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple | set | range) else value


def set_adapter(model, *names):
    """Makes exactly these adapters the active ones, and the trainable ones; nothing is copied. Returns the model."""
    require(model, *names)
    refuse_stand_ins(model)
    for _, wrapper in wrappers(model):
        wrapper.active = wrapper.adapter in names
        for _, tensor in own_tensors(wrapper):
            tensor.requires_grad_(wrapper.active and isinstance(tensor, nn.Parameter))
    return model


def delete_adapter(model, name=None):
    """Takes one adapter off, or all of them; what stays is as it was, the base still frozen. Returns the model."""
    if name is not None:
        require(model, name)
    refuse_stand_ins(model)
    for parent in [module for _, module in walk(model)]:
        for own, child in list(parent.named_children()):
            while is_wrapper(child) and name in (None, child.adapter):
                child = child.base
            setattr(parent, own, child)
    model.adapters = {other: parts for other, parts in adapters(model).items() if name not in (None, other)}
    return model


class StandIn(nn.Module):
    """Stands in for the wrappers at one place for a while, and follows the protocol itself: `base` are the wrappers."""

    own, adapter, method = (), None, None
    way_out = ""  # what it is that holds the adapters, and how to end it

    def __init__(self, wrapper):
        super().__init__()
        self.base, self.active = wrapper, True


def refuse_stand_ins(model):
    """Refuses what would change the adapters beneath a merge or within `mixed`."""
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, StandIn):
            raise ValueError(wrapper.way_out)


from .holding import disabled as disabled  # noqa: E402  (these use the names above)
from .merging import is_merged as is_merged  # noqa: E402
from .merging import merge as merge  # noqa: E402
from .merging import unmerge as unmerge  # noqa: E402
from .mixed import mixed as mixed  # noqa: E402
from .seeing import seeing as seeing  # noqa: E402
from .storage import load_adapter as load_adapter  # noqa: E402
from .storage import save_adapter as save_adapter  # noqa: E402
