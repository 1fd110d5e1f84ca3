"""LoRA, low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A frozen projection W gets a second path of rank r beside it, and the two are added (equation 3):

    x ─┬──────────── W, b (frozen) ────────────────┬─▶ + ─▶ W x + b + (α/r) · B A x
       └─▶ A (r, in) ─▶ B (out, r) ─▶ × α/r ───────┘
           trained       trained, 0 at first

B starts at 0, so the path adds 0 · (something finite): the model returns what it returned, bit for bit. There A's
gradient is 0 and B's is not: the first step moves B alone, the second moves both. A is drawn as nn.Linear draws its
weight (Kaiming uniform), as in the authors' code.

Trained parameters: r · (in + out) for each adapted projection; with r = 1 on query and value of GPT-3's 96 layers,
96 · 2 · (12,288 + 12,288) = 4.7 M. The path folds into the weight: W + (α/r) B A.

The module needs torch alone and works on any model whose projections are nn.Linear, by their names.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """Wraps an nn.Linear and adds (alpha / rank) · B A x to its output.

    Parameters, float32 whatever the base's dtype: A (rank, in_features) and B (out_features, rank), zeros.
    With `active` set to False it is its base again, bit for bit.
    """

    def __init__(self, base, rank=8, alpha=16.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is needed")
        self.base, self.scaling, self.active = base, alpha / rank, True
        self.in_features, self.out_features, device = base.in_features, base.out_features, next(base.parameters()).device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        y = self.base(x)
        if not self.active:
            return y
        narrow = F.linear(x, self.A.to(x.dtype))  # (..., rank)
        return y + F.linear(narrow, self.B.to(x.dtype)) * self.scaling

    @torch.no_grad()
    def merged(self):
        """A new nn.Linear that computes the same; the base is left as it is."""
        weight, bias = self.base.weight, self.base.bias
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight + self.scaling * (self.B @ self.A))
        if bias is not None:
            linear.bias.copy_(bias)
        return linear.requires_grad_(False)


def attach(model, rank=8, alpha=16.0, targets=("q_proj", "v_proj")):
    """Wraps every nn.Linear whose own name is in `targets`; query and value by default, as in the paper."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features") and name.rpartition(".")[2] in targets]
    if missing := set(targets) - {name.rpartition(".")[2] for name, _ in found}:
        raise ValueError(f"the model has no linear layer named {missing.pop()!r}, which targets asks for")
    for name, module in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRALinear(module, rank, alpha))
