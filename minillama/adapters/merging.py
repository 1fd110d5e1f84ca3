"""Adapters folded into weights of their own, and taken out again bit for bit.

A wrapper that is `mergeable` says by its `weight` and `bias` all that it computes, those of what it wraps included; so
the outermost wrapper at a place says what one plain layer there would have to be.
"""

import copy

import torch
from torch import nn

from ..speed import QuantizedLinear
from . import METHODS, StandIn, is_wrapper, outermost, refuse_stand_ins, wrappers


class Merged(StandIn):
    """The wrappers at one place folded into one plain layer. They stay beneath it, for `unmerge` and for `disabled`, go
    along with .to() and copies, and cost nothing; in the model's state_dict the plain layer stands alone."""

    way_out = "the model's adapters are merged into its weights: unmerge(model) first"

    def __init__(self, wrapper):
        super().__init__(wrapper)
        inner = wrapper
        while is_wrapper(inner):
            inner = inner.base
        self.folded = copy.deepcopy(inner)
        for name in ("weight", "bias"):
            if (tensor := getattr(wrapper, name, None)) is not None:
                setattr(self.folded, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))

    def forward(self, x):
        return self.folded(x) if self.active else self.base(x)

    @property
    def weight(self):
        return (self.folded if self.active else self.base).weight

    @property
    def bias(self):
        return (self.folded if self.active else self.base).bias

    def state_dict(self, *arguments, **options):
        return self.folded.state_dict(*arguments, **options)


def is_merged(model):
    return any(isinstance(wrapper, Merged) for _, wrapper in wrappers(model))


@torch.no_grad()
def merge(model):
    """Folds the active adapters into weights of their own, so that they cost nothing at inference; returns the model.

    `unmerge` brings back what was before, bit for bit: the base's weights are not touched. `disabled` is the base
    still, `save_adapter` the adapter, and `save` writes the folded weights. Raises ValueError where an active method
    cannot be merged.
    """
    refuse_stand_ins(model)
    if not any(wrapper.active for _, wrapper in wrappers(model)):
        raise ValueError("the model carries no adapter that is active: there is nothing to merge")
    foldable = [n for n, method in METHODS.items() if any(hasattr(part, "mergeable") for part in vars(method).values())]
    for place, wrapper in wrappers(model):
        if wrapper.active and not getattr(wrapper, "mergeable", False):
            raise ValueError(
                f"{place}: the adapter {wrapper.adapter!r} has a part ({type(wrapper).__name__}) that no fixed weight "
                f"can stand for; {', '.join(foldable)} can be merged, save_adapter keeps the others in a small file"
            )
        if wrapper.active and any(isinstance(part, QuantizedLinear) for part in wrapper.modules()):
            raise ValueError(
                f"{place} is quantised, and a merge needs the plain weight: load the base without --quantize"
            )
    for parent, name, wrapper in outermost(model):
        setattr(parent, name, Merged(wrapper))
    return model


def unmerge(model):
    """Undoes `merge`, bit for bit, and returns the model."""
    for parent, name, wrapper in outermost(model):
        if isinstance(wrapper, Merged):
            setattr(parent, name, wrapper.base)
    return model
