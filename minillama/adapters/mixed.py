"""One base, many adapters, one batch: every row names the adapter it goes through.

    with mixed(model, ["fr", "de", None, "fr"]):      # four rows; None is the base alone
        logits = model(ids)                           # (4, T, V), each row as if it ran with its own adapter

Within the block every place that the named adapters wrap becomes a router: it sorts the rows by name, sends each
group through the wrappers of its name, and puts the results back in order.

              ┌─ rows 0, 3 ─▶ wrappers of "fr" ─▶ base ─┐
    x (B, …) ─┼─ row 1 ─────▶ wrappers of "de" ─▶ base ─┼─▶ y (B, …)
              └─ row 2 ──────────────────────▶ base ────┘

Every row passes the base once, whatever the number of adapters, and all that is not wrapped sees the whole batch. Where
all have LoRA of one shape at a place, or IA3, no rows are sorted: each row's own numbers are stacked, and multiply the
whole batch at once. The methods know nothing of it: it works for several methods in one adapter, with a cache, with
padding and in training. The one thing it asks is that a wrapped part takes rows along its first axis, so what moves the
tokens' positions, which the batch shares, cannot be mixed: prompt tuning, and on a GPT-2 prefix tuning.
"""

import contextlib
from operator import attrgetter

import torch

from ..attention import LayerCache
from . import StandIn, adapters, is_wrapper, outermost, refuse_stand_ins, require, wrappers
from .holding import held
from .ia3 import IA3Linear
from .lora import LoRALinear


class Router(StandIn):
    """Stands in for the outermost wrapper at one place. `names` is the list shared by all places of the model."""

    way_out = "the model is in a block of mixed(), which holds its adapters as they are: leave the block first"

    def __init__(self, wrapper, names):
        super().__init__(wrapper)
        self.names = names

    @property
    def chain(self):
        """The wrappers at this place, outer ones first."""
        wrapper = self.base
        while is_wrapper(wrapper):
            yield wrapper
            wrapper = wrapper.base

    def forward(self, x, *arguments):
        """x (B, ...); arguments: positions, mask and cache where the place is an attention."""
        if not self.active:
            return self.base(x, *arguments)
        names = list(self.names)
        of_rows = x.dim() > 2  # else vectors without rows: a prompt (K, D) on its way through its own adapter's layers
        if of_rows and len(x) != len(names):
            raise ValueError(
                f"the batch has {len(x)} rows and {len(names)} adapters were named, one for each row is needed"
            )
        if len(set(names)) == 1:  # one group, or inside a place that has sorted the rows already
            return self.run(names[0], x, *arguments)
        if not of_rows:
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} no longer tells the rows of the batch apart, which an adapter "
                "here needs: compute model(ids) and the loss from its logits"
            )
        named = [wrapper for wrapper in self.chain if wrapper.adapter in names]
        if x.dim() == 3 and (at_once := of_one_kind(named)):
            own = {wrapper.adapter: wrapper for wrapper in named}
            *_, innermost = self.chain
            return at_once(innermost.base, x, [own.get(name) for name in names])
        out = None
        try:
            for name in dict.fromkeys(names):
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
                self.names[:] = [name] * len(rows)
                with narrowed(self.chain, rows, len(x), name):
                    y = self.run(name, x[rows], *(part(argument, rows, len(x), name) for argument in arguments))
                out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
                out = out.index_copy(0, rows, y)
        finally:
            self.names[:] = names
        return out

    def run(self, name, x, *arguments):
        for wrapper in self.chain:
            wrapper.active = wrapper.adapter == name
        return self.base(x, *arguments)


# ── many adapters of one kind at once ────────────────────────────────────────────────────────────────────────────────


