"""Other right answers to lesson 03's exercises, written differently: each must pass."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from minillama.attention import rotate


def keys_values_head_by_head(attention, prompt):
    d, k, v = attention.head_dim, attention.k_proj(prompt), attention.v_proj(prompt)
    keys = [k[:, d * g : d * (g + 1)] for g in range(attention.num_kv_heads)]
    values = [v[:, d * g : d * (g + 1)] for g in range(attention.num_kv_heads)]
    return torch.stack(keys), torch.stack(values)


def keys_values_einsum(attention, prompt):
    def made(linear):
        weight = linear.weight.view(-1, attention.head_dim, attention.width)
        return torch.einsum("kD,gdD->gkd", prompt, weight) + linear.bias.view(-1, 1, attention.head_dim)

    return made(attention.k_proj), made(attention.v_proj)


def keys_values_by_the_verb(attention, prompt):
    return list(attention.keys_values(prompt[None])[i][0] for i in (0, 1))


def prefix_by_loops(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    pk, pv = attention.keys_values(prompt.to(x.dtype))
    y, group = attention.attend(q, k, v), attention.num_heads // attention.num_kv_heads
    rows = []
    for b in range(len(x)):
        heads = []
        for h in range(attention.num_heads):
            scores = q[b, h] @ pk[h // group].T / math.sqrt(attention.head_dim)
            heads.append(y[b, h] + gate[h].tanh().to(x.dtype) * (scores.softmax(-1) @ pv[h // group]))
        rows.append(torch.stack(heads))
    return attention.output(torch.stack(rows))


def prefix_fused(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    pk, pv = (z.expand(len(x), -1, -1, -1) for z in attention.keys_values(prompt.to(x)))
    term = F.scaled_dot_product_attention(q, pk, pv, enable_gqa=attention.num_heads != attention.num_kv_heads)
    return attention.output(torch.addcmul(attention.attend(q, k, v), torch.tanh(gate).to(x).expand_as(term), term))


def prefix_einsum_in_float32(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    G, d = attention.num_kv_heads, attention.head_dim
    pk, pv = (z.float() for z in attention.keys_values(prompt.to(x.dtype)))
    grouped = q.float().unflatten(1, (G, -1))  # (B, G, H/G, T, d)
    weights = torch.einsum("bgrtd,gkd->bgrtk", grouped / d**0.5, pk).softmax(-1)
    term = torch.einsum("bgrtk,gkd->bgrtd", weights, pv).flatten(1, 2)
    return attention.output((attention.attend(q, k, v) + torch.tanh(gate) * term).to(x.dtype))


def prefix_gate_in_the_output(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    pk, pv = attention.keys_values(prompt.to(x.dtype))
    pk, pv = (torch.stack([z[h * len(z) // attention.num_heads] for h in range(attention.num_heads)]) for z in (pk, pv))
    scores = (q @ pk.mT * attention.head_dim**-0.5).exp()
    term = scores / scores.sum(-1, keepdim=True) @ (torch.tanh(gate).to(x.dtype) * pv)
    bias = attention.o_proj.bias
    out = F.linear(term.transpose(1, 2).flatten(2), attention.o_proj.weight)
    return attention.output(attention.attend(q, k, v)) - bias + out + bias


def start_of_parameters(K, D, H):
    return nn.Parameter(torch.normal(0.0, 1.0, (K, D))), nn.Parameter(torch.zeros(H)[:, None, None])


def start_of_an_embedding(K, D, H):
    return nn.Embedding(K, D).weight.detach(), torch.stack([torch.zeros(1, 1)] * H)


def attach_by_index(model, wrap):
    for parameter in model.parameters():
        parameter.requires_grad = False
    for i in range(len(model.layers)):
        model.layers[i].self_attn = wrap(model.layers[i].self_attn)
    return model


@torch.no_grad()
def attach_by_name(model, wrap):
    model.requires_grad_(False)
    places = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    for name in reversed(places):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, wrap(model.get_submodule(name)))
    return model


def attach_and_then_freeze(model, wrap):
    base = list(model.parameters())
    for layer in model.layers:
        layer.self_attn = wrap(layer.self_attn)
    for parameter in base:
        parameter.requires_grad_(False)
    return model


class LayerWithEmbedding(nn.Module):
    def __init__(self, attention, prompt_length):
        super().__init__()
        self.embedding, self.opening = nn.Embedding(prompt_length, attention.width), nn.Parameter(torch.tensor(0.0))
        self.register_buffer("tokens", torch.arange(prompt_length))
        self.frozen = attention

    def forward(self, hidden, positions=None):
        q, k, v = self.frozen.project(hidden, positions)
        pk, pv = self.frozen.keys_values(self.embedding(self.tokens))
        group = self.frozen.num_heads // self.frozen.num_kv_heads
        scores = torch.softmax(q @ pk.repeat_interleave(group, 0).mT / self.frozen.head_dim**0.5, -1)
        return self.frozen.output(self.frozen.attend(q, k, v) + self.opening * scores @ pv.repeat_interleave(group, 0))


class LayerByHand(nn.Module):
    def __init__(self, attention, prompt_length):
        super().__init__()
        self.base = attention
        self.prompt = nn.Parameter(torch.empty(prompt_length, attention.width).normal_())
        self.gate = nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, x, positions):
        base, T = self.base, x.shape[1]
        q, k, v = (base.heads(linear(x)) for linear in (base.q_proj, base.k_proj, base.v_proj))
        q, k = (rotate(z, *base.rope(positions)) for z in (q, k))
        pk, pv = (base.heads(linear(self.prompt))[None] for linear in (base.k_proj, base.v_proj))
        k, v, pk, pv = (z.repeat_interleave(base.num_heads // z.shape[1], 1) for z in (k, v, pk, pv))
        scores = (q @ k.mT / base.head_dim**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = scores.softmax(-1) @ v + self.gate * ((q @ pk.mT / base.head_dim**0.5).softmax(-1) @ pv)
        return base.o_proj(y.transpose(1, 2).reshape(len(x), T, -1))


class FlowInTwoHalves(nn.Module):
    def __init__(self, width, num_heads, prompt_length):
        super().__init__()
        self.heads, self.prompt = num_heads, nn.Embedding(prompt_length, width)
        self.gate = nn.Parameter(torch.zeros(1, width))
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        (B, T, D), H = x.shape, self.heads
        K = len(self.prompt.weight)
        every = torch.cat((self.prompt.weight.expand(B, K, D), x), 1)
        q, k, v = (z.view(B, K + T, H, D // H).transpose(1, 2) for z in self.c_attn(every).split(D, 2))
        scores = q[:, :, K:] @ k.mT / math.sqrt(D // H)
        future = torch.arange(T)[:, None] < torch.arange(T)
        tokens = scores[..., K:].masked_fill(future, -math.inf).softmax(-1) @ v[:, :, K:]
        prompts = scores[..., :K].softmax(-1) @ v[:, :, :K]
        tokens, prompts = (y.transpose(1, 2).reshape(B, T, D) for y in (tokens, prompts))
        return self.c_proj(tokens + prompts * self.gate)


class FlowByHeads(nn.Module):
    def __init__(self, width, num_heads, prompt_length):
        super().__init__()
        self.d = width // num_heads
        self.prompt, self.gate = nn.Parameter(torch.randn(prompt_length, width)), nn.Parameter(torch.zeros(1, width))
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        of_x, of_prompt = self.c_attn(x).chunk(3, -1), self.c_attn(self.prompt).chunk(3, -1)
        out = []
        for q, k, v, pk, pv in zip(*(z.split(self.d, -1) for z in (*of_x, *of_prompt[1:]))):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.append((y, (q @ pk.T / self.d**0.5).softmax(-1) @ pv))
        tokens, prompts = (torch.cat(z, -1) for z in zip(*out))
        return self.dropout(self.c_proj(tokens + self.gate * prompts))


def scaled_as_two_terms(linear, x, scale, shift):
    return linear(x) * scale.to(x.dtype) + (scale * shift).to(x.dtype)


def scaled_by_folding(linear, x, scale, shift):
    weight, bias = linear.weight * scale[:, None], (linear.bias + shift) * scale
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def scaled_in_float32(linear, x, scale, shift):
    return torch.einsum("...o,o->...o", linear(x).float() + shift, scale).to(x)


def merge_by_a_diagonal(linear, scale, shift):
    return torch.diag(scale) @ linear.weight, linear.bias * scale + shift * scale


def merge_row_by_row(linear, scale, shift):
    rows = [s * row for s, row in zip(scale, linear.weight)]
    return torch.stack(rows), torch.stack([s * (b + c) for s, b, c in zip(scale, linear.bias, shift)])


class NormBeside(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.both, self.active = nn.ModuleList([norm, copy.deepcopy(norm)]), True
        for parameter in self.both[1].parameters():
            parameter.requires_grad = True

    def forward(self, x):
        return self.both[int(self.active)](x)


class NormOfNumbers(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.active = norm, True
        self.own = nn.ParameterDict({name: nn.Parameter(p.detach().clone()) for name, p in norm.named_parameters()})

    def forward(self, x):
        return torch.func.functional_call(self.norm, dict(self.own) if self.active else {}, (x,))


ALTERNATIVES = {
    "prefix_keys_values": [keys_values_head_by_head, keys_values_einsum, keys_values_by_the_verb],
    "gated_prefix_attention": [prefix_by_loops, prefix_fused, prefix_einsum_in_float32, prefix_gate_in_the_output],
    "initial_values": [start_of_parameters, start_of_an_embedding],
    "attach_adapters": [attach_by_index, attach_by_name, attach_and_then_freeze],
    "adaption_prompt_layer": [LayerWithEmbedding, LayerByHand],
    "prefix_layer": [FlowInTwoHalves, FlowByHeads],
    "scaled_linear": [scaled_as_two_terms, scaled_by_folding, scaled_in_float32],
    "scaled_merge": [merge_by_a_diagonal, merge_row_by_row],
    "trained_norm": [NormBeside, NormOfNumbers],
}
