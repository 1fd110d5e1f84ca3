"""LLaMA-Adapter V2's unlocked scale, bias and norms (Gao et al. 2023, https://arxiv.org/abs/2304.15010, section 3.1).

Every projection of a frozen transformer gets a scale s and a bias b, one number per output feature, and every norm is
trained (equation 4):

    x ─▶ W (frozen) ─▶ + b ─▶ × s ─▶ y = s · (W x + b)             x ─▶ norm with a weight of its own ─▶
                       ▲      ▲                                              ▲
                    0 at first, 1 at first: trained                       a trained copy of the base's

The paper and lit-llama compute s · (W x + b), order "output"; the official code W (s · x) + b, order "input". At the
start y = 1 · (W x + 0): the model returns what it returned, bit for bit. In the paper this stands beside gated prefix
attention: adapt the model with both methods under one name.

Scale and bias fold into the projection, the trained norms into the base's place. Trained parameters: for each projection
2 · out (order "input": in + out), for each norm its own.

The module needs torch alone and works on any model whose blocks carry Hugging Face's LLaMA names.
"""

import copy

import torch
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
ORDERS = ("output", "input")


class ScaledLinear(nn.Module):
    """Wraps an nn.Linear: scale · (base(x) + shift), or for order "input" base(scale · x) + shift.

    Parameters: scale, ones, and shift, zeros; float32. With `active` set to False it is its base again, bit for bit.
    """

    def __init__(self, base, order="output"):
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; it can be 'output' or 'input'")
        self.base, self.order, self.active = base, order, True
        self.in_features, self.out_features, device = base.in_features, base.out_features, next(base.parameters()).device
        self.scale = nn.Parameter(torch.ones(base.out_features if order == "output" else base.in_features, device=device))
        self.shift = nn.Parameter(torch.zeros(base.out_features, device=device))

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        if not self.active:
            return self.base(x)
        scale, shift = self.scale.to(x.dtype), self.shift.to(x.dtype)
        return scale * (self.base(x) + shift) if self.order == "output" else self.base(scale * x) + shift

    @torch.no_grad()
    def merged(self):
        """A new nn.Linear that computes the same; the base is left as it is."""
        weight, bias = self.base.weight, self.shift if self.base.bias is None else self.base.bias + self.shift
        linear = nn.Linear(self.in_features, self.out_features, True, weight.device, weight.dtype)
        linear.weight.copy_(weight * (self.scale[:, None] if self.order == "output" else self.scale))
        linear.bias.copy_(bias * self.scale if self.order == "output" else bias)
        return linear.requires_grad_(False)


class TrainedNorm(nn.Module):
    """Wraps a norm and uses a trained copy of it instead, float32; the base's own stays for `active` False."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active = base, True
        while hasattr(base, "base"):  # under another adapter: the norm itself
            base = base.base
        self.trained = copy.deepcopy(base).float().requires_grad_(True)

    def forward(self, x):
        if not self.active:
            return self.base(x)
        return torch.func.functional_call(self.trained, {name: p.to(x.dtype) for name, p in self.trained.named_parameters()}, (x,))

    def merged(self):
        dtype = next(self.base.parameters()).dtype
        return copy.deepcopy(self.trained).to(dtype).requires_grad_(False)


def attach(model, order="output"):
    """Wraps every projection and every norm of the model, by their names; the head and the embedding stay as they are."""
    wrapped = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if own in PROJECTIONS and hasattr(module, "in_features"):
            wrapped.append((name, ScaledLinear(module, order)))
        elif own in NORMS:
            wrapped.append((name, TrainedNorm(module)))
    for name, wrapper in wrapped:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, wrapper)
