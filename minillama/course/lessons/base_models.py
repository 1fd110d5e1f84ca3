"""Lesson 01: the norms' means, parameter counts, fresh models."""

import torch

from ...device import shapes_only
from ...gpt2 import GPT2
from ...llama import LLaMA, LLaMAConfig
from .looking import inputs_of


def shares_of_the_mean(model, ids):
    """How much of the mean square LayerNorm would subtract as the mean: a share for each norm, averaged over tokens."""
    seen = inputs_of(model, lambda name: name.endswith("norm"), ids)
    return [(x.mean(-1) ** 2 / x.pow(2).mean(-1)).mean().item() for (x,) in seen.values()]


def parameters_of(config):
    """The number of parameters of a model that is made of shapes alone."""
    with shapes_only():
        model = (LLaMA if isinstance(config, LLaMAConfig) else GPT2)(config)
    return sum(p.numel() for p in model.parameters())


def fresh_llama(deviation=None, layers=2):
    """A random LLaMA as wide as dates-llama. deviation: of every weight; None draws them as minillama does."""
    torch.manual_seed(2)
    model = LLaMA(LLaMAConfig(256, 128, 344, layers, 4, num_key_value_heads=2))
    if deviation is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=deviation)
    return model