def low_rank(base, x, rows):
    """LoRA's equation 3 with A and B of each row's own wrapper (None: 0): x (B, T, in) -> (B, T, out)."""
    some = next(filter(None, rows))
    A = torch.stack([(row or some).A for row in rows]).to(x.dtype)  # (B, rank, in)
    B = torch.stack([row.B if row else torch.zeros_like(some.B) for row in rows]).to(x.dtype)  # (B, out, rank)
    return base(x) + some.dropout(x) @ A.mT @ B.mT * some.scaling


def scaled(base, x, rows):
    """IA3 with the vector of each row's own wrapper (None: ones): x (B, T, in) -> (B, T, out)."""
    some = next(filter(None, rows))
    scale = torch.stack([row.scale if row else torch.ones_like(some.scale) for row in rows])[
        :, None
    ]  # (B, 1, features)
    return base(x * scale.to(x.dtype)) if some.side == "input" else (y := base(x)) * scale.to(y.dtype)


# What a wrapper computes: the same for rows of several, and in what these must agree.
ROW_BY_ROW = {
    LoRALinear.forward: (low_rank, attrgetter("A.shape", "scaling", "dropout.p", "training")),
    IA3Linear.forward: (scaled, attrgetter("side")),
}


def of_one_kind(named):
    """The function of ROW_BY_ROW that does for all these wrappers at once, one of each adapter; None: there is none."""
    kinds = {type(wrapper).forward for wrapper in named}
    if len(kinds) != 1 or len({wrapper.adapter for wrapper in named}) < len(named):
        return None
    at_once, settings = ROW_BY_ROW.get(*kinds, (None, type))
    return at_once if len({settings(wrapper) for wrapper in named}) == 1 else None


@contextlib.contextmanager
def narrowed(chain, rows, batch, name):
    """Within the block the wrappers that see a picture for each row (seeing.py) see those of one group."""
    seen = [(wrapper, wrapper.seen) for wrapper in chain if getattr(wrapper, "seen", None) is not None]
    try:
        for wrapper, whole in seen:
            wrapper.seen = part(whole, rows, batch, name)
        yield
    finally:
        for wrapper, whole in seen:
            wrapper.seen = whole


def part(argument, rows, batch, name):
    """What one group needs of an argument: its rows of a tensor that has the whole batch's, a cache of its own."""
    if isinstance(argument, tuple):
        return tuple(part(item, rows, batch, name) for item in argument)
    if isinstance(argument, LayerCache):
        return argument.once(("rows of", name), lambda: type(argument)(argument.cache))
    if isinstance(argument, torch.Tensor) and argument.dim() > 2 and len(argument) == batch:
        return argument[rows]  # (B, 1, T, …); positions' (T, d) is shared
    return argument


@contextlib.contextmanager
def mixed(model, names):
    """Within the block, row i of every batch goes through the adapter names[i], or for None through the base alone.

    A prompt of left-padded rows and its generation are one such batch. The block is its thread's alone. Raises
    ValueError for an unknown name.
    """
    named = {name for name in names if name is not None}
    require(model, *named)
    for method in (part["method"] for name in named for part in adapters(model)[name]):
        if method == "prompt_tuning" or (method == "prefix_tuning" and hasattr(model, "embed_positions")):
            raise ValueError(
                f"{method} moves the tokens' positions, which the rows of a batch share: it cannot be mixed here"
            )
    with held(model) as refuse:
        refuse_stand_ins(model)
        states = [(wrapper, wrapper.active) for _, wrapper in wrappers(model)]
        shared, replaced = list(names), []
        for parent, own, wrapper in outermost(model):
            router = Router(wrapper, shared)
            if any(inner.adapter in named for inner in router.chain):
                router.register_forward_pre_hook(refuse)
                replaced.append((parent, own, wrapper))
                setattr(parent, own, router)
        try:
            for wrapper, _ in states:
                wrapper.active = False  # a router opens those of its rows
            yield model
        finally:
            for parent, own, wrapper in replaced:
                setattr(parent, own, wrapper)
            for wrapper, state in states:
                wrapper.active = state
