"""Lesson 07: predictions about all methods at once."""

import copy

import torch

import minillama

from .predictions import questions


def start_as_the_base():
    """The methods that, at their defaults, leave a small LLaMA's logits bit for bit as they were."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        base, ids = minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), torch.arange(6)[None]
        adapted = {m: minillama.adapt(copy.deepcopy(base), m) for m in minillama.adapters.TEXT_METHODS}
        return frozenset(m for m, model in adapted.items() if torch.equal(model(ids), base(ids)))


EXERCISES = questions(
    starts_as_base=start_as_the_base,
    most_finnish=lambda: "lora",  # two minutes of training, so not run here: lesson 07 trains them all and asserts it
    what_helps=lambda: "steps",
)
