"""Right answers to lesson 05's exercises, written in other ways: the checker must let them pass."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def network_by_matrices(x, down_weight, down_bias, up_weight, up_bias):
    given = (down_weight, down_bias, up_weight, up_bias)
    down_weight, down_bias, up_weight, up_bias = (tensor.to(x.dtype) for tensor in given)
    narrow = x @ down_weight.T + down_bias
    return nn.GELU()(narrow) @ up_weight.mT + up_bias


def network_by_einsum(x, down_weight, down_bias, up_weight, up_bias):
    narrow = torch.einsum("btd,md->btm", x, down_weight.type_as(x)) + down_bias.type_as(x)
    return torch.einsum("btm,dm->btd", F.gelu(narrow), up_weight.type_as(x)) + up_bias.type_as(x)


def network_unit_by_unit(x, down_weight, down_bias, up_weight, up_bias):
    out = up_bias.to(x.dtype).expand_as(x)
    for unit in range(len(down_bias)):
        z = (x * down_weight[unit].to(x.dtype)).sum(-1, keepdim=True) + down_bias[unit].to(x.dtype)  # (B, T, 1)
        out = out + z * 0.5 * (1 + torch.erf(z / math.sqrt(2))) * up_weight[:, unit].to(x.dtype)
    return out


def network_in_float32(x, down_weight, down_bias, up_weight, up_bias):
    narrow = F.gelu(F.linear(x.float(), down_weight.float(), down_bias.float()))
    return F.linear(narrow, up_weight.float(), up_bias.float()).to(x.dtype)


def start_of_the_paper(D, m):
    down = nn.init.trunc_normal_(torch.empty(m, D), std=1e-2, a=-2e-2, b=2e-2)
    return down, torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def start_of_linear(D, m):
    down, up = nn.Linear(D, m), nn.Linear(m, D)
    for tensor in (down.bias, up.weight, up.bias):
        nn.init.zeros_(tensor)
    return [down.weight, down.bias, up.weight, up.bias]


def start_narrow(D, m):
    return 0.001 * torch.randn(m, D), torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def start_kaiming(D, m):
    down = nn.init.kaiming_normal_(torch.empty(m, D), nonlinearity="relu")
    return down, torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def sequential_in_another_order(sublayer, x, bottleneck):
    y = sublayer(x)
    return bottleneck(y) + y


def sequential_as_a_sum(sublayer, x, bottleneck):
    y = sublayer(x)
    return torch.stack((y, bottleneck(y))).sum(0)


def sequential_in_place(sublayer, x, bottleneck):
    y = sublayer(x)
    added = bottleneck(y)
    added += y
    return added


def parallel_in_another_order(sublayer, x, bottleneck, scale):
    added = bottleneck(x) * scale
    return added + sublayer(x)


def parallel_by_add(sublayer, x, bottleneck, scale):
    return torch.add(sublayer(x), bottleneck(x), alpha=scale)


def layer_in_one_sum(layer, x, positions, first, second):
    y = layer.self_attn(layer.input_layernorm(x), positions)
    h = x + y + first(y)
    z = layer.mlp(layer.post_attention_layernorm(h))
    return h + z + second(z)


def layer_by_verbs(layer, x, positions, first, second):
    attention, mlp = layer.self_attn, layer.mlp
    y = attention.output(attention.attend(*attention.project(layer.input_layernorm(x), positions)))
    x = x + first(y) + y
    n = layer.post_attention_layernorm(x)
    z = mlp.down_proj(F.silu(mlp.gate_proj(n)) * mlp.up_proj(n))
    return x + second(z) + z


def layer_by_a_function(layer, x, positions, first, second):
    def adapted(y, bottleneck):
        return y + bottleneck(y)

    x = x + adapted(layer.self_attn(layer.input_layernorm(x), positions), first)
    return x + adapted(layer.mlp(layer.post_attention_layernorm(x)), second)


def count_by_modules(D, m, L, places):
    one = nn.Sequential(nn.Linear(D, m), nn.Linear(m, D))
    return sum(p.numel() for p in one.parameters()) * places * L


def count_by_parts(D, m, L, places):
    down, up = m * D + m, D * m + D
    return sum(down + up for _ in range(L) for _ in range(places))


ALTERNATIVES = {
    "bottleneck_network": [network_by_matrices, network_by_einsum, network_unit_by_unit, network_in_float32],
    "bottleneck_start": [start_of_the_paper, start_of_linear, start_narrow, start_kaiming],
    "adapted_sublayer": [sequential_in_another_order, sequential_as_a_sum, sequential_in_place],
    "parallel_sublayer": [parallel_in_another_order, parallel_by_add],
    "houlsby_layer": [layer_in_one_sum, layer_by_verbs, layer_by_a_function],
    "bottleneck_parameters": [count_by_modules, count_by_parts],
}
