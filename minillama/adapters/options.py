"""What a method's options may be, read off the annotations of its `attach`: whoever gives them, a program, the command
line or a file, hears the same sentence.

    def attach(model, rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ("q_proj", "v_proj")): ...

A whole number is the size of something that is trained; a tuple or a list is whatever holds several, or one alone.
"""

import inspect
import math
import numbers
import types
import typing

LARGEST = 2**20  # of whole numbers: what a mistyped file asks for is refused before it is made
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a name", type(None): "None"}


def known_options(attach):
    """The names of a method's options, in the order of its `attach`."""
    return list(inspect.signature(attach).parameters)[1:]


def accepted(attach, options):
    """The options as `attach` takes them. ValueError for the first whose value is not what the annotation asks for."""
    annotations = typing.get_type_hints(attach)
    for name, value in options.items():
        if name in annotations and not fits(value, annotations[name]):
            raise ValueError(f"{name} is {value!r}; needed is {said(annotations[name])}")
    return {name: int(value) if whole(value) else value for name, value in options.items()}


def whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def fits(value, kind):
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(fits(value, each) for each in arguments)
    if origin in (tuple, list):
        value = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
        several = hasattr(value, "__iter__") and not isinstance(value, str | bytes)
        return all(fits(each, arguments[0]) for each in value) if several else fits(value, arguments[0])
    if kind is int:
        return whole(value) and abs(value) <= LARGEST
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind)


def said(kind):
    """An annotation in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return " or ".join(map(said, arguments))
    if origin in (tuple, list):
        return f"{said(arguments[0])}, or several"
    return f"{WORDS[kind]} of at most {LARGEST:,}" if kind is int else WORDS[kind]
