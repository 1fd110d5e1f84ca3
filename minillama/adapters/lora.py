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

LEARNING_RATES = (1e-2, 1e-2)  # on the bundled bases, and on a real model
PEFT_TYPE, PEFT_KEYS = "LORA", ("use_rslora",)


class LoRALinear(nn.Module):
    """Wraps an nn.Linear and adds (alpha / rank) · B A x to its output.

    Parameters, float32 whatever the base's dtype: A (rank, in_features) and B (out_features, rank), zeros.
    dropout: the share of x that the path, not the base, loses in training.
    With `active` set to False it is its base again, bit for bit.
    """

    own, mergeable = ("A", "B"), True

    def __init__(self, base, rank=8, alpha=16.0, dropout=0.0):
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank!r}; needed is a whole number from 1 on")
        self.base, self.scaling, self.dropout, self.active = base, alpha / rank, nn.Dropout(dropout), True
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(base.parameters()).device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.train(base.training)  # of a model in eval mode no dropout is wanted

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        y = self.base(x)
        if not self.active:
            return y
        narrow = F.linear(self.dropout(x), self.A.to(x.dtype))  # (..., rank)
        return y + F.linear(narrow, self.B.to(x.dtype)) * self.scaling

    @property
    def weight(self):
        """Of the linear layer that this amounts to, (out_features, in_features)."""
        weight = self.base.weight
        return (weight + self.scaling * (self.B @ self.A)).to(weight.dtype) if self.active else weight

    @property
    def bias(self):
        return self.base.bias


def in_layers(names, layers):
    """Those of the names, "layers.3.mlp.up_proj", that stand in the layers asked for: the top so many, or those with
    these numbers; None: all names."""
    if layers is None:
        return set(names)
    number = {name: next((int(word) for word in name.split(".") if word.isdigit()), -1) for name in names}
    L = 1 + max(number.values(), default=-1)
    wanted = list(range(L - layers, L) if isinstance(layers, int) else layers)
    if not wanted or not all(isinstance(i, int) and 0 <= i < L for i in wanted):
        raise ValueError(
            f"layers is {layers!r}; the model has {L}, so it can be 1 to {L}, the top so many, "
            f"or a list of numbers from 0 to {L - 1}"
        )
    return {name for name in names if number[name] in wanted}


def linear_layers(model, targets, layers=None):
    """(name, module) of every nn.Linear whose own name, or whole name, is in `targets`; "all-linear" takes all but the
    head. layers: see `in_layers`."""
    linear = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]
    linear = [(name, module) for name, module in linear if name.rpartition(".")[2] != "base"]  # inside another wrapper
    if targets == "all-linear":
        found = [(name, module) for name, module in linear if name.rpartition(".")[2] != "lm_head"]
    else:
        targets = {targets} if isinstance(targets, str) else set(targets)
        found = [(name, module) for name, module in linear if {name, name.rpartition(".")[2]} & targets]
        if missing := targets - {each for name, _ in found for each in (name, name.rpartition(".")[2])}:
            raise ValueError(f"the model has no linear layer named {missing.pop()!r}, which targets asks for")
    chosen = in_layers([name for name, _ in found], layers)
    return [(name, module) for name, module in found if name in chosen]


def attach(
    model, rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ("q_proj", "v_proj"), dropout: float = 0.0,
    layers: int | tuple[int, ...] | None = None,
):  # fmt: skip
    """Wraps every nn.Linear whose own name, or whole name, is in `targets`; query and value by default, as in the
    paper; "all-linear": all but the head. layers: in the top so many, or in those with these numbers, from 0 on; None:
    in all. Freezes nothing."""
    for name, module in linear_layers(model, targets, layers):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRALinear(module, rank, alpha, dropout))


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────


def to_peft(options, tensors, layout):
    """(config, tensors) as PEFT's LoRA has them."""
    A, B = ({n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)} for end in (".A", ".B"))
    stacked, A, B = layout.stack_low_rank(A, B)  # one rank for the file, and the same alpha / rank
    config = {"peft_type": PEFT_TYPE, "r": options["rank"] * stacked, "lora_alpha": options["alpha"] * stacked}
    config |= {"lora_dropout": options["dropout"], "fan_in_fan_out": layout.transposed} | layout.asked(A)
    matrices = (("lora_A.weight", A), ("lora_B.weight", B))
    return config, {f"{place}.{own}": tensor for own, matrix in matrices for place, tensor in matrix.items()}


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    own = {}
    for name, tensor in tensors.items():
        place, _, rest = name.rpartition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise ValueError(f"the tensor {name} is none of LoRA's; those end in lora_A.weight or lora_B.weight")
        own |= {
            f"{p}.{rest[0]}": half for p, half in layout.split(place, tensor, None if rest[0] == "A" else 0).items()
        }
    options = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout", 0.0)}
    if config.get("use_rslora"):  # alpha / √rank (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)
        options["alpha"] *= math.sqrt(config["r"])
    return options | layout.given(name.rpartition(".")[0] for name in own), own
