"""The papers' parameter counts, computed from the real shapes: nothing is loaded,
the models live on the meta device."""

from torch import nn

from ..adapters import METHODS
from ..device import shapes_only
from ..gpt2 import GPT2, GPT2Config
from ..llama import LLaMA, LLaMAConfig


def blocks(count, **projections):
    """The named projections (in, out) of `count` blocks and nothing else, for models that are not in this project."""
    return nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(*size) for name, size in projections.items()}) for _ in range(count)
    )


def t0_3b():
    """T5 XL's projections that IA3 scales: 24 blocks that encode, 24 that decode with attention to both sides."""
    D, F = 2048, 5120
    encoder = blocks(24, k_proj=(D, D), v_proj=(D, D), down_proj=(F, D))
    decoder = blocks(24, k_proj=(D, D), v_proj=(D, D), down_proj=(F, D))
    cross = blocks(24, k_proj=(D, D), v_proj=(D, D))
    return nn.ModuleList([encoder, decoder, cross])


def bert_large():
    """The two projections of BERT-large's 24 blocks that Houlsby's adapters stand behind."""
    return blocks(24, o_proj=(1024, 1024), down_proj=(4096, 1024))


def llama_7b():
    return LLaMA(LLaMAConfig())


def smollm2():
    return LLaMA(LLaMAConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True))


def gpt3():
    return GPT2(GPT2Config(50257, 12288, num_hidden_layers=96, num_attention_heads=96, max_position_embeddings=2048))


# method, options, model, what the paper says
CLAIMS = (
    ("llama_adapter", dict(prompt_length=10, layers=30), llama_7b,
     "1.2M (Zhang et al. 2023, section 4.1); 4.69 MiB in float32"),
    ("llama_adapter", dict(prompt_length=10, layers=30, gate="layer"), llama_7b,
     "the same with one gate a layer, as in PEFT"),
    ("ia3", {}, t0_3b, "540K (Liu et al. 2022, section 3.3)"),
    ("ia3", {}, smollm2, "not in the paper"),
    ("bottleneck", dict(size=64), bert_large,
     "2.1 % (Houlsby et al. 2019, table 1); of all 335M weights these are 1.9 %, "
     "of those that are not embeddings 2.1 %"),
    ("lora", dict(rank=1), gpt3, "4.7M (Hu et al. 2021, table 4)"),
    ("lora", dict(rank=8), gpt3, "37.7M (Hu et al. 2021, table 4)"),
)  # fmt: skip


def counts():
    """(method, options, model's name, trained parameters, what the paper says) of every claim."""
    rows = []
    for method, options, make, claim in CLAIMS:
        with shapes_only():
            model = make()
            model.requires_grad_(False)
            METHODS[method].attach(model, **options)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        rows.append((method, given, make.__name__, trained, claim))
    return rows
