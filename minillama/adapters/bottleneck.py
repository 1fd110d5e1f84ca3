"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751), and their parallel relatives.

A small network squeezes D features to m and back (figure 2), and its output is added to a frozen sublayer's:

    sequential                                       parallel (He et al. 2022, https://arxiv.org/abs/2110.04366)

    x ─▶ sublayer ─┬───────────────────────▶ + ─▶    x ─┬─▶ sublayer ────────────────────────▶ + ─▶
                   └▶ down ─▶ act ─▶ up ─────┘          └─▶ down ─▶ act ─▶ up ─▶ × scale ──────┘
                      (m, D)         (D, m)

The sum then goes into the residual stream as the sublayer's output did. With `reads="stream"` the network reads that
stream instead, as the AdapterHub library's seq_bn and par_bn do: with the sublayer's output added to it (pfeiffer), or
as it is in front of the norm (parallel). Placements by name:

    houlsby    sequential, behind attention's and the feed-forward's last projection; GELU
    pfeiffer   sequential, behind the feed-forward only (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247); ReLU
    parallel   beside the feed-forward; ReLU; `scale` 1, or 4 as in He et al.'s scaled parallel adapter

`up` starts at 0, so the network adds 0: the model returns what it returned, bit for bit. The published initialisations
are only near the identity and go by name: "houlsby", normal(0, 1e-2) cut at two deviations as in the paper's text, and
"adapters", normal(0, 0.02) on both matrices as in the AdapterHub library.

Trained parameters: 2·m·D + D + m for each network. What is added is not linear, so it folds into no weight. The module
needs torch alone and works on any model whose blocks call their parts `o_proj`, `down_proj` and `mlp`.
"""

import torch
from torch import nn
from torch.nn import functional as F

PLACES = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",), "parallel": ("mlp",)}
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
INITS = ("zero", "houlsby", "adapters")
READS = ("part", "stream")
LEARNING_RATES = (1e-2, 3e-3)  # on the bundled bases, and on a real model


class Bottleneck(nn.Module):
    """up(activation(down(x))), (..., D) -> (..., D), with weights of `size` m and float32, computed in x's dtype."""

    def __init__(self, width, size, activation="gelu", init="zero", device=None):
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size is {size!r}; needed is a whole number from 1 on")
        for value, name, known in ((activation, "activation", ACTIVATIONS), (init, "init", INITS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
        self.activation = activation
        self.down, self.up = nn.Linear(width, size, device=device), nn.Linear(size, width, device=device)
        with torch.no_grad():
            self.down.bias.zero_(), self.up.bias.zero_()
            if init == "zero":
                self.up.weight.zero_()
            for linear in (self.down, self.up) if init != "zero" else ():
                if init == "houlsby":
                    nn.init.trunc_normal_(linear.weight, std=1e-2, a=-2e-2, b=2e-2)
                else:
                    nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x):
        narrow = F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))  # (..., m)
        narrow = ACTIVATIONS[self.activation](narrow)
        return F.linear(narrow, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


class Adapted(nn.Module):
    """Wraps a module that maps (..., D) to (..., D') and adds a bottleneck's output to its own.

    parallel: the bottleneck reads the module's input (then D' must be D) instead of its output.  stream: where the
    residual stream passes, a `Passing`; then the bottleneck reads it, in the module's input's place, or added to its
    output.
    With `active` set to False it is its base again, bit for bit. Around an nn.Linear, `weight` and `bias` are what it
    wraps has, for code that asks them for a dtype: with a bottleneck behind it, no weight says all.
    """

    own = ("bottleneck",)

    def __init__(self, base, bottleneck, parallel=False, scale=1.0, stream=None):
        super().__init__()
        self.base, self.bottleneck, self.parallel, self.scale, self.active = base, bottleneck, parallel, scale, True
        self.stream = (stream,)  # in a tuple, so that it is no part of this module
        if hasattr(base, "in_features"):
            self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x):
        y = self.base(x)
        if not self.active:
            return y
        if (passing := self.stream[0]) is not None:
            stream, passing.passed = passing.passed, None  # kept no longer than needed
            return y + self.scale * self.bottleneck(stream if self.parallel else stream + y)
        return y + self.scale * self.bottleneck(x if self.parallel else y)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias


class Passing(nn.Module):
    """Wraps the norm before the feed-forward and keeps what it was given: the residual stream, (..., D)."""

    own = ()

    def __init__(self, base):
        super().__init__()
        self.base, self.active, self.passed = base, True, None

    def forward(self, x):
        if self.active:
            self.passed = x
        return self.base(x)

    @property
    def weight(self):
        return self.base.weight

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
    model, size: int = 16, reduction: int | None = None, place: str = "houlsby", activation: str | None = None,
    init: str = "zero", scale: float = 1.0, reads: str = "part", layers: int | tuple[int, ...] | None = None,
):  # fmt: skip
    """Puts a bottleneck of `size` features, or with `reduction` of D // reduction, at every place of that name;
    activation None takes the placement's own. reads: "part", what it stands at; "stream", the residual stream around
    the feed-forward. layers: the top so many, or those with these numbers, from 0 on; None: all. Freezes nothing."""
    for value, name, known in ((place, "place", PLACES), (reads, "reads", READS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
    if reads == "stream" and place == "houlsby":
        raise ValueError("reads is 'stream' and place 'houlsby'; AdapterHub has that for 'pfeiffer' and 'parallel'")
    activation = activation or ("gelu" if place == "houlsby" else "relu")
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in PLACES[place]]
    if not found:
        raise ValueError(f"the model has no part named {PLACES[place][0]!r}, where {place!r} puts its bottleneck")
    chosen, norms = in_layers([name for name, _ in found], layers), {}
    for name in chosen if reads == "stream" else ():
        layer = model.get_submodule(name.removesuffix(".down_proj").rpartition(".")[0])
        if not hasattr(layer, "post_attention_layernorm"):
            raise ValueError(f"{name} stands in a layer without a `post_attention_layernorm`, where the stream passes")
        norms[name] = layer
    for name, module in found:
        if name not in chosen:
            continue
        inner = next((part for part in module.modules() if hasattr(part, "in_features")), None)
        if inner is None:
            raise ValueError(f"{name} holds no nn.Linear, which would say how many features a bottleneck there reads")
        width = inner.in_features if place == "parallel" else inner.out_features
        narrow = size if reduction is None else width // reduction
        bottleneck = Bottleneck(width, narrow, activation, init, next(module.parameters()).device)
        passing = None
        if name in norms:
            passing = norms[name].post_attention_layernorm = Passing(norms[name].post_attention_layernorm)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Adapted(module, bottleneck, place == "parallel", scale, passing))
