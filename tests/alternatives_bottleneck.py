"""Right answers to lesson 05's exercises, written in other ways: the checker must let them pass."""

import math

import numpy as np
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


def network_row_by_row(x, *tensors):
    return torch.stack([network_by_matrices(row, *tensors) for row in x])


def network_with_biases_folded_in(x, down_weight, down_bias, up_weight, up_bias):
    one = torch.ones_like(x[..., :1])  # a feature that is always 1
    down, up = torch.column_stack((down_weight, down_bias)), torch.column_stack((up_weight, up_bias))
    narrow = torch.cat((x, one), -1) @ down.to(x.dtype).T
    return torch.cat((F.gelu(narrow), one), -1) @ up.to(x.dtype).T


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


def start_by_numpy(D, m):
    down = torch.from_numpy(np.random.randn(m, D).astype("float32") * 0.05)
    return down, *(torch.from_numpy(np.zeros(shape, "float32")) for shape in (m, (D, m), D))


def start_at_the_bounds(D, m):
    return 0.1 * torch.randn(m, D), torch.zeros(m), torch.zeros((D, m)), torch.zeros(D)


def start_xavier(D, m):
    down, up = nn.Linear(D, m), nn.Linear(m, D)
    nn.init.xavier_uniform_(down.weight)
    return down.weight.detach(), down.bias.detach() * 0, 0 * up.weight.detach(), torch.zeros_like(up.bias)


def start_orthogonal(D, m):
    return nn.init.orthogonal_(torch.empty(m, D)), torch.zeros(m), torch.zeros(m, D).T, torch.zeros(D)


def start_of_coins(D, m):
    return (2.0 * torch.randint(0, 2, (m, D)) - 1) * 0.01, torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def start_in_one_buffer(D, m):
    buffer = torch.zeros(2 * m * D + m + D)
    down, *zeros = buffer.split((m * D, m, D * m, D))
    down.normal_(0, 0.01)
    return down.view(m, D), zeros[0], zeros[1].view(m, D).T, zeros[2]


def start_turned(D, m):
    return torch.randn(D, m).T.div(D**0.5), torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


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


def sequential_row_by_row(sublayer, x, bottleneck):
    rows = [sublayer(row[None]) for row in x]
    return torch.cat([y + bottleneck(y) for y in rows])


def sequential_by_a_class(sublayer, x, bottleneck):
    class Skip(nn.Module):
        def forward(self, y):
            return y + bottleneck(y)

    return nn.Sequential(sublayer, Skip())(x)


def sequential_residual_of_a_difference(sublayer, x, bottleneck):
    y = sublayer(x)
    return 2 * y - (y - bottleneck(y))


def parallel_row_by_row(sublayer, x, bottleneck, scale):
    out = torch.empty_like(x)
    for i, row in enumerate(x):
        out[i] = sublayer(row) + bottleneck(row) * scale
    return out


def parallel_with_a_tensor(sublayer, x, bottleneck, scale):
    return sublayer(x) + torch.tensor(np.float32(scale)) * bottleneck(x)


def parallel_on_a_copy(sublayer, x, bottleneck, scale):
    y, added = (part(x.clone()) for part in (sublayer, bottleneck))
    return torch.einsum("k,kbtd->btd", torch.tensor([1.0, scale]).to(x.dtype), torch.stack((y, added)))


def parallel_in_another_order(sublayer, x, bottleneck, scale):
    added = bottleneck(x) * scale
    return added + sublayer(x)


def parallel_bottleneck_by_token(sublayer, x, bottleneck, scale):
    return sublayer(x) + scale * torch.stack([bottleneck(token) for token in x.unbind(1)], 1)


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


def layer_row_by_row(layer, x, positions, first, second):
    return torch.cat([layer_by_a_function(layer, row[None], positions, first, second) for row in x])


def layer_by_hooks(layer, x, positions, first, second):
    handles = [
        part.register_forward_hook(lambda _, inputs, y, adapter=adapter: y + adapter(y))
        for part, adapter in ((layer.self_attn, first), (layer.mlp, second))
    ]
    out = layer(x, positions)
    for handle in handles:
        handle.remove()
    return out


def layer_by_the_rotation(layer, x, positions, first, second):
    stream = [x]
    rotation = layer.self_attn.rope(positions)
    stream.append(layer.self_attn(layer.input_layernorm(sum(stream)), rotation))
    stream.append(first(stream[-1]))
    stream.append(layer.mlp(layer.post_attention_layernorm(sum(stream))))
    return sum(stream) + second(stream[-1])


def count_in_numpy(D, m, L, places):
    shapes = [(m, D), (m,), (D, m), (D,)]
    return np.int64(L) * places * np.sum([np.prod(shape) for shape in shapes])


def count_as_a_tensor(D, m, L, places):
    return torch.tensor(L * places) * (torch.zeros(m, D).numel() * 2 + D + m)


def count_as_a_float(D, m, L, places):
    return 2.0 * L * places * (m * D + D / 2 + m / 2)


def count_by_modules(D, m, L, places):
    one = nn.Sequential(nn.Linear(D, m), nn.Linear(m, D))
    return sum(p.numel() for p in one.parameters()) * places * L


def count_by_parts(D, m, L, places):
    down, up = m * D + m, D * m + D
    return sum(down + up for _ in range(L) for _ in range(places))


ALTERNATIVES = {
    "bottleneck_network": [
        network_by_matrices,
        network_by_einsum,
        network_unit_by_unit,
        network_in_float32,
        network_row_by_row,
        network_with_biases_folded_in,
    ],
    "bottleneck_start": [
        start_of_the_paper,
        start_of_linear,
        start_narrow,
        start_kaiming,
        start_by_numpy,
        start_at_the_bounds,
        start_xavier,
        start_orthogonal,
        start_of_coins,
        start_in_one_buffer,
        start_turned,
    ],
    "adapted_sublayer": [
        sequential_in_another_order,
        sequential_as_a_sum,
        sequential_in_place,
        sequential_row_by_row,
        sequential_by_a_class,
        sequential_residual_of_a_difference,
    ],
    "parallel_sublayer": [
        parallel_in_another_order,
        parallel_by_add,
        parallel_bottleneck_by_token,
        parallel_row_by_row,
        parallel_with_a_tensor,
        parallel_on_a_copy,
    ],
    "houlsby_layer": [
        layer_in_one_sum,
        layer_by_verbs,
        layer_by_a_function,
        layer_row_by_row,
        layer_by_hooks,
        layer_by_the_rotation,
    ],
    "bottleneck_parameters": [count_by_modules, count_by_parts, count_in_numpy, count_as_a_tensor, count_as_a_float],
}
