"""Opens and writes pre-trained bases: the bundled ones, folders in Hugging Face's layout (LLaMA, Mistral, GPT-2), models
of its hub, and .gguf files."""

import dataclasses
from pathlib import Path

import torch

from . import hub
from .data import ByteTokenizer
from .files import FileError, read_json, read_tensors, write_json, write_tensors
from .gguf_file import read_gguf
from .gpt2 import GPT2, GPT2Config
from .llama import LLaMA, LLaMAConfig
from .tokenizer import read_tokenizer

BASES = Path(__file__).parent / "bases"


def load(name, dtype=None, device="cpu"):
    """(model, tokenizer) of a base by its name:

    - "dates-llama", "dates-gpt2": the bundled ones
    - a folder in Hugging Face's layout
    - a .gguf file of the LLaMA architecture, dequantised
    - a model of the Hugging Face hub, "owner/model", downloaded once
    - "smollm2": SmolLM2-135M-Instruct, from the hub or else from the package index

    dtype: of the weights; None keeps the file's (float32 where that is quantised).  The model comes in eval mode.
    The tokenizer is None where the base has none.  Raises FileError when anything is missing, damaged or not honoured,
    ValueError for no such base.
    """
    path = find(name)
    if path.suffix == ".gguf" and not path.is_dir():
        model_class, (config, weights, tokenizer) = LLaMA, read_gguf(path, dtype)
    else:
        config, model_class = read_config(path / "config.json")
        weights = gpt2_from_hf(read_weights(path)) if model_class is GPT2 else llama_from_hf(read_weights(path))
        tokenizer = read_tokenizer(path) or (ByteTokenizer() if config.vocab_size == ByteTokenizer.vocab_size else None)
    with torch.device("meta"):  # shapes only: the file's tensors become the weights, without a copy in between
        model = model_class(config)
    fit(model, weights, path)
    model.source = str(name)
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def find(name):
    """The folder or .gguf file of a base, fetched where it is not here yet."""
    bundled = sorted(path.name for path in BASES.iterdir() if (path / "config.json").exists()) if BASES.exists() else []
    if str(name) in bundled:
        return BASES / name
    if Path(name).is_dir() or str(name).endswith(".gguf"):
        return Path(name)
    if str(name) == "smollm2":
        return hub.smollm2()
    if hub.is_name(name):
        return hub.hub_folder(str(name))
    known = ", ".join([*bundled, "smollm2"])
    raise ValueError(f"no base {str(name)!r}: it is neither a folder here, nor a .gguf file, nor a model of the hub (owner/model), nor one of {known}")


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_config(path):
    """(config, model class) of a config.json. What the model cannot honour is refused by key and value."""
    content = read_json(path)
    architecture = content.get("model_type")
    try:
        if architecture in ("llama", "mistral"):
            return llama_config(content), LLaMA
        if architecture == "gpt2":
            return gpt2_config(content), GPT2
        raise ValueError(f"model_type is {architecture!r}; this project has llama, mistral and gpt2")
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: {error}") from None


def require(content, **values):
    """Refuses every key of a configuration that is there and asks for something else than the one value we honour."""
    for key, value in values.items():
        if content.get(key, value) != value:
            raise ValueError(f"{key} is {content[key]!r}; only {value!r} can be honoured")


def take(content, config_class, renamed={}):
    """The configuration from the keys that the dataclass has; null and absent keys keep its default."""
    known = {field.name for field in dataclasses.fields(config_class)} - {"rope_scaling"}
    values = {renamed.get(key, key): value for key, value in content.items()}
    return {key: values[key] for key in known if values.get(key) is not None}


def llama_config(content):
    require(content, hidden_act="silu", partial_rotary_factor=1.0, quantization_config=None)
    # transformers 5 writes rope_parameters, earlier releases rope_theta beside rope_scaling
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = take(content, LLaMAConfig)
    values["rope_theta"] = float(rope.get("rope_theta", content.get("rope_theta", 10000.0)))
    require(rope, partial_rotary_factor=1.0)
    if kind == "llama3":
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [key for key in numbers if key not in rope]:
            raise ValueError(f"rope_type is 'llama3' and {missing[0]} is missing beside it")
        values["rope_scaling"] = tuple(float(rope[key]) for key in numbers)
    elif kind != "default":
        raise ValueError(f"rope_type is {kind!r}; only 'default' and 'llama3' can be honoured")
    if content["model_type"] == "mistral":
        values.setdefault("num_key_value_heads", 8)  # what an absent key means there
        values.setdefault("intermediate_size", 14336)
    return LLaMAConfig(**values)


GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
}


def gpt2_config(content):
    require(content, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True, add_cross_attention=False)
    if content.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function is {content['activation_function']!r}; only 'gelu_new' can be honoured")
    return GPT2Config(**take(content, GPT2Config, GPT2_KEYS))


def hf_config(config):
    """The content of config.json for a model of ours; transformers reads it."""
    values = dataclasses.asdict(config)
    if isinstance(config, GPT2Config):
        ours = {new: old for old, new in GPT2_KEYS.items()}
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"} | {
            ours.get(key, key): value for key, value in values.items()
        }
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
    values["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    values["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3", "rope_theta": theta} | dict(zip(numbers, scaling))
        rope["original_max_position_embeddings"] = int(scaling[3])
    mistral = config.sliding_window is not None
    if not mistral:
        del values["sliding_window"]
    kind = {"architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"], "model_type": "mistral" if mistral else "llama"}
    return kind | {"hidden_act": "silu", "rope_parameters": rope} | values


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_weights(folder):
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    if (folder / "model.safetensors").exists():
        return read_tensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        other = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        seen = f"has only {other}, a pickle that can run code when opened: convert it to safetensors" if other else "has no weights"
        raise FileError(f"{folder} {seen}; needed is model.safetensors, or its shards with model.safetensors.index.json")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise FileError(f"{index} has no weight_map, which says in which file each tensor lies: copy it again")
    shards = {name: read_tensors(folder / name) for name in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in shards[file]:
            raise FileError(f"{folder / file} has no tensor {name}, which {index.name} places there: the shards do not belong together")
    return {name: shards[file][name] for name, file in placed.items()}


def llama_from_hf(weights):
    return {name.removeprefix("model."): tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


# Hugging Face's GPT-2 names and ours; the matrices of `h` lie transposed there.
GPT2_NAMES = {
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "ln_f": "norm",
    "h": "layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def rename(name, table):
    name = f".{name}"
    for old, new in table.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name[1:]


def gpt2_from_hf(weights):
    ours = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old checkpoints carry along
        matrix = tensor.dim() == 2 and name.startswith("h.")
        tensor = tensor.T if matrix else tensor
        if ".attn.c_attn." in name:
            for proj, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                ours[rename(name.replace("attn.c_attn", f"self_attn.{proj}"), GPT2_NAMES)] = part.contiguous()
        else:
            ours[rename(name, GPT2_NAMES)] = tensor.contiguous()
    return ours


def gpt2_to_hf(weights):
    theirs, back = {}, {new: old for old, new in GPT2_NAMES.items()}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace("q_proj", proj)] for proj in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.c_attn")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        matrix = tensor.dim() == 2 and name.startswith("layers.")
        theirs["transformer." + rename(name, back)] = tensor.T if matrix else tensor
    return theirs


def fit(model, weights, folder):
    """Makes `weights` the model's own, after every name and shape was compared with what its configuration asks."""
    tied = model.lm_head.weight is model.embed_tokens.weight
    if tied:
        weights["lm_head.weight"] = weights.get("embed_tokens.weight", torch.empty(0))
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - weights.keys()):
        raise FileError(f"{folder}: the weights lack {missing[0]} ({len(missing)} missing in all), which the configuration asks for: the two do not belong together")
    if extra := sorted(weights.keys() - wanted.keys()):
        raise FileError(f"{folder}: the weights hold {extra[0]} ({len(extra)} too many in all), for which the configuration has no place: the two do not belong together")
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            raise FileError(f"{folder}: {name} has shape {tuple(weights[name].shape)} and the configuration asks for {tuple(tensor.shape)}: the two do not belong together")
    model.load_state_dict(weights, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def save(model, folder, tokenizer=None):
    """Writes config.json and model.safetensors in Hugging Face's layout; transformers and `load` read them.

    tokenizer: one that `load` returned is written beside them, unless its tokens are the bytes.  Raises ValueError for an
    adapted model: its adapter goes into a file of its own.
    """
    if any(hasattr(module, "active") for module in model.modules()):
        raise ValueError("the model carries an adapter: save_adapter writes that, and the base is as it was loaded")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or model.lm_head.weight is not model.embed_tokens.weight}
    if isinstance(model, GPT2):
        weights = gpt2_to_hf(weights)
    else:
        weights = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in weights.items()}
    folder, config = Path(folder), hf_config(model.config)
    config["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
