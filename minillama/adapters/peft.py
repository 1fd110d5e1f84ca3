"""Translation between our adapters and the PEFT library's files, for LLaMA, Mistral and GPT-2.

PEFT names a tensor by the module of transformers' model it belongs to. For LLaMA and Mistral these are our own names
behind a prefix. For GPT-2 the query, key and value projections are one matrix there, `c_attn`: IA3's three vectors are
laid end to end (ones where we scale nothing), and LoRA's low-rank paths are stacked, each with rows and columns of its
own; a stacked one that PEFT trained is read as three that share A's values.
"""

import torch

from ..gpt2 import GPT2
from ..pretrained import GPT2_NAMES, rename

KINDS = ("ADAPTION_PROMPT", "PREFIX_TUNING", "PROMPT_TUNING", "IA3", "LORA")
QKV = ("q_proj", "k_proj", "v_proj")
# What a configuration may say without changing what is computed at inference.
NEUTRAL = {
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
    "target_modules", "feedforward_modules", "init_ia3_weights", "init_lora_weights", "lora_dropout", "r", "lora_alpha",
    "fan_in_fan_out", "adapter_len", "adapter_layers", "loftq_config", "eva_config", "corda_config", "megatron_core",
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "encoder_hidden_size",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "lora_ga_config", "arrow_config", "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip


def to_theirs(model, name):
    """"layers.3.mlp.down_proj.x" -> "base_model.model.model.layers.3.mlp.down_proj.x", or GPT-2's name for it."""
    if isinstance(model, GPT2):
        return "base_model.model.transformer." + rename(name, {new: old for old, new in GPT2_NAMES.items()} | {"self_attn": "attn"})
    return f"base_model.model.model.{name}"


def to_ours(model, name):
    name = name.removeprefix("base_model.model.")
    return rename(name.removeprefix("transformer."), GPT2_NAMES) if isinstance(model, GPT2) else name.removeprefix("model.")


def targets_of(tensors, model):
    """The names PEFT knows modules by: the last word, and for GPT-2, where "c_proj" has two meanings, the last two."""
    words = 2 if isinstance(model, GPT2) else 1
    return sorted({".".join(name.split(".")[-words - 1 :][:words]) for name in tensors})


def size_of(model, place):
    """(out_features, in_features) of the projection at a place, whatever wraps it."""
    module = model.get_submodule(place.rpartition(".")[0])
    while hasattr(module, "base"):
        module = module.base
    module = getattr(module, place.rpartition(".")[2])
    return module.out_features, module.in_features


def their_joins(model):
    """Where PEFT's adaption prompt adds its term, the cheapest of equal ways first."""
    if isinstance(model, GPT2):
        return ("unprojected",)
    return ("after",) if model.config.attention_bias else ("before", "after")


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def to_peft(model, parts, tensors):
    """(config, tensors) in PEFT's layout, or None where PEFT does not have this or would compute something else."""
    if len(parts) != 1:
        return None
    part, gpt2 = parts[0], isinstance(model, GPT2)
    if part["method"] == "llama_adapter":
        if (part["gate"], part["tanh"]) != ("layer", False) or part["join"] not in their_joins(model):
            return None
        config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": part["prompt_length"], "target_modules": "attn" if gpt2 else "self_attn"}
        config["adapter_layers"] = part["layers"] or len(model.layers)
        names = {"prompt": "adaption_prompt", "gate": "adaption_gate"}
        theirs = {}
        for name, tensor in tensors.items():
            place, _, own = name.rpartition(".")
            theirs[to_theirs(model, f"{place}.{names[own]}")] = tensor[None] if own == "prompt" else tensor
        return config, theirs
    if part["method"] == "prompt_tuning":
        (prompt,) = tensors.values()
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_transformer_submodules": 1}
        return config | {"num_layers": len(model.layers), "num_attention_heads": model.config.num_attention_heads}, {"prompt_embeddings": prompt}
    if part["method"] == "prefix_tuning":
        if part["reparameterize"] is not None:
            return None  # PEFT's MLP is one for all layers
        kv = [tensors[f"layers.{i}.self_attn.{own}"] for i in range(len(model.layers)) for own in ("keys", "values")]  # (G, K, d) each
        G, K, d = kv[0].shape
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": K, "token_dim": G * d, "num_attention_heads": G, "num_layers": len(model.layers)}
        config |= {"num_transformer_submodules": 1, "encoder_hidden_size": G * d, "prefix_projection": False}
        return config, {"prompt_embeddings": torch.stack(kv).permute(2, 0, 1, 3).reshape(K, -1)}  # (K, 2L·G·d)
    if part["method"] == "ia3":
        if gpt2 and set(part["inputs"]) & set(QKV):
            return None  # one input of c_attn serves all three there
        own = {name.removesuffix(".scale"): tensor for name, tensor in tensors.items()}
        own = {place: tensor[None] if place.rpartition(".")[2] in part["inputs"] else tensor[:, None] for place, tensor in own.items()}
        if gpt2:
            own = fuse(own, lambda place: torch.ones(size_of(model, place)[0], 1), torch.cat)
        theirs = {to_theirs(model, f"{place}.ia3_l"): tensor for place, tensor in own.items()}
        inputs = {name: tensor for name, tensor in theirs.items() if tensor.shape[0] == 1}
        config = {"peft_type": "IA3", "target_modules": targets_of(theirs, model), "feedforward_modules": targets_of(inputs, model)}
        return config | {"fan_in_fan_out": gpt2}, theirs
    if part["method"] == "lora":
        A = {name.removesuffix(".A"): tensor for name, tensor in tensors.items() if name.endswith(".A")}
        B = {name.removesuffix(".B"): tensor for name, tensor in tensors.items() if name.endswith(".B")}
        rank, alpha = part["rank"], part["alpha"]
        if gpt2:
            stacked = max(1, len(set(part["targets"]) & set(QKV)))
            zero = {place: torch.zeros(size_of(model, place)[0], 0) for place in all_qkv(A)}
            A = fuse(A, lambda place: torch.zeros(0, size_of(model, place)[1]), torch.cat)
            B = fuse(B, zero.get, lambda blocks: torch.block_diag(*blocks))
            rank, alpha = rank * stacked, alpha * stacked
            A = {place: torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0])) for place, tensor in A.items()}
            B = {place: torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1])) for place, tensor in B.items()}
        theirs = {to_theirs(model, f"{place}.lora_A.weight"): tensor for place, tensor in A.items()}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets_of({n.removesuffix(".weight"): 0 for n in theirs}, model)}
        theirs |= {to_theirs(model, f"{place}.lora_B.weight"): tensor for place, tensor in B.items()}
        return config | {"fan_in_fan_out": gpt2}, theirs
    return None


