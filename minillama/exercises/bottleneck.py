"""Lesson 05: bottleneck adapters, with the wrong versions that one writes easily."""

import torch.nn.functional as F
from torch import nn

from ..adapters import bottleneck
from ..adapters.bottleneck import Adapted, Bottleneck

right_attach = bottleneck.attach


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────────


class UpNotZero(Bottleneck):
    """the up-projection drawn near zero instead of zeroed"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.up.weight, std=0.02)


class AllZero(Bottleneck):
    """both matrices at 0: only the last bias ever learns"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.down.weight)


class NoActivation(Bottleneck):
    """no non-linearity between down and up"""

    def forward(self, x):
        return F.linear(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)), self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


class WrongActivation(Bottleneck):
    """ReLU for GELU"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.activation = "relu"


class ActivationLast(Bottleneck):
    """the non-linearity behind up instead of between"""

    def forward(self, x):
        return F.gelu(NoActivation.forward(self, x))


class NoBias(Bottleneck):
    """biases left out"""

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.down.weight.to(x.dtype))), self.up.weight.to(x.dtype))


class NoInnerResidual(Adapted):
    """the sublayer's output replaced by the bottleneck's, the inner skip connection left out"""

    def forward(self, x):
        return self.bottleneck(self.base(x))


class ReadsInput(Adapted):
    """the sequential bottleneck fed with the sublayer's input, as a parallel one is"""

    def forward(self, x):
        fed = F.pad(x, (0, max(0, self.out_features - x.shape[-1])))[..., : self.out_features]
        return self.base(x) + self.bottleneck(fed)


class AddedTwice(Adapted):
    """the sublayer's output added once inside the bottleneck and once outside"""

    def forward(self, x):
        y = self.base(x)
        return y + y + self.bottleneck(y)


class BottleneckDropoutInEval(Adapted):
    """dropout in front of the bottleneck in eval mode too"""

    def forward(self, x):
        y = self.base(x)
        return y + self.bottleneck(F.dropout(y, 0.1))


def attach_to_mlp_only(model, size=16, reduction=None, place="houlsby", activation=None, init="zero", scale=1.0):
    """a bottleneck behind the feed-forward alone, where Houlsby's has one behind attention too"""
    right_attach(model, size, reduction, "pfeiffer", "gelu", init, scale)


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────────


EXERCISES = {}
