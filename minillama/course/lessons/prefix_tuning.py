"""Lesson 02: fresh prefixes and prompts side by side, loss curves, parameter counts."""

import torch

from ...device import shapes_only
from ...train import exact_match
from .runs import base, copied, distances
from .shown import table


def starts_table(begins, ids, share_of, english):
    """(table, {name: (distance of the logits, share of the softmax or None, English dates right)}) of fresh adapters.

    begins: {name: function that adapts the fresh copy it is given}.  share_of(model): what a prefix takes.
    """
    _, tokenizer = base()
    found = {}
    for name, distance, _ in distances(begins, ids):
        model = copied()
        torch.manual_seed(0)
        with torch.no_grad():
            begins[name](model)
        share = share_of(model).mean().item() if name.startswith("prefix") else None
        found[name] = distance, share, exact_match(model, tokenizer, english)
    rows = [(n, d, "–" if s is None else f"{s:.0%}", f"{right:.0%}") for n, (d, s, right) in found.items()]
    return table(["start", "largest difference of logits", "average share", "English dates right"], rows), found


def loss_curve(runs):
    """The losses of runs of equal length, for plots.curve_figure."""
    steps = range(len(runs[0].history))
    return range(1, len(steps) + 1), [[run.history[i]["loss"] for run in runs] for i in steps]


def counted(make, attach, **options):
    """(trained, all) parameters of a model built without its numbers, on the meta device, and adapted."""
    with shapes_only():
        model = make().requires_grad_(False)
    everything = sum(p.numel() for p in model.parameters())
    attach(model, **options)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), everything
