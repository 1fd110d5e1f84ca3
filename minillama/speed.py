"""What is here for speed and memory alone: layers compiled, and the frozen matrices of a base in fewer bits.

    quantize(model, "8bit")     blocks of 32 numbers, 8 bits each and a scale, as GGUF's Q8_0
    quantize(model, "4bit")     the same with 4 bits each, as GGUF's Q4_0
    quantize(model, "float8")   8-bit floats and a scale a row, multiplied as they are by cards that can

The matrices are frozen, so they need no gradients of their own: forward they are made whole, one at a time, multiplied
and forgotten, and once more for the backward pass (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314).
Adapters stand on top as on any base, in float32; closed, the model is the quantised base bit for bit.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 32  # numbers that share a scale
CHUNK = 2**18  # numbers that are rounded at once
LARGEST_FLOAT8 = 448.0  # of torch.float8_e4m3fn
HOW = ("8bit", "4bit", "float8")


def compile_layers(model):
    """Compiles each layer of a model, in place; one compilation serves all layers of a kind, for each length."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # beyond it: silently plain
    for layer in model.layers:
        layer.compile(dynamic=False)


class Product(torch.autograd.Function):
    """x Wᵀ with W made whole when it is needed, and kept neither for the backward pass nor afterwards."""

    @staticmethod
    def forward(context, x, linear):
        context.linear = linear
        return F.linear(x, linear.whole(x.dtype))

    @staticmethod
    def backward(context, gradient):
        return gradient @ context.linear.whole(gradient.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer in fewer bits. Its numbers are kept as integers, which `.to(dtype)` leaves as they are."""

    def __init__(self, linear, **numbers):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name, tensor in numbers.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.train(linear.training)

    @property
    def weight(self):
        """The matrix that this amounts to, (out_features, in_features)."""
        return self.whole(torch.float32)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        y = Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Blocks(NamedTuple):
    """A matrix (out, in) in blocks, as BlockLinear keeps it and a .gguf file has it; scales are float16."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self):
        return torch.Size((len(self.scales), BLOCK * self.scales.shape[1]))


class BlockLinear(QuantizedLinear):
    """Rows in blocks of 32 numbers with a float16 scale each: w ≈ scale · code (llama.cpp's Q8_0 and Q4_0). codes are
    (out, in / 32, 32) int8, or (out, in / 32, 16) uint8, two in a byte; scales (out, in / 32, 1)."""

    def __init__(self, linear, bits, device):
        places, kind = (linear.out_features, linear.in_features // BLOCK), torch.int8 if bits == 8 else torch.uint8
        codes = torch.empty(*places, BLOCK * bits // 8, dtype=kind, device=device)
        super().__init__(linear, codes=codes, scales=torch.empty(*places, 1, dtype=torch.int16, device=device))

    def fill(self, weight):
        """Takes Blocks as they are, and a matrix (out, in) rounded, some rows at a time."""
        scales = self.scales.view(torch.float16)
        if isinstance(weight, Blocks):
            return self.codes.copy_(weight.codes), scales.copy_(weight.scales)
        step = max(1, CHUNK // self.in_features)
        for rows, *mine in zip(*(part.split(step) for part in (weight, self.codes, scales))):
            for place, new in zip(mine, self.rounded(rows.to(scales.device, torch.float32))):
                place.copy_(new)

    def rounded(self, rows):
        """(codes, scales) of rows (…, in), as llama.cpp rounds them."""
        blocks, whole = rows.unflatten(1, (-1, BLOCK)), self.codes.dtype == torch.int8
        if whole:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
        else:  # the number that is farthest from 0 becomes -8
            scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        blocks = blocks * torch.where(scale == 0, 0, 1 / scale)
        if whole:
            return blocks.round(), scale
        codes = (blocks + 8.5).clamp(0, 15).to(torch.uint8)  # the fraction is cut off
        return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4, scale

    def whole(self, dtype):
        """The matrix, (out_features, in_features)."""
        codes = self.codes
        if codes.dtype == torch.uint8:  # two in a byte
            codes = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.int8) - 8
        return (codes.to(dtype) * self.scales.view(torch.float16).to(dtype)).flatten(1)


def float8_rows(x):
    """(x in 8-bit floats, its scales): x ≈ scale · float8, one scale for each row of x (N, D)."""
    scale = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float().clamp(min=1e-30) / LARGEST_FLOAT8
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@torch.library.custom_op("minillama::float8_product", mutates_args=())
def float8_product(
    x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, row_scales: torch.Tensor,
    columns: torch.Tensor, column_scales: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x (N, D), rounded to scales · numbers, times the rows of a matrix (M, D) in 8-bit floats: (N, M). x itself is
    here for its gradient, which is the same product with the matrix's columns. An operation of its own, since a
    compiler may lay numbers out column by column, and multiply something else without a word."""
    ours, theirs = numbers.contiguous(), rows.view(torch.float8_e4m3fn).t()
    by = scales.contiguous(), row_scales.view(torch.float32).t()
    return torch._scaled_mm(ours, theirs, *by, out_dtype=torch.bfloat16, use_fast_accum=True).to(x.dtype)  # fmt: skip


@float8_product.register_fake
def _(x, numbers, scales, rows, row_scales, columns, column_scales):
    return x.new_empty(len(x), len(rows))


def _keep(ctx, inputs, output):  # torch calls it by these names
    ctx.save_for_backward(*inputs[3:])


def _backward(ctx, gradient):
    rows, row_scales, columns, column_scales = ctx.saved_tensors
    matrix = (columns, column_scales, rows, row_scales)
    return float8_product(gradient, *float8_rows(gradient), *matrix), None, None, None, None, None, None


float8_product.register_autograd(_backward, setup_context=_keep)


class Float8Linear(QuantizedLinear):
    """Rows as 8-bit floats with a scale each; and columns likewise, since the gradient multiplies by those."""

    def __init__(self, linear, device):
        new, sides = partial(torch.empty, device=device), (linear.out_features, linear.in_features)
        rows, columns = new(sides, dtype=torch.uint8), new(sides[::-1], dtype=torch.uint8)
        row_scales, column_scales = (new(side, 1, dtype=torch.int32) for side in sides)
        super().__init__(linear, rows=rows, row_scales=row_scales, columns=columns, column_scales=column_scales)

    def fill(self, weight):
        """Takes a matrix (out, in), rounded."""
        weight = weight.to(self.rows.device)
        for name, matrix in (("row", weight), ("column", weight.t().contiguous())):
            codes, scale = float8_rows(matrix)
            getattr(self, f"{name}s").copy_(codes.view(torch.uint8))
            getattr(self, f"{name}_scales").copy_(scale.view(torch.int32))

    def whole(self, dtype):
        return self.rows.view(torch.float8_e4m3fn).to(dtype) * self.row_scales.view(torch.float32).to(dtype)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        matrix = (self.rows, self.row_scales, self.columns, self.column_scales)
        flat = x.flatten(0, -2)
        y = float8_product(flat, *float8_rows(flat.detach()), *matrix).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


def multiplies_float8(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def refuse_bits(how, device):
    """Raises ValueError for an unknown `how`, and for float8 where no card multiplies it."""
    if how not in HOW:
        raise ValueError(f"quantize is {how!r}; it can be {', '.join(HOW)}")
    if how == "float8" and not multiplies_float8(device):
        raise ValueError(
            f"float8 is multiplied by NVIDIA cards from Ada and Hopper on, and this is {device}: take 8bit or 4bit"
        )


def emptied(model, how, device):
    """Puts layers of fewer bits, yet to be filled, in the place of model.layers' linear ones, and gives each pair as it
    does. One stays whose rows are no multiple of 32 long (float8: with a side that is no multiple of 16)."""
    for module in list(model.layers.modules()):
        for name, linear in list(module.named_children()):
            sides = (linear.in_features, linear.out_features) if type(linear) is nn.Linear else ()
            if sides and (sides[0] % BLOCK == 0 if how != "float8" else sides[0] % 16 == sides[1] % 16 == 0):
                new = Float8Linear(linear, device) if how == "float8" else BlockLinear(linear, int(how[0]), device)
                setattr(module, name, new)
                yield linear, new


@torch.no_grad()
def quantize(model, how):
    """Puts the linear layers of model.layers into fewer bits, in place, and returns the model. The embedding, the norms
    and the head stay as they are. `load(name, quantize=how)` does it matrix by matrix as they come from the file.

    Raises ValueError for an adapted model, for an unknown `how`, and for float8 where no card multiplies it.
    """
    refuse_bits(how, device := next(model.parameters()).device)
    if getattr(model, "adapters", None):
        raise ValueError("the model is adapted already: quantise the base first, adapters stand on top of it")
    for linear, new in emptied(model, how, device):
        new.fill(linear.weight)
    return model
