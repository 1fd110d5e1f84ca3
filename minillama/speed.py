"""What is here for speed and memory alone: layers compiled, and the frozen matrices of a base in fewer bits.

    quantize(model, "8bit")     blocks of 32 numbers, 8 bits each and a scale, as GGUF's Q8_0
    quantize(model, "4bit")     the same with 4 bits each, as GGUF's Q4_0
    quantize(model, "float8")   8-bit floats and a scale a row, multiplied as they are by cards that can

The matrices are frozen, so they need no gradients of their own: forward they are made whole, one at a time, multiplied
and forgotten, and once more for the backward pass (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314).
Adapters stand on top as on any base, in float32; closed, the model is the quantised base bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 32  # numbers that share a scale
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

    @property
    def weight(self):
        """The matrix that this amounts to, (out_features, in_features)."""
        return self.whole(torch.float32)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        y = Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class BlockLinear(QuantizedLinear):
    """Rows in blocks of 32 numbers with a float16 scale each: w ≈ scale · code (llama.cpp's Q8_0 and Q4_0)."""

    def __init__(self, linear, bits):
        blocks = linear.weight.detach().float().unflatten(1, (-1, BLOCK))  # (out, in / 32, 32)
        if bits == 8:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
        else:  # the number that is farthest from 0 becomes -8
            scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        inverse = torch.where(scale == 0, 0, 1 / scale)
        if bits == 8:
            codes = (blocks * inverse).round().to(torch.int8)
        else:
            codes = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8)  # the fraction is cut off
            codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
        super().__init__(linear, codes=codes, scales=scale.to(torch.float16).view(torch.int16))

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
    x: torch.Tensor,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    columns: torch.Tensor,
    column_scales: torch.Tensor,
) -> torch.Tensor:
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

    def __init__(self, linear):
        numbers, weight = {}, linear.weight.detach()
        for name, matrix in (("row", weight), ("column", weight.t().contiguous())):
            codes, scale = float8_rows(matrix)
            numbers |= {f"{name}s": codes.view(torch.uint8), f"{name}_scales": scale.view(torch.int32)}
        super().__init__(linear, **numbers)

    def whole(self, dtype):
        rows = self.rows.view(torch.float8_e4m3fn).to(dtype)
        return rows * self.row_scales.view(torch.float32).to(dtype)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        matrix = (self.rows, self.row_scales, self.columns, self.column_scales)
        flat = x.flatten(0, -2)
        y = float8_product(flat, *float8_rows(flat.detach()), *matrix).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


def multiplies_float8(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@torch.no_grad()
def quantize(model, how):
    """Puts the linear layers of model.layers into fewer bits, in place, and returns the model. The embedding, the norms
    and the head stay as they are, and so does a matrix whose rows are no multiple of 32 long (float8: one of whose
    sides is no multiple of 16).

    Raises ValueError for an adapted model, for an unknown `how`, and for float8 where no card multiplies it.
    """
    if how not in HOW:
        raise ValueError(f"quantize is {how!r}; it can be {', '.join(HOW)}")
    if getattr(model, "adapters", None):
        raise ValueError("the model is adapted already: quantise the base first, adapters stand on top of it")
    device = next(model.parameters()).device
    if how == "float8" and not multiplies_float8(device):
        raise ValueError(
            f"float8 is multiplied by NVIDIA cards from Ada and Hopper on, and this is {device}: take 8bit or 4bit"
        )
    for module in list(model.layers.modules()):
        for name, linear in list(module.named_children()):
            sides = (linear.in_features, linear.out_features) if type(linear) is nn.Linear else ()
            if sides and (sides[0] % BLOCK == 0 if how != "float8" else sides[0] % 16 == sides[1] % 16 == 0):
                small = Float8Linear(linear) if how == "float8" else BlockLinear(linear, int(how[0]))
                setattr(module, name, small.train(linear.training))
    return model
