"""Translation between our adapters and the PEFT library's files, for LLaMA, Mistral and GPT-2.

PEFT names a tensor by the module of transformers' model it belongs to. For LLaMA and Mistral these are our own names
behind a prefix. For GPT-2 the query, key and value projections are one matrix there, `c_attn`: IA3's three vectors are
laid end to end (ones where we scale nothing), and LoRA's low-rank paths are stacked, each with rows and columns of its
own; one that PEFT trained is read as three that share A's values.

Two functions for each method: `write_…(model, part, tensors)` gives (config, tensors) of theirs, or None where PEFT does
not have this or would compute something else; `read_…(model, config, tensors)` gives (part, tensors) of ours.
"""

import torch
import torch.nn.functional as F

from ..gpt2 import GPT2
from ..pretrained import GPT2_NAMES, rename

QKV = ("q_proj", "k_proj", "v_proj")
# What a configuration may say without changing what is computed at inference.
NEUTRAL = {
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
    "target_modules", "feedforward_modules", "init_ia3_weights", "init_lora_weights", "lora_dropout", "r", "lora_alpha",
    "fan_in_fan_out", "adapter_len", "adapter_layers", "megatron_core", "runtime_config", "qalora_group_size",
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "encoder_hidden_size",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip


def to_peft(model, parts, tensors):
    """(config, tensors) in PEFT's layout for an adapter of ours, or None where it has no such form."""
    if len(parts) != 1 or parts[0]["method"] not in WRITERS:
        return None
    return WRITERS[parts[0]["method"]](model, parts[0], tensors)


def from_peft(model, config, tensors):
    """(parts, tensors) of ours from a PEFT folder's content; ValueError names what it asks and we do not do."""
    kind = config.get("peft_type")
    if kind not in READERS:
        raise ValueError(f"peft_type is {kind!r}; {', '.join(READERS)} and MINILLAMA can be read")
    for key, value in config.items():
        if key not in NEUTRAL and value not in (None, False, "none", {}, []):
            raise ValueError(f"{key} is {value!r}, which is not honoured here; only its default is")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f"init_lora_weights is {config['init_lora_weights']!r}, which may have changed the base's weights too; that is not honoured here")
    part, tensors = READERS[kind](model, config, tensors)
    return [part], tensors


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def to_theirs(model, name):
    """"layers.3.mlp.down_proj.x" -> "base_model.model.model.layers.3.mlp.down_proj.x", or GPT-2's name for it."""
    if isinstance(model, GPT2):
        back = {new: old for old, new in GPT2_NAMES.items()} | {"self_attn": "attn"}
        return "base_model.model.transformer." + rename(name, back)
    return f"base_model.model.model.{name}"


def to_ours(model, name):
    """The way back; a GPT-2's c_attn keeps its name, `split` cuts it."""
    name = name.removeprefix("base_model.model.")
    if isinstance(model, GPT2):
        return rename(rename(name.removeprefix("transformer."), GPT2_NAMES), {"attn": "self_attn"})
    return name.removeprefix("model.")


def own_name(place):
    """The last word of a place: "layers.3.mlp.down_proj" -> "down_proj"."""
    return place.rpartition(".")[2]


def targets_of(model, places):
    """The names PEFT knows modules by: the last word, and for GPT-2, where "c_proj" has two meanings, the last two."""
    words = 2 if isinstance(model, GPT2) else 1
    return sorted({".".join(place.split(".")[-words:]) for place in places})


def size_of(model, place):
    """(out_features, in_features) of the projection at a place, whatever wraps the attention it belongs to."""
    parent, _, own = place.rpartition(".")
    module = model.get_submodule(parent)
    while hasattr(module, "base"):
        module = module.base
    return getattr(module, own).out_features, getattr(module, own).in_features


# ── query, key and value in one matrix ───────────────────────────────────────────────────────────────────────────────


def all_qkv(tensors):
    """Every layer's three places, where a dictionary by place has at least one of them."""
    parents = dict.fromkeys(place.rpartition(".")[0] for place in tensors if own_name(place) in QKV)
    return [f"{parent}.{name}" for parent in parents for name in QKV]


