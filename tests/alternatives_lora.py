"""Other right answers to lesson 06's exercises, written differently: each must pass."""

import torch
import torch.nn.functional as F
from torch import nn


def start_like_linear(in_features, out_features, rank):
    A, B = nn.Linear(in_features, rank, bias=False).weight, nn.Linear(rank, out_features, bias=False).weight
    return A.detach(), B.detach() * 0


def start_gaussian(in_features, out_features, rank):
    return torch.randn(rank, in_features) * (3 * in_features) ** -0.5, torch.zeros((out_features, rank))


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


def merge_in_double(linear, A, B, alpha):
    change = sum(torch.outer(b, a) for a, b in zip(A.double(), B.double().T)) * alpha / A.shape[0]
    return (linear.weight.double() + change).to(linear.weight.dtype)


def merge_addmm(linear, A, B, alpha):
    return torch.addmm(linear.weight.detach().float(), B, A, alpha=alpha / len(A)).to(linear.weight)


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


class WeightNeverTouched(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.base, self.alpha, self.merged = linear.requires_grad_(False), alpha, False
        self.A = nn.Parameter(torch.rand(rank, linear.in_features) - 0.5)
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
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
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


ALTERNATIVES = {
    "lora_start": [start_like_linear, start_gaussian],
    "lora_linear": [linear_einsum, linear_sum_over_rank, linear_whole_weight],
    "lora_merge": [merge_in_double, merge_addmm],
    "lora_merge_conv1d": [conv1d_transposed_twice, conv1d_factors_turned],
    "lora_fused": [fused_block_diag, fused_values_first],
    "lora_layer": [WeightNeverTouched, CopyOfTheBase],
}
