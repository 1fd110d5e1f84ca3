"""Lesson 06's layer that merges itself; and the facts that it shares with the others of that lesson: what A and B start
from, what B A is multiplied by, and whether a path is steady."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from .catalogue import catalogue, tables
from .judging import close
from .modules import opened, reached, trains
from .observing import Piece, Wrong, describe, filled, floating, teller

TABLES = tables(Path(__file__).with_name("lora.md"))
said = teller(TABLES, "paths", "start", "layer_all")


def begun(A, B, n_in, n_out, r):
    """Pieces of A and B at the start: which of them is 0, how many directions A reads. Wrong where a shape is."""
    for what, value, shape in (("A (r, in)", A, (r, n_in)), ("B (out, r)", B, (n_out, r))):
        found = tuple(value.shape) if floating(value) else None
        if found != shape:
            name = {shape[::-1]: "turned_round", (n_out, r): "exchanged"}.get(found, "shape")
            needed = f"needed is a float32 tensor of shape {shape} for in = {n_in}, out = {n_out} and r = {r}"
            raise Wrong(name, f"{what} is {describe(value)}; {needed}.")
        yield said(value.dtype == torch.float32, "start_dtype", f"{what} in float32", which=what, value=describe(value))
        yield said(0 in value.stride(), "expanded", f"whether {what} is expanded", which=what)
    zero = [not A.any(), not B.any()]
    name = "BothZero" if all(zero) else "WrongOneZero" if zero[0] else "BothRandom"
    yield said(zero[0] + 2 * zero[1], name, "which of the two is 0")
    yield said(len(torch.unique(A.detach(), dim=0)) < r, "equal_rows")
    yield said(not zero[0] and bool((A == 0).double().mean() > 0.5), "mostly_zero")
    rank = int(torch.linalg.matrix_rank(A.detach().double(), rtol=1e-4))
    yield said(rank, "low_rank", rank=rank, r=r)
    if A.numel() > 9999:  # enough of them to measure how they are spread
        deviation, mean = A.detach().double().std().item(), A.detach().double().mean().item()
        yield said(abs(mean) > 0.1 * deviation, "not_centred")
        times = deviation * (3 * n_in) ** 0.5  # 1 where drawn as nn.Linear draws; each known width is told apart
        which = next((i for i, n in enumerate((1, 6**0.5, (3 * n_in) ** 0.5)) if abs(times / n - 1) < 0.05), -1)
        yield said(which, "too_wide" if times > 1 else "too_narrow", "how wide A is", times=times)


def multiplied(found, product, alpha, r, when=""):
    """Facts: what the product B A is multiplied by in what was found, and whether it is rounded there."""
    factor = right = alpha / r
    least = ((found * product).sum() / product.square().sum()).item()
    multiple = close(found, least * product)
    factor = least if abs(least) > 1e-3 and multiple else right
    what = f"{when}what B A is multiplied by"
    yield said(factor, "factor", what, when=when, factor=factor, right=right, alpha=alpha, r=r)
    yield said(not multiple and close(found, right * product, 0.01), "rounded", f"{when}rounded", when=when)


def steady(function, unseeded, x, dropout):
    """Facts: whether nothing is drawn at random, each token goes by itself, and the path is linear in x."""
    at, t, mixed = [function(z) for z in (0 * x, x, -2 * x)], x.shape[1] // 2, False
    one, other = [(torch.default_generator.manual_seed(seed), unseeded(x))[1] for seed in (1, 2)]
    yield said(not close(one, other), dropout)
    with contextlib.suppress(Exception):  # it may stop where T is another; that is looked at later
        mixed = not close(function(x[-1:, t : t + 1]), at[1][-1:, t : t + 1])
    yield said(mixed, "mixed")
    yield said(not close(at[2] - at[0], -2 * (at[1] - at[0])), "activated")


class Layer(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scaling, self.kept = linear.requires_grad_(False), alpha / rank, None
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / (3 * linear.in_features) ** 0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def path(self, x):
        return x @ self.A.T @ self.B.T * self.scaling

    def forward(self, x):
        return self.linear(x) if self.kept is not None else self.linear(x) + self.path(x)

    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.clone()
            self.linear.weight += self.scaling * self.B @ self.A

    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight.copy_(self.kept)
            self.kept = None


LAYER = catalogue(Layer, TABLES["layer_all"])


def probe_layer(answer, draw):
    for sizes in ((2, 5), 10, 7, 3, 5.0), ((3, 2), 6, 6, 4, 3.0), ((1, 1), 5, 8, 1, 0.5), ((1, 2), 300, 250, 64, 5.0):
        yield from facts_of_layer(answer, draw, *sizes)


def facts_of_layer(answer, draw, tokens, n_in, n_out, r, alpha):
    """One after another, in the order in which they are to be mended."""
    linear, x = filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), draw(*tokens, n_in)
    twin = answer(filled(nn.Linear(n_in, n_out), draw).requires_grad_(True), r, alpha)
    layer = answer(linear, r, alpha)
    if not isinstance(layer, nn.Module) or not {"A", "B"} <= {name for name, _ in layer.named_parameters()}:
        raise Wrong("form", f"needed is a module with the parameters A and B; it is {describe(layer)}.")
    layer.eval(), twin.eval()
    before, plain = linear.weight.detach().clone(), linear(x).detach()

    def only_path_trains(name="BaseStillTrains"):
        yield trains({"A": layer.A, "B": layer.B})
        more = [p for own, p in layer.named_parameters() if p.requires_grad and own not in ("A", "B")]
        yield said(any(p is linear.weight or p is linear.bias for p in more), name)
        yield said(len(more), "third_trains")

    def output(times):
        """With B multiplied by a number, by which a path shows."""
        layer.B.data = times * B
        out = layer(x).detach()
        layer.B.data = B.clone()
        return out

    yield from only_path_trains()
    yield said(bool(layer.A.any() and layer.B.any()), "RandomB")
    yield from begun(layer.A, layer.B, n_in, n_out, r)
    fresh = layer(x)
    yield said(linear.weight.requires_grad and reached(fresh, linear.weight), "BaseStillTrains")
    if not floating(fresh) or fresh.shape != plain.shape:
        raise Wrong("no_output", f"needed is a tensor of shape {tuple(plain.shape)}; it is {describe(fresh)}.")
    yield said(close(fresh.detach(), plain), "not_the_base")
    yield said(close(layer.train()(x).detach(), plain), "drops_base")
    layer.eval()
    A, B = draw(r, n_in), draw(n_out, r)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    out, product = layer(x).detach(), x.detach() @ A.T @ B.T
    yield from steady(layer, layer.forward, x.detach(), "DropoutStays")
    yield from multiplied(out - plain, product, alpha, r)
    yield from opened(layer, {"A": layer.A, "B": layer.B}, "", x, when="with an open path ", axes="(B, T, out)")
    try:
        layer.unmerge()
    except Exception as error:
        why = said.sentences["UnmergesUnmerged"]
        raise Wrong("UnmergesUnmerged", f"{why} It stopped with {error!r}.") from None
    yield said(torch.equal(layer(x), out), "UnmergesUnmerged")
    layer.merge()
    folded, twice = layer(x).detach(), plain + 2 * alpha / r * product
    yield said(torch.equal(layer.A, A) and torch.equal(layer.B, B), "path_lost")
    yield said(close(folded, twice), "PathOnTop")
    yield said(close(folded, plain), "MergeFlagsOnly")
    yield from multiplied(folded - plain, product, alpha, r, "after merge() ")
    yield Piece("the output after merge() (B, T, out)", folded)
    yield from only_path_trains("merged_trains")
    yield said(close(output(2), folded), "still_a_path")
    yield said(close(layer.train()(x).detach(), folded), "path_in_training")
    layer.eval()
    for name in ("KeptIsNoCopy", "CopyOverwritten"):
        layer.unmerge()
        again = layer(x).detach()
        yield said(close(again, plain), "StaysMerged")
        yield said(close(again, twice), name)
        yield said(close(output(0), plain, 0.01), "NeverUnmerges")
        yield said(close(again, out, 1e-5), "copy_rounded")
        if name == "KeptIsNoCopy":
            layer.merge()
            layer.merge()
            yield said(close(layer(x).detach(), folded), "MergesTwice")
            yield said(close(output(2), folded), "toggles")
    yield said(torch.equal(linear.weight, before) and torch.equal(again, out), "UnmergeSubtracts")
    yield from only_path_trains()
    yield from opened(layer, {"A": layer.A, "B": layer.B}, "", x, when="after unmerge() ", axes="(B, T, out)")
    A, B = draw(r, n_in), draw(n_out, r)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    layer.train().merge()
    changed = layer.eval()(x).detach()
    yield said(close(output(2), changed), "in_eval_only")
    yield said(close(changed, folded), "stale")
    yield Piece("the output after more training and another merge() (B, T, out)", changed)
    twin.A.data, twin.B.data = draw(r, n_in), draw(n_out, r)
    layer.unmerge()
    out, others = layer(x), twin(x)
    layer.merge()
    alone = twin(x)
    twin.merge()
    layer.unmerge()
    yield said(close(alone, others) and close(layer(x), out) and close(twin(x), others), "shared")
