"""Rotary positions (Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864), and the ways to stretch them.

Each pair of features of a query or a key turns by its own frequency times the token's position, so that the product of
the two depends on their distance alone. A model that was trained on short texts is made to read long ones by turning
more slowly; the five classes below are the ways that checkpoints ask for, each under its name in config.json.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (eq. 34 of the paper).

    It holds numbers, not tensors: nothing to move between devices, and `.to(torch.bfloat16)` cannot round it.

    head_dim: d, even.  theta: the base of the geometric series of wavelengths.
    scaling:  None, or one of the classes in SCALINGS.
    """

    head_dim: int
    theta: float = 10000.0
    scaling: "Linear | Dynamic | YaRN | Llama3 | LongRoPE | None" = None

    def frequencies(self, device=None, length=0):
        """Radians per position of each pair of features, (d/2,) float32, in a text of so many tokens."""
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        if self.scaling is None:
            return 1.0 / self.theta**exponent
        return self.scaling.frequencies(self.theta, exponent, length)

    @property
    def attention_factor(self):
        """What queries and keys are multiplied by as they turn."""
        return getattr(self.scaling, "attention_factor", 1.0)

    def __call__(self, positions):
        """positions (T,) or (B, T) -> cos and sin, each (T, d) or (B, 1, T, d), float32."""
        length = positions.max() + 1 if positions.numel() else 0
        angle = positions[..., None].float() * self.frequencies(positions.device, length)  # (..., T, d/2)
        angle = torch.cat((angle, angle), dim=-1)  # (..., T, d)
        if positions.dim() == 2:
            angle = angle[:, None]  # one axis for the heads
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def rotate(x, cos, sin):
    """Turns feature i of each head with feature i + d/2, as in Hugging Face's checkpoints: (B, H, T, d) -> same."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


# ── longer texts ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Linear:
    """Every position divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def frequencies(self, theta, exponent, length):
        return 1.0 / theta**exponent / self.factor


@dataclass(frozen=True)
class Dynamic:
    """A theta that grows with the text once this is longer than the model was trained on ("dynamic NTK", section 3.3
    of Peng et al. 2023, https://arxiv.org/abs/2309.00071). What a cache holds keeps the angles it was turned by."""

    factor: float
    max_position_embeddings: int
    by_length: ClassVar = True

    def frequencies(self, theta, exponent, length):
        longer = torch.as_tensor(length, device=exponent.device).clamp(min=self.max_position_embeddings)
        grown = self.factor * longer / self.max_position_embeddings - (self.factor - 1)
        d = 2 * len(exponent)
        return 1.0 / (theta * grown ** (d / (d - 2))) ** exponent


@dataclass(frozen=True)
class YaRN:
    """Slow pairs are slowed by `factor`, fast ones kept, those between blended along their number, and what has turned
    is multiplied by `attention_factor` (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.4).

    beta_fast, beta_slow: how often the fastest and the slowest of those between turn in the original context.
    truncate: whether their numbers are rounded outwards to whole ones.
    """

    factor: float
    original_max_position_embeddings: float
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, theta, exponent, length):
        d = 2 * len(exponent)

        def pair(turns):  # the number of the pair that turns so often, not a whole one
            return d * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d - 1)
        slowed = (torch.arange(d // 2, device=exponent.device) - first) / ((last - first) or 0.001)
        slowed, frequency = slowed.clamp(0, 1), 1.0 / theta**exponent
        return frequency * (1 - slowed) + frequency / self.factor * slowed


@dataclass(frozen=True)
class Llama3:
    """Long waves are stretched by `factor`, short ones kept, those between blended along their frequency (Llama 3.1,
    Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def frequencies(self, theta, exponent, length):
        frequency, low, high = 1.0 / theta**exponent, self.low_freq_factor, self.high_freq_factor
        # how often each pair turns in the original context
        waves = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class LongRoPE:
    """Every pair slowed by a searched factor of its own, another one in texts longer than the original context (Ding et
    al. 2024, https://arxiv.org/abs/2402.13753; Phi-3). Text that grows past it turns another way from there on: what a
    cache holds by then keeps the old angles."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: float
    attention_factor: float
    by_length: ClassVar = True

    def frequencies(self, theta, exponent, length):
        short, long = (torch.tensor(each, device=exponent.device) for each in (self.short_factor, self.long_factor))
        is_long = torch.as_tensor(length, device=exponent.device) > self.original_max_position_embeddings
        return 1.0 / (torch.where(is_long, long, short) * theta**exponent)


SCALINGS = {"linear": Linear, "dynamic": Dynamic, "yarn": YaRN, "llama3": Llama3, "longrope": LongRoPE}
