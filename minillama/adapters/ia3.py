"""IA3, "infused adapter by inhibiting and amplifying inner activations" (Liu et al. 2022,
https://arxiv.org/abs/2205.05638).

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
LEARNING_RATES = (0.1, 4e-2)  # on the bundled bases, and on a real model
PEFT_TYPE = "IA3"


class IA3Linear(nn.Module):
    """Wraps an nn.Linear and multiplies its output (side "output") or its input (side "input") by `scale`, one number
    per feature, float32, ones at first. With `active` set to False it is its base again, bit for bit."""

    own, mergeable = ("scale",), True

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
        if self.side == "input":
            return self.base(x * self.scale.to(x.dtype))
        y = self.base(x)
        return y * self.scale.to(y.dtype)  # under autocast y has another dtype than x

    @property
    def weight(self):
        """Of the linear layer that this amounts to, (out_features, in_features)."""
        weight = self.base.weight
        if not self.active:
            return weight
        return (weight * (self.scale[:, None] if self.side == "output" else self.scale)).to(weight.dtype)

    @property
    def bias(self):
        bias = self.base.bias
        if bias is None or not self.active or self.side == "input":
            return bias
        return (bias * self.scale).to(bias.dtype)


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
    model, outputs: tuple[str, ...] = ("k_proj", "v_proj"), inputs: tuple[str, ...] = ("down_proj",),
    layers: int | tuple[int, ...] | None = None,
):  # fmt: skip
    """Wraps every nn.Linear whose own name, or whole name, is in `outputs` or in `inputs`, on that side; defaults as in
    the paper. layers: in the top so many, or in those with these numbers, from 0 on; None: in all. Freezes nothing."""
    outputs, inputs = ((names,) if isinstance(names, str) else tuple(names) for names in (outputs, inputs))
    sides = {**dict.fromkeys(outputs, "output"), **dict.fromkeys(inputs, "input")}
    if both := set(outputs) & set(inputs):
        raise ValueError(f"{both.pop()!r} stands in outputs and in inputs; a projection is scaled on one side")
    linear = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]
    asked = {name: name if name in sides else name.rpartition(".")[2] for name, _ in linear}
    found = [(name, module) for name, module in linear if asked[name] in sides]
    if missing := sides.keys() - {asked[name] for name, _ in found}:
        raise ValueError(f"the model has no linear layer named {missing.pop()!r}, which outputs or inputs ask for")
    chosen = in_layers([name for name, _ in found], layers)
    for name, module in found:
        parent, _, own = name.rpartition(".")
        if name in chosen:
            setattr(model.get_submodule(parent), own, IA3Linear(module, sides[asked[name]]))


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────


def to_peft(options, tensors, layout):
    """(config, tensors) as PEFT's IA3 has them: vectors of outputs as columns, of inputs as rows."""
    own = {name.removesuffix(".scale"): scale for name, scale in tensors.items()}
    inputs = {place for place in own if {place, place.rpartition(".")[2]} & {*options["inputs"]}}
    if any(layout.is_fused(place) for place in inputs):
        return None  # one input serves all that the matrix holds
    own = {place: scale[None] if place in inputs else scale[:, None] for place, scale in own.items()}
    own = layout.fuse(own, lambda place: torch.ones(layout.size(place)[0], 1), torch.cat)
    config = {"peft_type": PEFT_TYPE, "target_modules": layout.named(own), "feedforward_modules": layout.named(inputs)}
    return config | {"fan_in_fan_out": layout.transposed}, {f"{place}.ia3_l": scale for place, scale in own.items()}


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    own = {}
    for name, tensor in tensors.items():
        place, suffix, _ = name.rpartition(".ia3_l")
        if not suffix or tensor.dim() != 2 or 1 not in tensor.shape:
            raise ValueError(
                f"the tensor {name} of shape {tuple(tensor.shape)} is none of IA3's; "
                "those end in ia3_l and have one row or one column"
            )
        own |= layout.split(place, tensor, 0) if tensor.shape[1] == 1 else {place: tensor}
    outputs, inputs = ([place for place, tensor in own.items() if tensor.shape[axis] == 1] for axis in (1, 0))
    scales = {f"{place}.scale": tensor.flatten() for place, tensor in own.items()}
    return layout.given(outputs, inputs, names=("outputs", "inputs")), scales
