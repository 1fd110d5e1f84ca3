"""LLaMA-Adapter V2's unlocked scale, bias and norms (Gao et al. 2023, https://arxiv.org/abs/2304.15010, section 3.1).

Every projection of a frozen transformer gets a scale s and a bias b, one number per output feature, and every norm is
trained (equation 4):

    x ─▶ W (frozen) ─▶ + b ─▶ × s ─▶ y = s · (W x + b)             x ─▶ norm with a weight of its own ─▶
                       ▲      ▲                                              ▲
                    0 at first, 1 at first: trained                       a trained copy of the base's

The paper and lit-llama compute s · (W x + b), order "output"; the official code W (s · x) + b, order "input". At the
start y = 1 · (W x + 0): the model returns what it returned, bit for bit. In the paper this stands beside gated prefix
attention: adapt the model with both methods under one name. lit-llama and litgpt scale the head too, which `head` asks
for; the official code leaves it as it is.

Scale and bias fold into the projection, the trained norms into the base's place. Trained parameters: for each
projection 2 · out (order "input": in + out), for each norm its own.

The module needs torch alone and works on any model whose blocks carry Hugging Face's LLaMA names.
"""

import copy

import torch
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = (
    "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm", "behind_attention", "behind_mlp",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
ORDERS = ("output", "input")
LEARNING_RATES = (1e-2, 3e-3)  # on the bundled bases, and on a real model


class ScaledLinear(nn.Module):
    """Wraps an nn.Linear: scale · (base(x) + adapter_bias), or for order "input" base(scale · x) + adapter_bias.

    Parameters: scale, ones, and adapter_bias, zeros; float32. With `active` set to False it is its base again, bit for
    bit.
    """

    own, mergeable = ("scale", "adapter_bias"), True

    def __init__(self, base, order="output"):
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; it can be 'output' or 'input'")
        self.base, self.order, self.active = base, order, True
        self.in_features, self.out_features = base.in_features, base.out_features
        device, features = next(base.parameters()).device, base.out_features if order == "output" else base.in_features
        self.scale = nn.Parameter(torch.ones(features, device=device))
        self.adapter_bias = nn.Parameter(torch.zeros(base.out_features, device=device))

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        if not self.active:
            return self.base(x)
        y = self.base(x if self.order == "output" else self.scale.to(x.dtype) * x)
        y = y + self.adapter_bias.to(y.dtype)  # under autocast y has another dtype than x
        return self.scale.to(y.dtype) * y if self.order == "output" else y

    @property
    def weight(self):
        """Of the linear layer that this amounts to, (out_features, in_features)."""
        weight = self.base.weight
        if not self.active:
            return weight
        return (weight * (self.scale[:, None] if self.order == "output" else self.scale)).to(weight.dtype)

    @property
    def bias(self):
        bias, dtype = self.base.bias, self.base.weight.dtype
        if not self.active:
            return bias
        bias = self.adapter_bias if bias is None else bias + self.adapter_bias
        return (bias * self.scale if self.order == "output" else bias).to(dtype)


class TrainedNorm(nn.Module):
    """Wraps a norm and uses a trained copy of it instead, float32; the base's own stays for `active` False."""

    own, mergeable = ("trained",), True

    def __init__(self, base):
        super().__init__()
        self.base, self.active = base, True
        while hasattr(base, "base"):  # under another adapter: the norm itself
            base = base.base
        self.trained = copy.deepcopy(base).float().requires_grad_(True)

    def forward(self, x):
        if not self.active:
            return self.base(x)
        numbers = {name: p.to(x.dtype) for name, p in self.trained.named_parameters()}
        return torch.func.functional_call(self.trained, numbers, (x,))

    @property
    def weight(self):
        weight = self.base.weight
        return self.trained.weight.to(weight.dtype) if self.active else weight

    @property
    def bias(self):
        bias = getattr(self.base, "bias", None)
        return self.trained.bias.to(bias.dtype) if self.active and bias is not None else bias


def attach(model, order: str = "output", head: bool = False):
    """Wraps every projection and every norm of the model, by their names, and with `head` its `lm_head`; the embedding
    stays as it is. Freezes nothing."""
    wrapped, projections = [], (*PROJECTIONS, "lm_head") if head else PROJECTIONS
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if own in projections and hasattr(module, "in_features"):
            wrapped.append((name, ScaledLinear(module, order)))
        elif own in NORMS and hasattr(module, "weight"):
            wrapped.append((name, TrainedNorm(module)))
    if not any(isinstance(wrapper, ScaledLinear) for _, wrapper in wrapped):
        raise ValueError(
            f"the model has no linear layer named {', '.join(PROJECTIONS)}, which are what this method scales"
        )
    for name, wrapper in wrapped:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, wrapper)
