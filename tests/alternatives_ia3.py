"""Right answers to lesson 04's exercises, written differently from the reference: the checker must pass every one."""

import copy

import torch
import torch.nn.functional as F

from minillama.adapters.ia3 import IA3Linear, attach
from minillama.attention import rotate


def linear_by_einsum(linear, x, scale, side):
    scale = scale.to(x.dtype)
    if side == "output":
        return torch.einsum("bto,o->bto", linear(x), scale)
    return torch.einsum("oi,i,bti->bto", linear.weight, scale, x) + linear.bias


def linear_by_diagonal(linear, x, scale, side):
    scale = torch.diag(scale.to(x.dtype))
    return linear(x) @ scale if side == "output" else linear(x @ scale)


def linear_by_folding(linear, x, scale, side):
    scale = scale.to(x.dtype)
    if side == "output":
        return F.linear(x, linear.weight * scale[:, None], linear.bias * scale)
    return F.linear(x, linear.weight * scale, linear.bias)


def start_from_the_weight(linear, side):
    return torch.ones_like(linear.weight[:, 0] if side == "output" else linear.weight[0], dtype=torch.float32)


def start_as_a_parameter(linear, side):
    return torch.nn.Parameter(torch.full((linear.weight.shape[0 if side == "output" else 1],), 1.0))


def start_by_exponential(linear, side):
    return torch.zeros(linear.out_features if side == "output" else linear.in_features).exp()


def merge_by_diagonal(linear, scale, side):
    if side == "output":
        return torch.diag(scale) @ linear.weight, scale * linear.bias
    return linear.weight @ torch.diag(scale), linear.bias.clone()


def merge_by_asking(linear, scale, side):
    """What the layer does to 0 is the bias, what it does to each unit vector is a column."""
    run = lambda x: linear(x) * scale if side == "output" else linear(x * scale)  # noqa: E731
    bias = run(torch.zeros(linear.in_features))
    return (run(torch.eye(linear.in_features)) - bias).T, bias


def merge_row_by_row(linear, scale, side):
    if side == "output":
        weight = torch.stack([row * number for row, number in zip(linear.weight, scale)])
        return weight, torch.stack([b * number for b, number in zip(linear.bias, scale)])
    return torch.stack([row * scale for row in linear.weight]), linear.bias.clone()


def layer_by_hand(layer, x, positions, l_k, l_v, l_ff):
    l_k, l_v, l_ff = (vector.to(x.dtype) for vector in (l_k, l_v, l_ff))
    attention, mlp = layer.self_attn, layer.mlp
    h = layer.input_layernorm(x)
    q, k, v = (attention.heads(z) for z in (attention.q_proj(h), l_k * attention.k_proj(h), l_v * attention.v_proj(h)))
    cos, sin = attention.rope(positions)
    x = x + attention.output(attention.attend(rotate(q, cos, sin), rotate(k, cos, sin), v))
    h = layer.post_attention_layernorm(x)
    return x + mlp.down_proj(l_ff * F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def layer_values_behind_the_softmax(layer, x, positions, l_k, l_v, l_ff):
    """l_v multiplies each head's output, since the softmax mixes tokens and no features;
    l_ff sits on the linear branch."""
    l_k, l_v, l_ff = (vector.to(x.dtype) for vector in (l_k, l_v, l_ff))
    attention, mlp = layer.self_attn, layer.mlp
    h = layer.input_layernorm(x)
    q, _, v = attention.project(h, positions)
    k = rotate(attention.heads(attention.k_proj(h) * l_k), *attention.rope(positions))
    y = attention.attend(q, k, v)  # (B, H, T, d)
    group = attention.num_heads // attention.num_kv_heads
    of_heads = l_v.view(attention.num_kv_heads, 1, -1).repeat_interleave(group, 0)
    x = x + attention.output(y * of_heads)
    h = layer.post_attention_layernorm(x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * (mlp.up_proj(h) * l_ff))


def layer_head_by_head(layer, x, positions, l_k, l_v, l_ff):
    attention, d = layer.self_attn, layer.self_attn.head_dim
    h, turn = layer.input_layernorm(x), attention.rope(positions)
    q, k, v = attention.q_proj(h), attention.k_proj(h) * l_k.type_as(x), attention.v_proj(h) * l_v.type_as(x)
    future, heads = torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), []
    for head in range(attention.num_heads):
        own, shared = slice(head * d, head * d + d), head // (attention.num_heads // attention.num_kv_heads)
        shared = slice(shared * d, shared * d + d)
        scores = rotate(q[..., own], *turn) @ rotate(k[..., shared], *turn).mT / d**0.5
        scores = scores.masked_fill(future, -torch.inf)
        heads.append(scores.float().softmax(-1).to(x.dtype) @ v[..., shared])
    x = x + attention.o_proj(torch.cat(heads, -1))
    h = layer.post_attention_layernorm(x)
    hidden = F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)
    return x + layer.mlp.down_proj(hidden * l_ff.type_as(x))


