"""Tells one base from another, and does not tell the same base in float32 from that in bfloat16 or float16: 8 hex
digits for all names and shapes, then 8 for each tensor, in order of their names.

A tensor's are the logarithm of its norm, and its projection on a fixed pattern of ±1 over the norm, both rounded:
every weight counts, and the rounding of a dtype moves them by less than the four steps that `same_base` allows (seven
standard deviations, in bfloat16).
"""

import functools
import hashlib
import math

import torch

BLOCK = 2**20
STEP = 2.0**-8  # to which the numbers are rounded


@functools.cache
def signs():
    return torch.randint(0, 2, (BLOCK,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).float()


def of_tensor(tensor):
    """(shape, 8 hex digits)"""
    along, square, pattern = 0.0, 0.0, signs().to(tensor.device)
    for i, part in enumerate(tensor.detach().flatten().split(BLOCK)):
        part = part.float()
        along += signs()[i % BLOCK].item() * (part @ pattern[: len(part)]).item()  # another sign for each block
        square += (part @ part).item()
    norm = square**0.5
    numbers = (math.log2(norm), along / norm) if 0 < norm < math.inf else (0.0, 0.0)
    rounded = (max(-0x7FFF, min(0x7FFF, round(number / STEP))) for number in numbers)
    return tuple(tensor.shape), "".join(f"{number & 0xFFFF:04x}" for number in rounded)


def of_base(tensors):
    """The fingerprint of {name in the bare base: what of_tensor says}."""
    named = sorted(tensors.items())
    shapes = "".join(f"{name} {shape}" for name, (shape, _) in named)
    return hashlib.sha256(shapes.encode()).hexdigest()[:8] + "".join(digits for _, (_, digits) in named)


def same_base(one, other):
    """Whether two fingerprints are of one base, in whatever dtypes."""
    if len(one) != len(other) or one[:8] != other[:8] or not set(one + other) <= set("0123456789abcdef"):
        return False
    steps = [[int(text[i : i + 4], 16) for i in range(8, len(text), 4)] for text in (one, other)]
    return all((a - b + 4) & 0xFFFF <= 8 for a, b in zip(*steps))  # at most 4 apart
