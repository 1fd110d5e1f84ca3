"""Right answers to lesson 01's exercises, written differently from the reference: the checker must pass every one."""

import math

import torch
import torch.nn.functional as F


def rms_norm_as_in_hugging_face(x, weight, eps):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_by_the_norm(x, weight, eps):
    x64 = x.double()
    size = torch.linalg.vector_norm(x64, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    return (x64 / (size + eps).sqrt() * weight.double()).to(x.dtype)


def rms_norm_token_by_token(x, weight, eps):
    rows = [
        row.float() / ((row.float() @ row.float()) / len(row) + eps) ** 0.5 * weight.float()
        for row in x.reshape(-1, x.shape[-1])
    ]
    return torch.stack(rows).reshape(x.shape).to(x.dtype)


def rope_complex(x, positions, theta):
    left, right = x.float().chunk(2, -1)
    angle = torch.outer(positions.float(), 1 / theta ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    z = torch.complex(left, right) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1).to(x.dtype)


def rope_pair_by_pair(x, positions, theta):
    d, out = x.shape[-1], torch.empty_like(x)
    for i in range(d // 2):
        angle = positions.double() * theta ** (-2 * i / d)
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., i].double(), x[..., i + d // 2].double()
        out[..., i], out[..., i + d // 2] = a * cos - b * sin, a * sin + b * cos
    return out


def rope_as_matrices(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[:, None] * torch.exp(-math.log(theta) * torch.arange(half) / half)  # (T, d/2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # (T, d/2, 2, 2)
    pairs = x.unflatten(-1, (2, half)).float()  # (B, H, T, 2, d/2)
    return torch.einsum("tiab,...tbi->...tai", turn, pairs).flatten(-2).to(x.dtype)


def attention_einsum(q, k, v):
    B, H, T, d = q.shape
    q = q.reshape(B, k.shape[1], -1, T, d)  # (B, G, H/G, T, d)
    scores = torch.einsum("bgitd,bgsd->bgits", q, k) / d**0.5
    scores = scores + torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    return torch.einsum("bgits,bgsd->bgitd", scores.softmax(-1), v).reshape(B, H, T, d)


def attention_head_by_head(q, k, v):
    heads, share = [], q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // share].transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), torch.finfo(q.dtype).min)
        heads.append(scores.softmax(-1) @ v[:, h // share])
    return torch.stack(heads, 1)


def attention_softmax_by_hand(q, k, v):
    k, v = (torch.repeat_interleave(z, q.shape[1] // z.shape[1], dim=1) for z in (k, v))
    weights = torch.exp(q.float() @ k.float().mT / q.shape[-1] ** 0.5).tril()
    return (weights / weights.sum(-1, keepdim=True) @ v.float()).to(q.dtype)


def attention_token_by_token(q, k, v):
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    rows = []
    for t in range(q.shape[2]):
        rows.append(F.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]))
    return torch.cat(rows, 2)


def swiglu_sigmoid(x, gate, up, down):
    z = F.linear(x, gate)
    return F.linear(z * torch.sigmoid(z) * F.linear(x, up), down)


def swiglu_fused(x, gate, up, down):
    z, linear = (x @ torch.cat((gate, up)).mT).chunk(2, -1)
    return torch.einsum("btf,df->btd", F.silu(z) * linear, down)


def swiglu_by_exponent(x, gate, up, down):
    z = x @ gate.T
    return (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T


def split_of_the_columns(weight, bias):
    D = len(weight)
    return torch.stack([weight[:, i * D : (i + 1) * D].T for i in range(3)]), bias.view(3, D)


def split_by_reshape(weight, bias):
    return weight.T.reshape(3, len(weight), len(weight)), bias.reshape(3, -1)


def split_as_lists(weight, bias):
    return [part.T for part in weight.split(len(weight), dim=1)], list(bias.chunk(3))


def cached_with_a_mask(attention, x, past):
    S, T = 0 if past is None else past[0].shape[-2], x.shape[1]
    q, k, v = attention.project(x, torch.arange(S, S + T))
    if past is not None:
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
    mask = torch.arange(S + T)[None, :] <= torch.arange(S, S + T)[:, None]
    return attention.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)), [k, v]


def cached_token_by_token(attention, x, past):
    out, k, v = [], *(past or (None, None))
    for token in x.split(1, dim=1):
        S = 0 if k is None else k.shape[2]
        q, new_k, new_v = attention.project(token, torch.tensor([S]))
        k, v = (new_k, new_v) if k is None else (torch.cat((k, new_k), 2), torch.cat((v, new_v), 2))
        out.append(attention.output(attention.attend(q, k, v)))
    return torch.cat(out, 1), (k, v)


def cached_by_scores(attention, x, past):
    S = past[0].shape[2] if past else 0
    q, k, v = attention.project(x, S + torch.arange(x.shape[1]))
    if past:
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v)))
    wide_k, wide_v = (z.repeat_interleave(attention.num_heads // attention.num_kv_heads, 1) for z in (k, v))
    scores = q @ wide_k.mT / attention.head_dim**0.5
    scores = scores.masked_fill(torch.ones_like(scores).triu(S + 1).bool(), -torch.inf)
    return attention.output(scores.softmax(-1) @ wide_v), (k, v)


ALTERNATIVES = {
    "rms_norm": [rms_norm_as_in_hugging_face, rms_norm_by_the_norm, rms_norm_token_by_token],
    "rope": [rope_complex, rope_pair_by_pair, rope_as_matrices],
    "grouped_query_attention": [
        attention_einsum,
        attention_head_by_head,
        attention_softmax_by_hand,
        attention_token_by_token,
    ],
    "swiglu": [swiglu_sigmoid, swiglu_fused, swiglu_by_exponent],
    "split_fused": [split_of_the_columns, split_by_reshape, split_as_lists],
    "cached_attention": [cached_with_a_mask, cached_token_by_token, cached_by_scores],
}