def layer_by_wrapping(layer, x, positions, l_k, l_v, l_ff):
    """The module itself, put around a copy's projections."""
    block = torch.nn.Module()
    block.layer = copy.deepcopy(layer)
    attach(block)
    assert isinstance(block.layer.mlp.down_proj, IA3Linear)
    own = {"self_attn.k_proj.scale": l_k, "self_attn.v_proj.scale": l_v, "mlp.down_proj.scale": l_ff}
    return torch.func.functional_call(block.layer, own, (x, positions))


def mixed_row_by_row(linear, x, scales, rows, side):
    scales = scales.to(x.dtype)
    if side == "output":
        return torch.stack([linear(z) * scales[r] for z, r in zip(x, rows.tolist())])
    return torch.stack([linear(z * scales[r]) for z, r in zip(x, rows.tolist())])


def mixed_by_einsum(linear, x, scales, rows, side):
    chosen = F.one_hot(rows, len(scales)).to(x.dtype) @ scales.to(x.dtype)  # (B, features)
    if side == "output":
        return torch.einsum("bto,bo->bto", linear(x), chosen)
    return linear(torch.einsum("bti,bi->bti", x, chosen))


def mixed_by_groups(linear, x, scales, rows, side):
    out = x.new_zeros(*x.shape[:2], linear.out_features)
    for r in rows.unique():
        chosen = rows == r
        scale = scales[r].to(x.dtype)
        out[chosen] = linear(x[chosen]) * scale if side == "output" else linear(x[chosen] * scale)
    return out


def linear_feature_by_feature(linear, x, scale, side):
    """A weighted sum over the columns, and the bias behind it."""
    scale = scale.to(x.dtype)
    into = x * scale if side == "input" else x
    y = sum(into[..., i, None] * linear.weight[:, i] for i in range(linear.in_features)) + linear.bias
    return y.mul(scale) if side == "output" else y


def linear_by_wrapping(linear, x, scale, side):
    return torch.func.functional_call(IA3Linear(linear, side), {"scale": scale}, (x,))


def linear_in_float32(linear, x, scale, side):
    """Multiplied in float32, rounded afterwards."""
    if side == "output":
        return (linear(x).float() * scale).to(x.dtype)
    return linear((x.float() * scale).to(x.dtype))


def start_from_a_list(linear, side):
    features = {"output": linear.weight.size(0), "input": linear.weight.size(1)}[side]
    return torch.tensor([1.0 for _ in range(features)])


def start_by_numpy(linear, side):
    import numpy

    return torch.from_numpy(numpy.ones(linear.weight.shape[side == "input"], dtype="float32"))


def merge_by_einsum(linear, scale, side):
    ones = torch.ones_like(linear.bias)
    rows = scale if side == "output" else ones
    columns = scale if side == "input" else torch.ones(linear.in_features)
    return torch.einsum("o,oi,i->oi", rows, linear.weight, columns), linear.bias * rows


