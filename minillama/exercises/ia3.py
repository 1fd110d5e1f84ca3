"""Lesson 04: IA3, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.ia3 import IA3Linear


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────────


class OutputOfDown(IA3Linear):
    """l_ff on the output of down_proj instead of its input"""

    def forward(self, x):
        return self.base(x) * self.scale[: self.out_features] if self.side == "input" else super().forward(x)


class ZeroScale(IA3Linear):
    """vectors that start at 0: everything inhibited"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)


class OnePlusScale(IA3Linear):
    """1 + l instead of l, from l = 0"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)

    def forward(self, x):
        return self.base(x) * (1 + self.scale).to(x.dtype) if self.side == "output" else self.base(x * (1 + self.scale).to(x.dtype))


class BiasUnscaled(IA3Linear):
    """l · (W x) + b: the bias left out of the scaling"""

    harmless_for = ("llama",)

    def forward(self, x):
        if self.side == "input" or self.base.bias is None:
            return super().forward(x)
        return F.linear(x, self.base.weight) * self.scale.to(x.dtype) + self.base.bias


class MergeForgetsBias(IA3Linear):
    """a merge that scales the weight and not the bias"""

    harmless_for = ("llama",)

    def merged(self):
        linear = super().merged()
        if linear.bias is not None:
            linear.bias.data.copy_(self.base.bias)
        return linear


class MergeWrongAxis(IA3Linear):
    """a merge that scales rows for columns"""

    def merged(self):
        linear = super().merged()
        scale = self.scale.detach()
        wrong = scale.repeat(8)[: self.in_features] if self.side == "output" else scale[: self.out_features, None]
        linear.weight.data.copy_(self.base.weight * wrong)
        return linear


class MergeInPlace(IA3Linear):
    """a merge that writes into the base's own weight, which a scale of 0 destroys"""

    def merged(self):
        linear = super().merged()
        self.base.weight.data.copy_(linear.weight)
        return self.base


class SoftmaxScale(IA3Linear):
    """the vector squashed before it multiplies"""

    def forward(self, x):
        scale = (2 * torch.sigmoid(self.scale - 1)).to(x.dtype)
        return self.base(x) * scale if self.side == "output" else self.base(x * scale)


def attach_before_activation(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """l_ff before the non-linearity (on LLaMA: on the branch that goes through it)"""
    for layer in model.layers:
        layer.self_attn.k_proj, layer.self_attn.v_proj = IA3Linear(layer.self_attn.k_proj), IA3Linear(layer.self_attn.v_proj)
        name = "gate_proj" if hasattr(layer.mlp, "gate_proj") else "up_proj"
        setattr(layer.mlp, name, IA3Linear(getattr(layer.mlp, name)))


def attach_to_queries(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """queries scaled where keys should be"""
    for layer in model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = IA3Linear(layer.self_attn.q_proj), IA3Linear(layer.self_attn.v_proj)
        layer.mlp.down_proj = IA3Linear(layer.mlp.down_proj, "input")


attach_to_queries.harmless_for = ("gpt2",)  # (l · q) kᵀ = q (l · k)ᵀ where no RoPE turns one against the other


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────────


EXERCISES = {}
