"""Lesson 04: IA3's vectors, where they start and what they have learned."""

import copy

import torch

from ...adapters import adapter_parameters, merge
from .runs import distances, judged
from .shown import table


def ia3_vectors(model, name="default"):
    """An IA3 adapter's own parameters: {layer: {"l_k": (G·d), "l_v": (G·d), "l_ff": (F)}}."""
    own, places = adapter_parameters(model, name), ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    names = dict(zip(("l_k", "l_v", "l_ff"), places))
    return {
        i: {vector: own[f"layers.{i}.{place}.ia3.scale"] for vector, place in names.items()}
        for i in range(len(model.layers))
    }


def starts_of_ia3(begins, ids):
    """A table of how far vectors stand from the base before a step; the first two of `begins` are the base."""
    rows = distances(begins, ids)
    assert [same for _, _, same in rows] == [True, True] + [False] * (len(rows) - 2)
    return table(["start", "largest difference of logits", ""], judged(rows, exact="bit for bit"))


def shares_of_factors(vectors):
    """(table, the last row's shares) of factors below 0, to 0.5, to 1.5 and above. vectors: {name: (features,)}."""
    rows, bounds = [], torch.tensor((0, 0.5, 1.5))
    for name, vector in vectors.items():
        shares = torch.bincount(torch.bucketize(vector, bounds), minlength=4) / len(vector)
        rows.append((name, len(vector), *(f"{100 * share:.0f} %" for share in shares)))
    return table(["", "numbers", "turned round: below 0", "0 to 0.5", "0.5 to 1.5", "above 1.5"], rows), shares.tolist()


@torch.no_grad()
def ia3_opened(start, attach, ids, merged=False):
    """The logits of a copy of a base with such a layer in every block, each block's l_k, l_v and l_ff drawn from the
    same numbers, 1 + N(0, 0.3), whatever they multiply; merged: with the vectors folded into the weights."""
    model = copy.deepcopy(start).float()
    attach(model)
    for i, layer in enumerate(model.layers):
        kinds = {"q_proj": 0, "k_proj": 0, "v_proj": 1}
        for name, part in layer.named_modules():
            if hasattr(part, "scale"):
                draw = torch.Generator().manual_seed(3 * i + kinds.get(name.rpartition(".")[2], 2))
                part.scale.copy_(1 + 0.3 * torch.randn(part.scale.shape, generator=draw))
    return (merge(model) if merged else model)(ids)
