"""Other right answers to lesson 09's exercises, written differently: each must pass."""

import math

import numpy
import torch

import minillama


def forward_by_counting_weights(config, tokens):
    with torch.device("meta"):
        model = minillama.LLaMA(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    width = config.num_attention_heads * config.head_dim
    return 2 * tokens * matrices + 4 * config.num_hidden_layers * width * tokens**2


def forward_product_by_product(config, tokens):
    D, F, T = config.hidden_size, config.intermediate_size, tokens
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    total = 0.0
    for _ in range(config.num_hidden_layers):
        for n_in, n_out in ((D, H * d), (D, G * d), (D, G * d), (H * d, D), (D, F), (D, F), (F, D)):
            total += 2 * T * n_in * n_out
        for _ in range(H):
            total += 2 * T * d * T + 2 * T * T * d
    return total + 2 * T * D * config.vocab_size  # a float that is whole


def step_by_passes(layer, layers, head, adapted, tokens, answers, frozen):
    passes = {"forward": layers, "activations": adapted if frozen else layers, "weights": 0 if frozen else layers}
    heads = 2 if frozen else 3
    return numpy.int64(2 * (sum(passes.values()) * layer * tokens + heads * head * answers))


def step_in_two_returns(layer, layers, head, adapted, tokens, answers, frozen):
    if frozen:
        return 2 * tokens * layer * (layers + adapted) + 4 * answers * head
    return 6 * (tokens * layer * layers + answers * head)


def decoding_by_terms(config, rows, context, size):
    per_layer = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    per_layer += 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    tokens = rows * context  # all that are in the cache
    kept = tokens * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (per_layer + 2 * kept) * size + head * size


def seconds_by_intensity(operations, moved, ceiling, bandwidth):
    if moved and operations / moved < ceiling / bandwidth:  # left of the ridge
        return moved / bandwidth
    return operations / ceiling


def seconds_as_tensor(operations, moved, ceiling, bandwidth):
    return torch.tensor([operations / ceiling, moved / bandwidth], dtype=torch.float64).max()


def combined_stacked(gradients, targets):
    weights = torch.tensor(targets, dtype=torch.float32)
    return torch.stack(gradients).T @ (weights / weights.sum())


def combined_in_a_loop(gradients, targets):
    total = torch.zeros_like(gradients[0])
    for gradient, number in zip(gradients, targets):
        total += gradient * number
    return total / sum(targets)


def combined_where_there_are_targets(gradients, targets):
    mine = [g * n for g, n in zip(gradients, targets) if n]
    return torch.stack(mine).sum(0).div(math.fsum(targets))


def quantise_reshaped(weight):
    n_out, n_in = weight.shape
    blocks = weight.reshape(n_out, n_in // 32, 32)
    largest = torch.linalg.vector_norm(blocks, math.inf, dim=2)
    scales = largest / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    codes = torch.round(blocks * inverse[:, :, None]).to(torch.int8)
    return codes.reshape(n_out, n_in), scales.half()


def quantise_block_by_block(weight):
    codes, scales = torch.zeros(weight.shape, dtype=torch.int8), []
    for i, row in enumerate(weight):
        for j, block in enumerate(row.split(32)):
            scale = max(block.max(), -block.min()) / 127
            if scale > 0:
                codes[i, 32 * j : 32 * j + 32] = (block / scale).round().clamp(-127, 127).char()
            scales.append(scale)
    return codes, torch.stack(scales).view(len(weight), -1).to(torch.float16)


def dequantise_interleaved(codes, scales):
    return codes * scales.float().repeat_interleave(32, dim=1)


def dequantise_einsum(codes, scales):
    blocks = codes.float().view(len(codes), -1, 32)
    return torch.einsum("obn,ob->obn", blocks, scales.float()).reshape(codes.shape)


def card_as_a_sum(weights, layer, kept, cards, sharded):
    return kept + (weights / cards + layer + layer if sharded else weights)


ALTERNATIVES = {
    "forward_flops": [forward_by_counting_weights, forward_product_by_product],
    "step_flops": [step_by_passes, step_in_two_returns],
    "decoding_bytes": [decoding_by_terms],
    "least_seconds": [seconds_by_intensity, seconds_as_tensor],
    "combined_gradient": [combined_stacked, combined_in_a_loop, combined_where_there_are_targets],
    "quantise_rows": [quantise_reshaped, quantise_block_by_block],
    "dequantise_rows": [dequantise_interleaved, dequantise_einsum],
    "memory_a_card": [card_as_a_sum],
}
