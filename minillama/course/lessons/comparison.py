"""Lesson 07: all methods side by side, what holds of each, and the long runs of docs/results.md."""

import copy
import tempfile
from pathlib import Path

import torch

from ...adapters import adapt, merge, save_adapter
from .runs import adaptation, base, one_thread_each
from .shown import ROOT


def side_by_side(trials, seeds=(0, 1)):
    """`over_seeds` for several trials at once, {name: (method, options)} -> {name: a run per seed}; Finnish, 150 steps
    of 8, where the options say nothing else. An option `seeds` asks for others."""
    done = {name: [] for name in trials}
    base()  # opened once, before there are threads
    with one_thread_each() as pool:
        for name, (method, options) in trials.items():
            how = dict(steps=150) | options
            for seed in how.pop("seeds", seeds):
                done[name].append(pool.submit(adaptation, method, "fi", seed=seed, **how))
        return {name: [run.result() for run in runs] for name, runs in done.items()}


def facts(method, text="March 3, 2021 = 2021-"):
    """(trained parameters, starts as the base bit for bit, merges, bytes of the file) of a method at its defaults."""
    plain, tokenizer = base()
    ids = torch.tensor([tokenizer.encode(text)])
    model = adapt(copy.deepcopy(plain), method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        closed = torch.equal(model(ids), plain(ids))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    try:
        merge(model)
    except ValueError:
        return trained, closed, False, size
    return trained, closed, True, size


def long_runs(column=4):
    """Exact match after 300 steps from the first table of docs/results.md, {method: text}: column 3 French, 4 Finnish,
    5 Hungarian."""
    found = {}
    for line in (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")]
        if len(cells) == 7 and "%" in cells[column]:
            found[{"the frozen base": "base", "all weights": "full"}.get(cells[1], cells[1])] = cells[column]
    return found