def fuse(tensors, absent, join):
    """Joins each layer's query, key and value entry into one of c_attn; absent(place) stands for a missing one."""
    fused = {place: tensor for place, tensor in tensors.items() if own_name(place) not in QKV}
    for three in zip(*[iter(all_qkv(tensors))] * 3):
        parent = three[0].rpartition(".")[0]
        fused[f"{parent}.c_attn"] = join([tensors[place] if place in tensors else absent(place) for place in three])
    return fused


def split(place, tensor, axis):
    """A c_attn entry as those of query, key and value: cut along an axis, or for None the same one three times."""
    parent, _, own = place.rpartition(".")
    if own != "c_attn":
        return {place: tensor}
    three = tensor.chunk(3, axis) if axis is not None else [tensor] * 3
    return {f"{parent}.{name}": part for name, part in zip(QKV, three)}


# ── adaption prompts ─────────────────────────────────────────────────────────────────────────────────────────────────


def their_joins(model):
    """Where PEFT's adaption prompt adds its term, the cheapest of equal ways first (llama_adapter.AdaptedAttention)."""
    if isinstance(model, GPT2):
        return ("unprojected",)
    return ("after",) if model.config.attention_bias else ("before", "after")


def write_adaption_prompt(model, part, tensors):
    if (part["gate"], part["tanh"]) != ("layer", False) or part["join"] not in their_joins(model):
        return None
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": part["prompt_length"], "adapter_layers": part["layers"] or len(model.layers)}
    config["target_modules"] = "attn" if isinstance(model, GPT2) else "self_attn"
    theirs = {}
    for name, tensor in tensors.items():
        place, _, own = name.rpartition(".")
        theirs[to_theirs(model, f"{place}.adaption_{own}")] = tensor[None] if own == "prompt" else tensor
    return config, theirs


def read_adaption_prompt(model, config, tensors):
    own = {to_ours(model, name).replace("adaption_", ""): tensor for name, tensor in tensors.items()}
    own = {name: tensor[0] if name.endswith("prompt") else tensor for name, tensor in own.items()}
    shape = {"prompt_length": config["adapter_len"], "layers": config["adapter_layers"]}
    return {"method": "llama_adapter", **shape, "gate": "layer", "tanh": False, "join": their_joins(model)[0]}, own


# ── prompt and prefix tuning ─────────────────────────────────────────────────────────────────────────────────────────


def write_prompt_tuning(model, part, tensors):
    (prompt,) = tensors.values()  # (K, D)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1]}
    config |= {"num_layers": len(model.layers), "num_attention_heads": model.config.num_attention_heads, "num_transformer_submodules": 1}
    return config, {"prompt_embeddings": prompt}


def read_prompt_tuning(model, config, tensors):
    return {"method": "prompt_tuning", "prompt_length": config["num_virtual_tokens"]}, {"embed_tokens.prompt": tensors["prompt_embeddings"]}


def write_prefix_tuning(model, part, tensors):
    if part["reparameterize"] is not None:
        return None  # PEFT's MLP is one for all layers
    kv = torch.stack([tensors[f"layers.{i}.self_attn.{own}"] for i in range(len(model.layers)) for own in ("keys", "values")])
    _, G, K, d = kv.shape  # (2L, G, K, d)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": K, "token_dim": G * d, "num_layers": len(model.layers)}
    config |= {"num_attention_heads": G, "num_transformer_submodules": 1, "encoder_hidden_size": G * d, "prefix_projection": False}
    return config, {"prompt_embeddings": kv.permute(2, 0, 1, 3).reshape(K, -1)}  # (K, 2L·G·d)


def read_prefix_tuning(model, config, tensors):
    table, K, L = tensors["prompt_embeddings"], config["num_virtual_tokens"], len(model.layers)
    G, d = model.layers[0].self_attn.num_kv_heads, model.layers[0].self_attn.head_dim
    if table.shape != (K, 2 * L * G * d):
        raise ValueError(f"prompt_embeddings has shape {tuple(table.shape)}; {K} virtual tokens on this base need {(K, 2 * L * G * d)}")
    kv = table.view(K, L, 2, G, d).permute(1, 2, 3, 0, 4)  # (L, 2, G, K, d)
    own = {f"layers.{i}.self_attn.{name}": half for i, two in enumerate(kv) for name, half in zip(("keys", "values"), two)}
    return {"method": "prefix_tuning", "prefix_length": K}, own


