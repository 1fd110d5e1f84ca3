"""Lesson 06: other starts for A and B, the first steps, multiplications counted."""

import torch

from ...adapters import adapt, adapter_parameters
from ...train import train
from .runs import base, copied


def lora_started(a=None, b=None):
    """A function that adapts the model it is given by LoRA of rank 8, and draws every A and B anew by a(A) and b(B)."""

    def change(model):
        adapt(model, "lora", rank=8)
        for name, p in adapter_parameters(model).items():
            draw = a if name.endswith("A") else b
            if draw is not None:
                draw(p)
        return model

    return change


def first_steps(change, pairs, steps):
    """Trains a copy of the base that `change` has adapted: (largest movement of a number, mean loss of the last 5)."""
    torch.manual_seed(0)
    model, tokenizer = copied(), base()[1]
    with torch.no_grad():
        change(model)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    history = train(model, tokenizer, pairs, steps=steps, batch_size=16, progress=False)
    moved = max((p - before[name]).abs().max().item() for name, p in adapter_parameters(model).items())
    return moved, sum(record["loss"] for record in history[-5:]) / 5


def multiplications(model, ids):
    """Multiply-adds of one forward pass over ids (B, T), counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids)
    return counter.get_total_flops() // 2
