"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import torch.nn.functional as F
from torch import nn

from ..adapters.lora import LoRALinear


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────────


class ScaledByAlpha(LoRALinear):
    """α instead of α / r"""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha


class ScaledByRoot(LoRALinear):
    """α / √r, which is another method (rsLoRA)"""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha / rank**0.5


class BothZero(LoRALinear):
    """A and B both at 0: neither ever gets a gradient"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A)


class BothRandom(LoRALinear):
    """A and B both random"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.B, std=0.02)


class WrongOneZero(LoRALinear):
    """A at 0 and B random: the identity, but not the paper's start"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A), nn.init.normal_(self.B)


class ReadsOutput(LoRALinear):
    """the path fed with the projection's output"""

    def forward(self, x):
        y = self.base(x)
        fed = F.pad(y, (0, max(0, self.in_features - self.out_features)))[..., : self.in_features]
        return y + F.linear(F.linear(fed, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling


class LoRADropoutInEval(LoRALinear):
    """dropout in front of A in eval mode too"""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(F.dropout(x, 0.1), self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling


class MergeUnscaled(LoRALinear):
    """a merge that forgets α / r"""

    def merged(self):
        linear = super().merged()
        linear.weight.data.copy_(self.base.weight + self.B @ self.A)
        return linear


class DetachedA(LoRALinear):
    """A detached from the graph: only B ever learns"""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A.detach().to(x.dtype)), self.B.to(x.dtype)) * self.scaling


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────────


EXERCISES = {}
