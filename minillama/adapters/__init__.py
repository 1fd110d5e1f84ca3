"""What all adapter methods have in common: attaching them, switching them off, and their files.

A method is a module of this folder with a function `attach(model, **options)` that puts wrappers around parts of the
model. A wrapper keeps what it wraps as `base` and has a switch, `active`; whatever parameters it has besides are the
adapter's own. Nothing else is agreed between them.
"""

import contextlib
import inspect

from . import llama_adapter

METHODS = {"llama_adapter": llama_adapter}


def adapt(model, method, **options):
    """Freezes the model, attaches a method and returns the model; only the adapter's parameters require gradients.

    Options are those of the method's `attach`. Raises ValueError for an unknown method, option or value.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it can be {', '.join(METHODS)}")
    if is_adapted(model):
        raise ValueError("the model carries an adapter: detach(model) takes it off")
    attach = METHODS[method].attach
    known = list(inspect.signature(attach).parameters)[1:]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{method} has no option {unknown[0]!r}; it has {', '.join(known)}")
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        attach(model, **options)
    except BaseException:  # a refused option leaves the model as it was
        for parameter, required in frozen:
            parameter.requires_grad_(required)
        raise
    arguments = inspect.signature(attach).bind(model, **options)
    arguments.apply_defaults()
    model.adapter = {"method": method, **{name: arguments.arguments[name] for name in known}}
    return model


def wrappers(model):
    """(name, module) of every wrapper in the model."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "active")]


def is_adapted(model):
    return bool(wrappers(model))


def adapter_parameters(model):
    """The adapter's own parameters by name, "layers.3.self_attn.gate" and so on."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, wrapper in wrappers(model)
        for name, parameter in wrapper.named_parameters()
        if not name.startswith("base.")
    }


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


def detach(model):
    """Takes the adapter off and returns the base, its weights as they were before and still frozen."""
    for name, wrapper in wrappers(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper.base)
    model.adapter = None
    return model


def merge(model):
    """Folds the adapter into the base's weights where that is exact; ValueError where it cannot be."""
    if not is_adapted(model):
        raise ValueError("the model carries no adapter: there is nothing to merge")
    raise ValueError(
        f"{model.adapter['method']} cannot be merged: its term depends on the words' queries through a softmax, and no "
        "fixed weight gives that; save_adapter keeps it in a small file instead"
    )


from .peft import load_adapter, save_adapter  # noqa: E402  (they use the names above)
