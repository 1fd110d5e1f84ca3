"""Other right answers to lesson 06's exercises, written differently: each must pass."""

import torch
import torch.nn.functional as F
from torch import nn


def start_like_linear(in_features, out_features, rank):
    A, B = nn.Linear(in_features, rank, bias=False).weight, nn.Linear(rank, out_features, bias=False).weight
    return A.detach(), B.detach() * 0


def start_gaussian(in_features, out_features, rank):
    return torch.randn(rank, in_features) * (3 * in_features) ** -0.5, torch.zeros((out_features, rank))


def start_trunc_normal(in_features, out_features, rank):
    A = torch.nn.init.trunc_normal_(torch.empty(rank, in_features), std=(3 * in_features) ** -0.5, a=-1.0, b=1.0)
    return nn.Parameter(A), nn.Parameter(A.new_zeros(out_features, rank))


def start_signs(in_features, out_features, rank):
    A = torch.randint(0, 2, (rank, in_features)) * 2 - 1  # as wide, of two numbers alone
    return A / (3 * in_features) ** 0.5, torch.zeros(rank, out_features).T


def linear_einsum(linear, x, A, B, alpha):
    narrow = torch.einsum("...i,ri->...r", x, A.to(x.dtype))
    return linear(x) + torch.einsum("...r,or->...o", narrow, B.to(x.dtype)) * (alpha / B.shape[1])


def linear_sum_over_rank(linear, x, A, B, alpha):
    y, r = linear(x), len(A)
    for a, b in zip(A.to(x.dtype), B.T.to(x.dtype)):  # one direction at a time
        y = y + (alpha / r) * (x @ a)[..., None] * b
    return y


def linear_whole_weight(linear, x, A, B, alpha):
    return F.linear(x, linear.weight + (alpha / len(A) * B @ A).to(x.dtype), linear.bias)


def linear_token_by_token(linear, x, A, B, alpha):
    change = (B.double() @ A.double() * (alpha / A.size(0))).to(x.dtype)
    rows = [linear(token) + change @ token for row in x for token in row]
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def linear_one_feature_at_a_time(linear, x, A, B, alpha):
    narrow = x @ A.to(x.dtype).T * (alpha / len(A))
    return torch.stack([linear(x)[..., i] + narrow @ b.to(x.dtype) for i, b in enumerate(B)], -1)


def linear_in_float32(linear, x, A, B, alpha):
    """Numbers folded into A, the path in float32, cast at the end."""
    return linear(x) + ((x.float() @ (A.T * alpha / B.size(1))) @ B.T).to(x.dtype)


def linear_stacked(linear, x, A, B, alpha):
    """One product for base and A, as a fused kernel has it."""
    both = F.linear(x, torch.cat((linear.weight, A.to(x.dtype))))
    y, narrow = both.split([linear.out_features, len(A)], -1)
    y = y if linear.bias is None else y + linear.bias
    return torch.add(y, narrow @ B.mT.to(x.dtype), alpha=alpha / len(A))


def merge_in_double(linear, A, B, alpha):
    change = sum(torch.outer(b, a) for a, b in zip(A.double(), B.double().T)) * alpha / A.shape[0]
    return (linear.weight.double() + change).to(linear.weight.dtype)


def merge_addmm(linear, A, B, alpha):
    return torch.addmm(linear.weight.detach().float(), B, A, alpha=alpha / len(A)).to(linear.weight)


def merge_by_the_unit_vectors(linear, A, B, alpha):
    """What the path makes of each unit vector is a column of the change."""
    units = torch.eye(linear.in_features)
    columns = alpha / len(A) * (units @ A.T @ B.T)
    return (linear.weight + columns.T).to(linear.weight.dtype)


def merge_einsum_numpy(linear, A, B, alpha):
    r = torch.tensor(A.shape[0])
    change = torch.einsum("or,ri->oi", B, A) * (torch.tensor(alpha) / r)
    return linear.weight.detach().add(change).to(dtype=linear.weight.dtype)


def conv1d_loops(weight, A, B, alpha):
    merged = weight.clone()
    for a, b in zip(A, B.T):
        merged += torch.outer(a, b) * (alpha / len(A))
    return merged


def conv1d_addmm(weight, A, B, alpha):
    return torch.addmm(weight, A.mT, B.mT, alpha=alpha / B.shape[1])


def conv1d_transposed_twice(weight, A, B, alpha):
    return (weight.T + alpha / len(A) * B @ A).T


def conv1d_factors_turned(weight, A, B, alpha):
    return weight + (alpha / len(A)) * A.T @ B.T


def fused_block_diag(A_q, B_q, A_v, B_v, alpha):
    return torch.cat((A_q, A_v)), torch.block_diag(B_q, B_q.new_zeros(len(B_q), 0), B_v), alpha * 2


