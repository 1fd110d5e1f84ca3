"""IA3, "infused adapter by inhibiting and amplifying inner activations" (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

Three learned vectors per layer multiply what flows through a frozen transformer, feature by feature (section 3.3):

    x ─┬─▶ q_proj ──────────────▶ q                     x ─▶ up_proj ─▶ non-linearity ─▶ × l_ff ─▶ down_proj ─▶
       ├─▶ k_proj ─▶ × l_k ─────▶ k                                                        ▲
       └─▶ v_proj ─▶ × l_v ─────▶ v                                                     trained
                       ▲
                    trained

A vector sits on the output side of a projection (keys and values) or on the input side (the second feed-forward matrix,
whose input is the hidden activation after its non-linearity). All start at 1, and x · 1 is x: the model returns what it
returned, bit for bit. A feature is inhibited by less than 1 and amplified by more.

A scaled projection is again a projection, so the vectors fold into the weights: l · (W x + b) = (l W) x + l b on the
output side, W (l · x) + b = (W l) x + b on the input side.

Trained parameters: L · (2·G·d + F) for L layers, G key/value heads of width d and feed-forward width F; 57,600 on
SmolLM2-135M. The module needs torch alone and works on any model whose projections are nn.Linear, by their names.
"""

import torch
from torch import nn

SIDES = ("output", "input")


class IA3Linear(nn.Module):
    """Wraps an nn.Linear and multiplies its output (side "output") or its input (side "input") by `scale`, one number
    per feature, float32, ones at first. With `active` set to False it is its base again, bit for bit."""

    def __init__(self, base, side="output"):
        super().__init__()
        if side not in SIDES:
            raise ValueError(f"side is {side!r}; it can be 'output' or 'input'")
        self.base, self.side, self.active = base, side, True
        self.in_features, self.out_features = base.in_features, base.out_features
        features = base.out_features if side == "output" else base.in_features
        self.scale = nn.Parameter(torch.ones(features, device=next(base.parameters()).device))

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        if not self.active:
            return self.base(x)
        scale = self.scale.to(x.dtype)
        return self.base(x) * scale if self.side == "output" else self.base(x * scale)

    @torch.no_grad()
    def merged(self):
        """A new nn.Linear that computes the same; the base is left as it is."""
        weight, bias, scale = self.base.weight, self.base.bias, self.scale
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight * (scale[:, None] if self.side == "output" else scale))
        if bias is not None:
            linear.bias.copy_(bias * scale if self.side == "output" else bias)
        return linear.requires_grad_(False)


def attach(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """Wraps every nn.Linear whose own name is in `outputs` or in `inputs`, on that side; defaults as in the paper."""
    sides = {**dict.fromkeys(outputs, "output"), **dict.fromkeys(inputs, "input")}
    if both := set(outputs) & set(inputs):
        raise ValueError(f"{both.pop()!r} stands in outputs and in inputs; a projection is scaled on one side")
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features") and name.rpartition(".")[2] in sides]
    if missing := sides.keys() - {name.rpartition(".")[2] for name, _ in found}:
        raise ValueError(f"the model has no linear layer named {missing.pop()!r}, which outputs or inputs ask for")
    for name, module in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, IA3Linear(module, sides[own]))
