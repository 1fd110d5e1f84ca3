"""Lists models that can be opened: sizes, the memory that adapting them takes, licences, and which are here.

Every size is counted from the shapes below, on a model of one layer without its weights.
"""

import dataclasses
import json
from pathlib import Path

from ..adapters import adapt, adapter_parameters, delete_adapter
from ..checkpoints import hub
from ..checkpoints.architectures import ARCHITECTURES, REFUSED, read_config
from ..checkpoints.files import FileError, first_line, read_json
from ..device import shapes_only
from ..llama import LLaMA
from ..speed import BLOCK
from . import count, table
from .arguments import positive

KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings",
)  # fmt: skip
APACHE, GEMMA, LLAMA = "Apache-2.0", "Gemma's terms, to be accepted", "Llama's, to be accepted"
# hub name: licence, model_type, and of config.json what decides the size (KEYS)
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (APACHE, "llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (APACHE, "llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (APACHE, "llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "HuggingFaceTB/SmolLM3-3B": (APACHE, "smollm3", 128256, 2048, 11008, 36, 16, 4, 128, True),
    "Qwen/Qwen2.5-0.5B-Instruct": (APACHE, "qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (APACHE, "qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "Qwen/Qwen2.5-7B-Instruct": (APACHE, "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Qwen/Qwen3-0.6B": (APACHE, "qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-1.7B": (APACHE, "qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen/Qwen3-4B": (APACHE, "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen/Qwen3-8B": (APACHE, "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (APACHE, "llama", 32000, 2048, 5632, 22, 32, 4, 64, False),
    "meta-llama/Llama-3.2-1B-Instruct": (LLAMA, "llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "meta-llama/Llama-3.2-3B-Instruct": (LLAMA, "llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "mistralai/Mistral-7B-Instruct-v0.3": (APACHE, "mistral", 32768, 4096, 14336, 32, 32, 8, 128, False),
    "allenai/OLMo-2-0425-1B-Instruct": (APACHE, "olmo2", 100352, 2048, 8192, 16, 16, 16, 128, False),
    "microsoft/Phi-3-mini-4k-instruct": ("MIT", "phi3", 32064, 3072, 8192, 32, 32, 32, 96, False),
    "ibm-granite/granite-3.1-2b-instruct": (APACHE, "granite", 49155, 2048, 8192, 40, 32, 8, 64, True),
    "google/gemma-3-270m-it": (GEMMA, "gemma3_text", 262144, 640, 2048, 18, 4, 1, 256, True),
    "google/gemma-3-1b-it": (GEMMA, "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, True),
}  # fmt: skip
GPT2 = "openai-community/gpt2"


def add_arguments(parser):
    parser.add_argument("--rows", type=positive, default=16, metavar="N", help="rows of a training step (16)")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="tokens of a row (64)")


def run(args):
    rows = [("", "parameters", "bfloat16", "4 bit", "licence", "here")]
    for name in [*MODELS, GPT2]:
        model, L = shapes(name)
        sizes = [f"{memory(model, L, bits, args.rows, args.tokens) / 1e9:.1f} GB" for bits in (16, 4)]
        licence = MODELS[name][0] if name in MODELS else "MIT"
        rows.append((name, f"{parameters(model, L):,}", *sizes, licence, "yes" if is_here(name) else ""))
    print(table(rows, left=(0, 4, 5)))
    print(
        f"\nMemory: counted, not measured: a step of {args.rows} rows of {args.tokens} tokens with LoRA of rank 8 and "
        "--checkpointing, the base in bfloat16\nor with --quantize 4bit. Each opens by its name, --base OWNER/MODEL, "
        "and so does any other of these kinds:"
    )
    print(f"  {', '.join(ARCHITECTURES)}")
    print("\nRefused, with the reason:")
    print(table(list(REFUSED.items()), left=(0, 1)))
    others = sorted(cached() - {*MODELS, GPT2})
    if others:
        print("\nAlso in Hugging Face's cache on this machine:")
        print(table([(name, verdict(name)) for name in others], left=(0, 1)))


def shapes(name):
    """(a model of these shapes, of one layer and without weights, how many layers it has)"""
    content = {"model_type": "gpt2"}
    if name in MODELS:
        content = {"model_type": MODELS[name][1], **dict(zip(KEYS, MODELS[name][2:]))}
    config, row = read_config(content)
    each = dict(layer_types=None, no_rope_layers=None) if row.model is LLaMA else {}  # what stands there for each layer
    with shapes_only():
        one = row.model(dataclasses.replace(config, num_hidden_layers=1, **each))
    return one, config.num_hidden_layers


def parameters(model, L):
    return count(model.parameters()) + (L - 1) * count(model.layers.parameters())


def memory(model, L, bits, rows, tokens):
    """Bytes that a training step takes, about: the base, the adapter with its gradient and Adam's two moments, what
    checkpointing keeps of each layer, one layer's own and the logits, with their gradients."""
    config, frozen = model.config, 2 * parameters(model, L)
    if bits == 4:  # half a byte a weight, and a scale of two for each block
        linear = sum(module.weight.numel() for module in model.layers.modules() if hasattr(module, "in_features"))
        frozen += L * linear * (0.5 + 2 / BLOCK - 2)
    own, seen = 16 * L * count(adapter_parameters(adapt(model, "lora")).values()), rows * tokens
    delete_adapter(model)
    wide = config.intermediate_size or 4 * config.hidden_size
    inside = seen * 2 * (6 * config.hidden_size + 4 * wide)  # of one layer, twice with its gradient
    logits = 3 * 4 * min(seen * config.vocab_size, 2**25)  # made in parts (train.head_loss)
    return frozen + own + seen * 2 * config.hidden_size * L + 2 * inside + logits


def cache_folder():
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached():
    """Names of all models in Hugging Face's cache that have a configuration there."""
    folders = cache_folder().glob("models--*--*/snapshots/*/config.json")
    return {name for path in folders if (name := hub.name_of(path.parent))}


def is_here(name):
    if name == hub.SMOLLM2 and hub.kept_gguf().exists():
        return True
    place = cache_folder() / f"models--{name.replace('/', '--')}"
    return any(any(folder.glob("*.safetensors")) for folder in place.glob("snapshots/*"))


def verdict(name):
    """Whether a model in the cache can be opened, or why not."""
    try:
        path = next((cache_folder() / f"models--{name.replace('/', '--')}").glob("snapshots/*/config.json"))
        config, row = read_config(read_json(path))
        return f"{row.theirs}: opens" + ("" if is_here(name) else ", once its weights are fetched")
    except (FileError, ValueError, json.JSONDecodeError) as error:
        return f"refused: {first_line(error)}"
