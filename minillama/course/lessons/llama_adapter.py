"""Lesson 03: other codes' versions, the first steps of gates and prompts, the projections of one layer."""

import torch

from ...adapters import adapt, adapter_parameters
from ...llama import LLaMA, LLaMAConfig
from ...train import answers, train
from .runs import base, copied


def gates_at(value):
    """A change of a fresh adapter: every gate at this value."""
    return lambda model: [p.fill_(value) for name, p in adapter_parameters(model).items() if name.endswith("gate")]


@torch.no_grad()
def versions(presets, ids):
    """Rows (preset, gate, tanh, join, distance to the base at gate 0, distance to the paper's at gate 0.5) of a small
    LLaMA with biases, adapted as each of those codes would, with the same prompts."""
    rows, first = [], None
    for preset, options in presets.items():
        torch.manual_seed(0)
        model = LLaMA(LLaMAConfig(256, 64, 160, 2, 4, attention_bias=True))
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)  # biases that are not 0
        untouched = model(ids)
        torch.manual_seed(1)
        adapt(model, "llama_adapter", **options)
        closed = (model(ids) - untouched).abs().max().item()
        gates_at(0.5)(model)
        first = model(ids) if first is None else first
        rows.append((preset, *options.values(), closed, (model(ids) - first).abs().max().item()))
    return rows


def movement(pairs, steps=3):
    """How far gates and prompts of a fresh llama_adapter move in so many steps, summed over the layers."""
    model, tokenizer = copied(), base()[1]
    torch.manual_seed(0)
    adapt(model, "llama_adapter")
    answers(model, tokenizer, [pairs[0][0]])  # a look at the model before training, without gradients
    start = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    train(model, tokenizer, pairs, steps=steps, batch_size=16, learning_rate=0.1, progress=False)
    moved = {name: (p - start[name]).abs().max().item() for name, p in adapter_parameters(model).items()}
    return [sum(far for name, far in moved.items() if name.endswith(kind)) for kind in ("gate", "prompt")]


def projections_run(run):
    """How often each of the four projections of one layer of the base runs within run(attention)."""
    attention = copied().layers[0].self_attn
    count = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0)
    for name in count:
        getattr(attention, name).register_forward_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
    run(attention)
    return count
