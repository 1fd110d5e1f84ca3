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


def rms_norm_folded(x, weight, eps):
    """Everything by which x is multiplied, in one factor; the root over the sum and √D."""
    D = x.size(-1)
    factor = (
        math.sqrt(D) * weight.float() / torch.sqrt(torch.sum(x.float() * x.float(), dim=-1, keepdim=True) + D * eps)
    )
    return (x.float() * factor).type_as(x)


def rms_norm_einsum(x, weight, eps):
    z = x.to(torch.float64)
    power = torch.einsum("...d,...d->...", z, z).div(weight.numel()).add(eps).pow(-0.5)
    return torch.einsum("...d,...,d->...d", z, power, weight.to(z.dtype)).to(x.dtype)


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


def rope_position_by_position(x, positions, theta):
    half, rows = x.shape[-1] // 2, []
    speed = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    for t, position in enumerate(positions.tolist()):
        cos, sin = torch.cos(position * speed).repeat(2), torch.sin(position * speed).repeat(2)
        token = x[:, :, t].double()
        partner = torch.cat((-token[..., half:], token[..., :half]), -1)
        rows.append((token * cos + partner * sin).to(x.dtype))
    return torch.stack(rows, dim=2)


def rope_in_place_of_a_copy(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions.float().unsqueeze(-1) / theta ** (2 * torch.arange(half) / x.shape[-1])
    rotated = x.clone()
    rotated[..., :half] = x[..., :half] * angle.cos().to(x.dtype) - x[..., half:] * angle.sin().to(x.dtype)
    rotated[..., half:] = x[..., half:] * angle.cos().to(x.dtype) + x[..., :half] * angle.sin().to(x.dtype)
    return rotated


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
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1]) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, : t + 1]))
    return torch.stack(rows, 2)


def attention_with_an_added_mask(q, k, v):
    B, H, T, d = q.shape
    groups = torch.arange(H) // (H // k.shape[1])  # the key head of each query head
    mask = torch.zeros(T, T, dtype=q.dtype).masked_fill(torch.arange(T)[None] > torch.arange(T)[:, None], float("-inf"))
    scores = (q * (1 / math.sqrt(d))) @ k[:, groups].transpose(-2, -1) + mask
    return F.softmax(scores.float(), dim=-1).to(q.dtype) @ v[:, groups]


def swiglu_sigmoid(x, gate, up, down):
    z = F.linear(x, gate)
    return F.linear(z * torch.sigmoid(z) * F.linear(x, up), down)


def swiglu_fused(x, gate, up, down):
    z, linear = (x @ torch.cat((gate, up)).mT).chunk(2, -1)
    return torch.einsum("btf,df->btd", F.silu(z) * linear, down)


