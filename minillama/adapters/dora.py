"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

A projection's weight is taken apart into a magnitude, one number per output feature, and a direction; the magnitude is
trained by itself, the direction by a low-rank path as in LoRA (equation 5):

    W' = m · (W + (α/r) B A) / ‖W + (α/r) B A‖         ‖·‖: the norm of each row, over the input features
         ▲              ▲ ▲
      trained        trained, B 0 at first

m starts at ‖W‖ and B at 0. Then m / ‖W‖ is 1, and what is computed is W x + b + (1 − 1) · W x + 1 · 0: the model
returns what it returned, bit for bit (until the model is converted to another dtype, whose rounding changes the norms).
As in the paper's section 4.3 no gradient goes through the norm.

Trained parameters: r · (in + out) + out for each adapted projection. It is again one weight, and folds into it.

The module needs torch alone and works on any model whose projections are nn.Linear, by their names.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

LEARNING_RATES = (1e-2, 1e-2)  # on the bundled bases, and on a real model
PEFT_TYPE, PEFT_KEYS = "LORA", ("use_dora", "use_rslora")


class DoRALinear(nn.Module):
    """Wraps an nn.Linear and gives its weight a trained magnitude and a low-rank change of direction.

    Parameters, float32 whatever the base's dtype: A (rank, in_features), B (out_features, rank), zeros, and magnitude
    (out_features,). dropout: the share of x that the path, not the base, loses in training.
    With `active` set to False it is its base again, bit for bit.
    """

    own, mergeable = ("A", "B", "magnitude"), True

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
        self.magnitude = nn.Parameter(self.direction().norm(dim=1))

    def direction(self):
        """W + (α/r) B A, (out_features, in_features), in float32 or wider; without a gradient."""
        weight = self.base.weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.scaling * (self.B @ self.A).detach()

    def ratio(self):
        """What each row of the direction is multiplied by: m / ‖W + (α/r) B A‖, (out_features,)."""
        return self.magnitude / self.direction().norm(dim=1)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        y = self.base(x)
        if not self.active:
            return y
        path = F.linear(F.linear(self.dropout(x), self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling
        ratio, straight = self.ratio(), y if self.bias is None else y - self.bias.to(y.dtype)  # W x
        return y + (ratio - 1).to(y.dtype) * straight + ratio.to(y.dtype) * path

    @property
    def weight(self):
        """Of the linear layer that this amounts to, (out_features, in_features)."""
        weight = self.base.weight
        if not self.active:
            return weight
        return (self.ratio()[:, None] * (weight + self.scaling * (self.B @ self.A))).to(weight.dtype)

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


def attach(
    model, rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ("q_proj", "v_proj"), dropout: float = 0.0,
    layers: int | tuple[int, ...] | None = None,
):  # fmt: skip
    """Wraps every nn.Linear whose own name, or whole name, is in `targets`, as LoRA does; "all-linear": all but the
    head. layers: in the top so many, or in those with these numbers; None: in all. Freezes nothing."""
    targets = (targets,) if isinstance(targets, str) and targets != "all-linear" else targets
    linear = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]
    found = [
        (name, module)
        for name, module in linear
        if (own := name.rpartition(".")[2]) != "base"
        and (own in targets or name in targets if targets != "all-linear" else own != "lm_head")
    ]
    known = {each for name, _ in found for each in (name, name.rpartition(".")[2])}
    if targets != "all-linear" and (missing := set(targets) - known):
        raise ValueError(f"the model has no linear layer named {missing.pop()!r}, which targets asks for")
    chosen = in_layers([name for name, _ in found], layers)
    for name, module in [(name, module) for name, module in found if name in chosen]:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, DoRALinear(module, rank, alpha, dropout))


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────

THEIRS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def to_peft(options, tensors, layout):
    """(config, tensors) as PEFT's LoRA with use_dora has them."""
    A, B, m = ({n.removesuffix(f".{own}"): t for n, t in tensors.items() if n.endswith(f".{own}")} for own in THEIRS)
    stacked, A, B = layout.stack_low_rank(A, B)  # one rank for the file, and the same alpha / rank
    m = layout.fuse(m, lambda place: layout.modules[place].weight.detach().float().norm(dim=1).cpu(), torch.cat)
    config = {"peft_type": PEFT_TYPE, "use_dora": True, "r": options["rank"] * stacked}
    config |= {"lora_alpha": options["alpha"] * stacked, "lora_dropout": options["dropout"]}
    config |= {"fan_in_fan_out": layout.transposed} | layout.asked(A)
    theirs = zip(THEIRS.values(), (A, B, m))
    return config, {f"{place}.{own}": tensor for own, every in theirs for place, tensor in every.items()}


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    own, ours = {}, {theirs: name for name, theirs in THEIRS.items()}
    for name, tensor in tensors.items():
        place, _, rest = name.rpartition(".lora_")
        if f"lora_{rest}" not in ours:
            raise ValueError(f"the tensor {name} is none of DoRA's; those end in {', '.join(ours)}")
        mine = ours[f"lora_{rest}"]
        own |= {f"{p}.{mine}": part for p, part in layout.split(place, tensor, None if mine == "A" else 0).items()}
    options = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout", 0.0)}
    if config.get("use_rslora"):  # alpha / √rank
        options["alpha"] *= math.sqrt(config["r"])
    return options | layout.given(name.rpartition(".")[0] for name in own), own
