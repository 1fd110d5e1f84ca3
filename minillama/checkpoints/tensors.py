"""The tensors of a checkpoint in Hugging Face's names and layout, and in ours, as an architecture's row tells."""

import re
from functools import partial

import torch

from ..speed import Blocks


def rename(name, table):
    """Replaces whole words of a dotted name: "h.3.ln_1.weight" with {"h": "layers", ...} -> "layers.3.ln_1.weight"."""
    if not table:
        return name
    words = "|".join(map(re.escape, table))
    return re.sub(rf"(?<![^.])({words})(?=\.)", lambda found: table[found[0]], name)


def widths(config, parts):
    """How many rows each of the matrices has that are fused into one."""
    H, G = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // H
    return [{"q_proj": H * d, "k_proj": G * d, "v_proj": G * d}.get(part, config.intermediate_size) for part in parts]


def from_hf(row, weights, config):
    """A checkpoint's tensors by our names, in our layout. Both sides are {name: a function that reads the tensor}.
    ValueError where two of them have one name of ours."""
    back, ours, kept = {new: old for old, new in row.words.items()}, {}, {}
    plain = [name.removeprefix(row.prefix) for name in weights]
    if twice := sorted(name for name in set(plain) if plain.count(name) > 1):
        raise ValueError(f"the weights hold {twice[0]} twice, with {row.prefix!r} before it and without")

    def whole(name, read):
        tensor = read()
        if row.transposed and tensor.dim() == 2 and name.startswith("h."):
            tensor = tensor.T
        return by_rows(tensor, torch.Tensor.contiguous)

    def piece(name, read, rows, i):
        if name not in kept:  # the one that was read last waits for its other pieces
            kept.clear()
            kept[name] = whole(name, read)
        seen = (*kept[name].shape, 0)[0]
        if seen != sum(rows):
            raise ValueError(f"{name} has {seen} rows and the configuration asks for {sum(rows)}")
        return by_rows(kept[name], lambda tensor: tensor.split(rows)[i].contiguous())

    for name, read in weights.items():
        name = name.removeprefix(row.prefix)
        if name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue  # frequencies and causal masks, which old checkpoints carry along
        matrix = next((matrix for matrix in row.fused if f".{matrix}." in name), None)
        if matrix is None:
            ours[rename(name, back)] = partial(whole, name, read)
            continue
        rows = widths(config, row.fused[matrix])
        for i, part in enumerate(row.fused[matrix]):
            place = name.replace(matrix, f"{matrix.rpartition('.')[0]}.{part}".lstrip("."))
            ours[rename(place, back)] = partial(piece, name, read, rows, i)
    return ours


def by_rows(weight, change):
    """A matrix, or its Blocks, with its rows changed."""
    return Blocks(*map(change, weight)) if isinstance(weight, Blocks) else change(weight)


def to_hf(row, weights):
    """Our tensors by the checkpoint's names, in its layout."""
    theirs, done = {}, {part: (matrix, parts) for matrix, parts in row.fused.items() for part in parts}
    for name, tensor in weights.items():
        place, _, part = name.rpartition(".")[0].rpartition(".")
        kind = name.rpartition(".")[2]
        if part in done:
            matrix, parts = done[part]
            if part != parts[0]:
                continue
            tensor = torch.cat([weights[f"{place}.{each}.{kind}"] for each in parts])
            name = f"{place}.{matrix.rpartition('.')[2]}.{kind}"
        if row.transposed:
            tensor = tensor.T if tensor.dim() == 2 and name.startswith("layers.") else tensor
        prefix = "" if name.startswith("lm_head.") else row.prefix
        theirs[prefix + rename(name, row.words)] = tensor
    return theirs
