"""Small random models of each kind, ours and transformers' relatives, a way to open every gate, and pairwise cases."""

import pytest
import torch
from conftest import KINDS  # noqa: F401, for those that import it from here

import minillama
from minillama.adapters import adapter_parameters
from minillama.rope import YaRN

seed = torch.default_generator.manual_seed  # torch.manual_seed asks every kind of GPU too, for milliseconds

SHAPE = dict(
    vocab_size=101, hidden_size=48, intermediate_size=80,
    num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=64,
)  # fmt: skip
# LLaMA's relatives, each by what sets it apart; together they have every line of the configuration.
SLIDE, SEE_ALL = "sliding_attention", "full_attention"
RELATIVES = {
    "mistral": dict(sliding_window=4),
    "qwen2": dict(attention_bias=True, attention_output_bias=False),
    "qwen3": dict(qk_norm="head", rope_scaling=YaRN(4.0, 16, 1.3)),
    "smollm3": dict(no_rope_layers=(1, 0, 1), tie_word_embeddings=True),
    "olmo2": dict(norms="behind", qk_norm="all"),
    "granite": dict(
        embedding_multiplier=12.0, residual_multiplier=0.5, attention_multiplier=0.15, logits_scaling=0.25,
    ),
    "gemma3_text": dict(
        norms="both", norm_offset=1.0, qk_norm="head", hidden_act="gelu_pytorch_tanh", embedding_multiplier=48**0.5,
        attention_multiplier=0.4, sliding_window=4, layer_types=(SLIDE, SEE_ALL, SLIDE), rope_local_base_freq=100.0,
    ),
}  # fmt: skip


def make(kind):
    """A random model in eval mode, the same each time for the same torch.manual_seed."""
    if kind == "gpt2":
        model = minillama.GPT2(minillama.GPT2Config(**SHAPE))
    else:
        grouped = dict(num_key_value_heads=2, head_dim=10, attention_bias=True) if kind == "grouped" else {}
        if kind in RELATIVES:
            grouped = dict(num_key_value_heads=2, model_type=kind, **RELATIVES[kind])
        model = minillama.LLaMA(minillama.LLaMAConfig(**SHAPE, **grouped))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases at 0 and norms at 1 would hide a missing or a doubled one
                parameter += 0.3 * torch.randn_like(parameter)
        model.lm_head.weight *= 0.1  # logits of order 1, so that 1e-5 is a tolerance in float32
    return model.eval()


def rotated(kinds, cases):
    """Every (kind, case); in the fast suite each case meets one kind, in turn, and the others are slow."""
    return [
        pytest.param(kind, case, marks=() if i % len(kinds) == j else pytest.mark.slow)
        for i, case in enumerate(cases)
        for j, kind in enumerate(kinds)
    ]


def open_gates(model, seed=2):
    """Gives every adapter parameter a random value, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model).items()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def left_padded(ids, lengths):
    """The last `lengths[i]` tokens of each row, the rest of it padding: ids, attention_mask."""
    T = ids.shape[1]
    mask = torch.stack([torch.arange(T) >= T - n for n in lengths]).long()
    return ids * mask, mask