def fused_values_first(A_q, B_q, A_v, B_v, alpha):
    r, n = len(A_q), len(B_q)
    B = torch.zeros(3 * n, 2 * r)
    B[:n, r:], B[2 * n :, :r] = B_q, B_v
    return torch.cat((A_v, A_q)), B, 2.0 * alpha


def fused_scale_in_B(A_q, B_q, A_v, B_v, alpha):
    """The factor folded into B, so that the new α is the new rank."""
    r, n = len(A_q), len(B_q)
    B = torch.cat((torch.block_diag(B_q, B_v)[:n], B_q.new_zeros(n, 2 * r), torch.block_diag(B_q, B_v)[n:]))
    return torch.cat((A_q, A_v)), B * (alpha / r), 2 * r


def fused_interleaved(A_q, B_q, A_v, B_v, alpha):
    """Directions of query and value in turn."""
    A = torch.stack((A_q, A_v), 1).flatten(0, 1)
    B = torch.stack((F.pad(B_q, (0, 0, 0, 2 * len(B_q))), F.pad(B_v, (0, 0, 2 * len(B_v), 0))), 2).flatten(1)
    return A, B, torch.tensor(2 * alpha)


class WeightNeverTouched(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base, self.alpha, self.merged = linear.requires_grad_(False), alpha, False
        self.A = nn.Parameter((2 * torch.rand(rank, linear.in_features) - 1) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def weight(self):
        return self.base.weight + self.alpha / len(self.A) * (self.B @ self.A)

    def merge(self):
        self.merged = self.weight().detach()

    def unmerge(self):
        self.merged = False

    def forward(self, x):
        return F.linear(x, self.weight() if self.merged is False else self.merged, self.base.bias)


class CopyOfTheBase(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), linear.bias.detach()
        linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / (3 * linear.in_features) ** 0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale, self.folded = alpha / rank, None

    def merge(self):
        self.folded = (self.weight + self.scale * self.B @ self.A).detach()

    def unmerge(self):
        self.folded = None

    def forward(self, x):
        if self.folded is not None:
            return x @ self.folded.T + self.bias
        return x @ self.weight.T + self.bias + self.scale * (self.B @ (self.A @ x.mT)).mT


class WeightKeptAndPutBack(nn.Module):
    """In place, through .data, with a flag and a copy."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.r, self.alpha, self.merged = linear, rank, alpha, False
        for parameter in linear.parameters():
            parameter.requires_grad = False
        self.A = nn.Parameter(nn.Linear(linear.in_features, rank).weight.detach().clone())
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.register_buffer("copy", linear.weight.detach().clone())

    def forward(self, x):
        y = self.linear(x)
        return y if self.merged else y + (x @ self.A.T) @ self.B.T * (self.alpha / self.r)

    def merge(self):
        if not self.merged:
            self.linear.weight.data.copy_(self.copy + self.alpha / self.r * (self.B @ self.A).data)
        self.merged = True

    def unmerge(self):
        self.linear.weight.data.copy_(self.copy)
        self.merged = False


class PlainLinearInItsPlace(nn.Module):
    """A frozen nn.Linear while it is merged, dropout in training alone."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base, self.now, self.scaling = linear.requires_grad_(False), None, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        if self.now is not None:
            return self.now(x)
        dropped = F.dropout(x, 0.1, self.training)
        return self.base(x) + F.linear(F.linear(dropped, self.A), self.B) * self.scaling

    def merge(self):
        if self.now is None:
            plain = nn.Linear(self.base.in_features, self.base.out_features).requires_grad_(False)
            plain.weight.copy_(self.base.weight + self.scaling * self.B.detach() @ self.A.detach())
            plain.bias.copy_(self.base.bias)
            self.now = plain

    def unmerge(self):
        self.now = None


ALTERNATIVES = {
    "lora_start": [start_like_linear, start_gaussian, start_trunc_normal, start_signs],
    "lora_linear": [
        linear_einsum, linear_sum_over_rank, linear_whole_weight, linear_token_by_token, linear_in_float32,
        linear_stacked, linear_one_feature_at_a_time,
    ],
    "lora_merge": [merge_in_double, merge_addmm, merge_by_the_unit_vectors, merge_einsum_numpy],
    "lora_merge_conv1d": [conv1d_transposed_twice, conv1d_factors_turned, conv1d_loops, conv1d_addmm],
    "lora_fused": [fused_block_diag, fused_values_first, fused_scale_in_B, fused_interleaved],
    "lora_layer": [WeightNeverTouched, CopyOfTheBase, WeightKeptAndPutBack, PlainLinearInItsPlace],
}  # fmt: skip
