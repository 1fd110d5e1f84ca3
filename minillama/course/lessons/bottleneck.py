"""Lesson 05: other starts, bottlenecks in some places only, what they read and add, what they cost."""

import time

import torch

from ...adapters import wrappers
from .runs import base


def drawn(std):
    """For `adaptation`'s prepare: draws both matrices of every bottleneck with this deviation, cut at two of it."""

    def prepare(model):
        for _, wrapper in wrappers(model):
            for linear in (wrapper.bottleneck.down, wrapper.bottleneck.up):
                torch.nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)

    return prepare


def only(*parts):
    """For `adaptation`'s prepare: takes off every wrapper but those whose place begins with one of these."""

    def prepare(model):
        for name, wrapper in wrappers(model):
            if not name.startswith(parts):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, wrapper.base)

    return prepare


@torch.no_grad()
def seen_by_bottlenecks(model, texts):
    """{place: (what its bottleneck read (N, D), what it added (N, D))} over all tokens of the texts."""
    seen = {name: ([], []) for name, _ in wrappers(model)}

    def keep(name):
        def hook(_, inputs, out):
            seen[name][0].append(inputs[0][0].float())
            seen[name][1].append(out[0].float())

        return hook

    handles = [wrapper.bottleneck.register_forward_hook(keep(name)) for name, wrapper in wrappers(model)]
    for text in texts:
        model(torch.tensor([base()[1].encode(text)]))
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(read), torch.cat(added)) for name, (read, added) in seen.items()}


@torch.no_grad()
def fastest(models, ids, tries=60):
    """{name: seconds of one forward pass, the fastest of many}; the models {name: model} take turns."""
    found = dict.fromkeys(models, float("inf"))
    for _ in range(tries):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            found[name] = min(found[name], time.perf_counter() - start)
    return found