# ── IA3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_ia3(model, part, tensors):
    gpt2 = isinstance(model, GPT2)
    if gpt2 and set(part["inputs"]) & set(QKV):
        return None  # one input of c_attn serves all three there
    own = {name.removesuffix(".scale"): tensor for name, tensor in tensors.items()}
    own = {place: tensor[None] if own_name(place) in part["inputs"] else tensor[:, None] for place, tensor in own.items()}
    if gpt2:
        own = fuse(own, lambda place: torch.ones(size_of(model, place)[0], 1), torch.cat)
    theirs = {to_theirs(model, f"{place}.ia3_l"): tensor for place, tensor in own.items()}
    places = {name.removesuffix(".ia3_l"): tensor for name, tensor in theirs.items()}
    inputs = [place for place, tensor in places.items() if tensor.shape[0] == 1]
    config = {"peft_type": "IA3", "target_modules": targets_of(model, places), "feedforward_modules": targets_of(model, inputs)}
    return config | {"fan_in_fan_out": gpt2}, theirs


def read_ia3(model, config, tensors):
    own = {}
    for name, tensor in tensors.items():
        place, suffix, _ = to_ours(model, name).rpartition(".ia3_l")
        if not suffix or tensor.dim() != 2 or 1 not in tensor.shape:
            raise ValueError(f"the tensor {name} of shape {tuple(tensor.shape)} is none of IA3's; those end in ia3_l and have one row or one column")
        own |= split(place, tensor, 0) if tensor.shape[1] == 1 else {place: tensor}
    outputs, inputs = (sorted({own_name(place) for place, tensor in own.items() if tensor.shape[axis] == 1}) for axis in (1, 0))
    return {"method": "ia3", "outputs": outputs, "inputs": inputs}, {f"{place}.scale": tensor.flatten() for place, tensor in own.items()}


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_lora(model, part, tensors):
    A, B = ({name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)} for end in (".A", ".B"))
    gpt2, rank, alpha = isinstance(model, GPT2), part["rank"], part["alpha"]
    if gpt2:
        stacked = max(1, len(set(part["targets"]) & set(QKV)))
        rank, alpha = rank * stacked, alpha * stacked  # one rank for the file: the same alpha / rank
        A = fuse(A, lambda place: torch.zeros(0, size_of(model, place)[1]), torch.cat)
        B = fuse(B, lambda place: torch.zeros(size_of(model, place)[0], 0), lambda blocks: torch.block_diag(*blocks))
        A = {place: F.pad(tensor, (0, 0, 0, rank - tensor.shape[0])) for place, tensor in A.items()}
        B = {place: F.pad(tensor, (0, rank - tensor.shape[1])) for place, tensor in B.items()}
    theirs = {to_theirs(model, f"{place}.lora_{own}.weight"): tensor for own, matrix in (("A", A), ("B", B)) for place, tensor in matrix.items()}
    places = {name.rpartition(".lora_")[0] for name in theirs}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets_of(model, places), "fan_in_fan_out": gpt2}, theirs


def read_lora(model, config, tensors):
    own = {}
    for name, tensor in tensors.items():
        place, _, rest = to_ours(model, name).rpartition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise ValueError(f"the tensor {name} is none of LoRA's; those end in lora_A.weight or lora_B.weight")
        own |= {f"{p}.{rest[0]}": half for p, half in split(place, tensor, None if rest[0] == "A" else 0).items()}
    targets = sorted({own_name(name.rpartition(".")[0]) for name in own})
    return {"method": "lora", "rank": config["r"], "alpha": config["lora_alpha"], "targets": targets}, own


WRITERS = {
    "llama_adapter": write_adaption_prompt,
    "prompt_tuning": write_prompt_tuning,
    "prefix_tuning": write_prefix_tuning,
    "ia3": write_ia3,
    "lora": write_lora,
}
READERS = {
    "ADAPTION_PROMPT": read_adaption_prompt,
    "PROMPT_TUNING": read_prompt_tuning,
    "PREFIX_TUNING": read_prefix_tuning,
    "IA3": read_ia3,
    "LORA": read_lora,
}