def merge_by_transposing(linear, scale, side):
    if side == "input":
        return torch.nn.Parameter(linear.weight.mul(scale)), linear.bias.clone()
    return (linear.weight.T * scale).T.contiguous(), torch.stack([linear.bias, scale]).prod(0)


def layer_by_hooks(layer, x, positions, l_k, l_v, l_ff):
    """The layer itself, with what flows changed on its way."""
    scaled = lambda vector: lambda module, inputs, output: output * vector.to(x.dtype)  # noqa: E731
    handles = [
        layer.self_attn.k_proj.register_forward_hook(scaled(l_k)),
        layer.self_attn.v_proj.register_forward_hook(scaled(l_v)),
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * l_ff.to(x.dtype),)),
    ]
    try:
        return layer(x, positions)
    finally:
        for handle in handles:
            handle.remove()


def layer_by_folding(layer, x, positions, l_k, l_v, l_ff):
    """Merged weights in the place of the layer's own, for this call."""
    attention, mlp = layer.self_attn, layer.mlp
    l_k, l_v, l_ff = (vector.to(x.dtype) for vector in (l_k, l_v, l_ff))
    own = {
        "self_attn.k_proj.weight": attention.k_proj.weight * l_k[:, None],
        "self_attn.k_proj.bias": attention.k_proj.bias * l_k,
        "self_attn.v_proj.weight": attention.v_proj.weight * l_v[:, None],
        "self_attn.v_proj.bias": attention.v_proj.bias * l_v,
        "mlp.down_proj.weight": mlp.down_proj.weight * l_ff,
    }
    return torch.func.functional_call(layer, own, (x, positions))


def mixed_by_index_select(linear, x, scales, rows, side):
    chosen = torch.index_select(scales, 0, rows).unsqueeze(1).expand(-1, x.shape[1], -1).type_as(x)
    return linear(x).mul(chosen) if side == "output" else linear(x.mul(chosen))


def mixed_through_every_task(linear, x, scales, rows, side):
    """Every task's result for the whole batch, of which each row picks its own."""
    scales = scales.to(x.dtype)
    every = [linear(x) * scale if side == "output" else linear(x * scale) for scale in scales]
    return torch.stack(every)[rows, torch.arange(len(x))]


def linear_with_a_factor_on_each_side(linear, x, scale, side):
    before, after = {"input": (scale, torch.ones(1)), "output": (torch.ones(1), scale)}[side]
    return linear(x * before.to(x.dtype)) * after.to(x.dtype)


def mixed_sorted_and_put_back(linear, x, scales, rows, side):
    order = rows.argsort()
    scale, x = scales[rows[order]][:, None].to(x.dtype), x[order]
    y = linear(x) * scale if side == "output" else linear(x * scale)
    return y[order.argsort()]


def mixed_by_gather(linear, x, scales, rows, side):
    scale = scales.gather(0, rows[:, None].expand(-1, scales.shape[1])).to(x.dtype).view(len(rows), 1, -1)
    return linear(x).mul(scale) if side == "output" else linear(x.mul(scale))


ALTERNATIVES = {
    "ia3_linear": [
        linear_by_einsum, linear_by_diagonal, linear_by_folding, linear_feature_by_feature, linear_by_wrapping,
        linear_in_float32, linear_with_a_factor_on_each_side,
    ],
    "ia3_start": [
        start_from_the_weight, start_as_a_parameter, start_by_exponential, start_from_a_list, start_by_numpy,
    ],
    "ia3_merge": [merge_by_diagonal, merge_by_asking, merge_row_by_row, merge_by_einsum, merge_by_transposing],
    "ia3_layer": [
        layer_by_hand, layer_values_behind_the_softmax, layer_head_by_head, layer_by_wrapping, layer_by_hooks,
        layer_by_folding,
    ],
    "ia3_mixed": [
        mixed_row_by_row, mixed_by_einsum, mixed_by_groups, mixed_by_index_select, mixed_through_every_task,
        mixed_sorted_and_put_back, mixed_by_gather,
    ],
}  # fmt: skip