def swiglu_by_exponent(x, gate, up, down):
    z = x @ gate.T
    return (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T


def swiglu_token_by_token(x, gate, up, down):
    rows = [down @ (F.silu(gate @ token) * (up @ token)) for token in x.flatten(0, 1)]
    return torch.stack(rows).view_as(x)


def swiglu_einsum(x, gate, up, down):
    z = torch.einsum("btd,fd->btf", x, gate)
    return torch.einsum("btf,btf,df->btd", z.sigmoid() * z, torch.einsum("btd,fd->btf", x, up), down)


def split_of_the_columns(weight, bias):
    D = len(weight)
    return torch.stack([weight[:, i * D : (i + 1) * D].T for i in range(3)]), bias.view(3, D)


def split_by_reshape(weight, bias):
    return weight.T.reshape(3, len(weight), len(weight)), bias.reshape(3, -1)


def split_as_a_list(weight, bias):
    return [torch.stack([part.T for part in weight.split(len(weight), dim=1)]), torch.stack(list(bias.chunk(3)))]


def split_by_hand(weight, bias):
    D = weight.shape[0]
    q, k, v = weight[:, :D], weight[:, D : 2 * D], weight[:, 2 * D :]
    matrices, biases = weight.new_empty(3, D, D), bias.new_zeros(3, D)
    for i, part in enumerate((q, k, v)):
        matrices[i], biases[i] = part.transpose(0, 1), bias[i * D : (i + 1) * D]
    return matrices, biases


def split_einsum(weight, bias):
    D = len(weight)
    return torch.einsum("inj->nji", weight.view(D, 3, D)), torch.einsum("nj->nj", bias.view(3, D))


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
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # one token sees all that is there
        out.append(attention.output(y))
    return torch.cat(out, 1), (k, v)


def cached_einsum(attention, x, past):
    B, T, _ = x.shape
    old_k, old_v = past or 2 * (torch.zeros(B, attention.num_kv_heads, 0, attention.head_dim, dtype=x.dtype),)
    S = old_k.shape[2]
    q, k, v = attention.project(x, torch.arange(S, S + T))
    k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
    q = q.unflatten(1, (attention.num_kv_heads, -1))  # (B, G, H/G, T, d)
    new_k = torch.cat((old_k, attention.project(x, torch.arange(S, S + T))[1]), 2)
    scores = torch.einsum("bgitd,bgsd->bgits", q, new_k) / math.sqrt(attention.head_dim)
    allowed = torch.ones(T, S + T, dtype=torch.bool).tril(S)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return attention.output(torch.einsum("bgits,bgsd->bgitd", weights, v).flatten(1, 2)), [k, v]


def cached_by_scores(attention, x, past):
    S = past[0].shape[2] if past else 0
    q, k, v = attention.project(x, S + torch.arange(x.shape[1]))
    if past:
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v)))
    wide_k, wide_v = (z.repeat_interleave(attention.num_heads // attention.num_kv_heads, 1) for z in (k, v))
    scores = q @ wide_k.mT / attention.head_dim**0.5
    scores = scores.masked_fill(torch.ones_like(scores).triu(S + 1).bool(), -torch.inf)
    return attention.output(scores.softmax(-1) @ wide_v), (k, v)


def labels_by_clone(prompt_ids, answer_ids):
    ids = torch.tensor([*prompt_ids, *answer_ids], dtype=torch.int64)
    labels = ids.clone()
    labels[: len(prompt_ids)] = -100
    return ids, labels


def labels_by_where(prompt_ids, answer_ids):
    ids = torch.cat((torch.as_tensor(prompt_ids), torch.as_tensor(answer_ids)))
    return ids, torch.where(torch.arange(len(ids)) < len(prompt_ids), -100, ids)


def labels_filled(prompt_ids, answer_ids):
    P, T = len(prompt_ids), len(prompt_ids) + len(answer_ids)
    ids, labels = torch.zeros(T, dtype=torch.long), torch.full((T,), -100)
    for i, token in enumerate(prompt_ids + answer_ids):
        ids[i] = token
        if i >= P:
            labels[i] = token
    return [ids, labels]


ALTERNATIVES = {
    "rms_norm": [
        rms_norm_as_in_hugging_face, rms_norm_by_the_norm, rms_norm_token_by_token, rms_norm_folded, rms_norm_einsum,
    ],
    "rope": [rope_complex, rope_pair_by_pair, rope_as_matrices, rope_position_by_position, rope_in_place_of_a_copy],
    "grouped_query_attention": [
        attention_einsum, attention_head_by_head, attention_softmax_by_hand, attention_token_by_token,
        attention_with_an_added_mask,
    ],
    "swiglu": [swiglu_sigmoid, swiglu_fused, swiglu_by_exponent, swiglu_token_by_token, swiglu_einsum],
    "split_fused": [split_of_the_columns, split_by_reshape, split_as_a_list, split_by_hand, split_einsum],
    "cached_attention": [cached_with_a_mask, cached_token_by_token, cached_by_scores, cached_einsum],
    "answer_labels": [labels_by_clone, labels_by_where, labels_filled],
}  # fmt: skip