def all_qkv(tensors):
    """Every layer's three places, where a dictionary by place has at least one of them."""
    parents = dict.fromkeys(place.rpartition(".")[0] for place in tensors if place.rpartition(".")[2] in QKV)
    return [f"{parent}.{name}" for parent in parents for name in QKV]


def fuse(tensors, absent, join):
    """Joins each layer's query, key and value entry into one of `c_attn`; absent(place) stands for a missing one."""
    fused = {place: tensor for place, tensor in tensors.items() if place.rpartition(".")[2] not in QKV}
    places = all_qkv(tensors)
    for three in zip(*[iter(places)] * 3):
        parent = three[0].rpartition(".")[0].replace("self_attn", "attn")
        fused[f"{parent}.c_attn"] = join([tensors[place] if place in tensors else absent(place) for place in three])
    return fused


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def from_peft(model, config, tensors):
    """(parts, tensors) of ours from a PEFT folder's content; ValueError names what it asks and we do not do."""
    kind, gpt2 = config.get("peft_type"), isinstance(model, GPT2)
    if kind not in KINDS:
        raise ValueError(f"peft_type is {kind!r}; {', '.join(KINDS)} and MINILLAMA can be read")
    for key, value in config.items():
        if key not in NEUTRAL and value not in (None, False, "none", {}, []):
            raise ValueError(f"{key} is {value!r}, which is not honoured here; only its default is")
    if kind == "PROMPT_TUNING":
        return [{"method": "prompt_tuning", "prompt_length": config["num_virtual_tokens"]}], {"embed_tokens.prompt": tensors["prompt_embeddings"]}
    if kind == "PREFIX_TUNING":
        table, K, layers = tensors["prompt_embeddings"], config["num_virtual_tokens"], len(model.layers)
        attention = model.layers[0].self_attn
        G, d = attention.num_kv_heads, attention.head_dim
        if table.shape != (K, 2 * layers * G * d):
            raise ValueError(f"prompt_embeddings has shape {tuple(table.shape)}; {K} virtual tokens on this base need {(K, 2 * layers * G * d)}")
        kv = table.view(K, layers, 2, G, d).permute(1, 2, 3, 0, 4)  # (L, 2, G, K, d)
        own = {f"layers.{i}.self_attn.{name}": part for i, two in enumerate(kv) for name, part in zip(("keys", "values"), two)}
        return [{"method": "prefix_tuning", "prefix_length": K}], own
    tensors = {to_ours(model, name): tensor for name, tensor in tensors.items()}
    if kind == "ADAPTION_PROMPT":
        own = {name.replace(".attn.", ".self_attn.").replace("adaption_", ""): tensor for name, tensor in tensors.items()}
        own = {name: tensor[0] if name.endswith("prompt") else tensor for name, tensor in own.items()}
        shape = {"prompt_length": config["adapter_len"], "layers": config["adapter_layers"]}
        return [{"method": "llama_adapter", **shape, "gate": "layer", "tanh": False, "join": their_joins(model)[0]}], own
    if kind == "IA3":
        own = {}
        for name, tensor in tensors.items():
            place, suffix, _ = name.rpartition(".ia3_l")
            if not suffix or tensor.dim() != 2 or 1 not in tensor.shape:
                raise ValueError(f"the tensor {name} of shape {tuple(tensor.shape)} is none of IA3's; those end in ia3_l and have one row or one column")
            own |= split(place, tensor, 0) if tensor.shape[1] == 1 else {place: tensor}
        outputs, inputs = ({place.rpartition(".")[2] for place, tensor in own.items() if tensor.shape[1 - side] == 1} for side in (0, 1))
        part = {"method": "ia3", "outputs": sorted(outputs), "inputs": sorted(inputs)}
        return [part], {f"{place}.scale": tensor.flatten() for place, tensor in own.items()}
    own = {}
    for name, tensor in tensors.items():
        for suffix, matrix, side in ((".lora_A.weight", "A", None), (".lora_B.weight", "B", 0)):
            if name.endswith(suffix):
                own |= {f"{place}.{matrix}": part for place, part in split(name.removesuffix(suffix), tensor, side).items()}
                break
        else:
            raise ValueError(f"the tensor {name} is none of LoRA's; those end in lora_A.weight or lora_B.weight")
    targets = sorted({name.split(".")[-2] for name in own})
    return [{"method": "lora", "rank": config["r"], "alpha": config["lora_alpha"], "targets": targets}], own


def split(place, tensor, side):
    """A `c_attn` entry as those of query, key and value: cut along an axis, or for None the same one three times."""
    parent, _, own = place.rpartition(".")
    if own != "c_attn":
        return {place: tensor}
    three = tensor.chunk(3, side) if side is not None else [tensor] * 3
    return {f"{parent.replace('.attn', '.self_attn')}.{name}": part for name, part in zip(QKV, three)}
