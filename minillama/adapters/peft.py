"""Translation between our adapters and the PEFT library's files.

What PEFT calls a method's tensors and options stands with the method: `to_peft(options, tensors, layout)` gives
(config, tensors) in PEFT's form, or None where PEFT would compute something else; `from_peft(config, tensors, layout)`
gives (options, tensors) of ours, for a file of the method's PEFT_TYPE that asks for nothing special but its PEFT_KEYS.
Both name places as our models do; here the places become those of transformers' model, and back.

Where an architecture keeps query, key and value in one matrix, `c_attn` (GPT-2), what stands at our three places is
joined into one and cut again: end to end, or for low-rank paths stacked, each with rows and columns of its own; one
that PEFT trained is read as three that share A's values.
"""

import torch
import torch.nn.functional as F

from ..checkpoints.architectures import architecture_of, rename
from ..checkpoints.files import believed
from . import METHODS, walk

QKV = ("q_proj", "k_proj", "v_proj")
# What a configuration may say without changing what is computed at inference.
NEUTRAL = {
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
    "target_modules", "feedforward_modules", "init_ia3_weights", "init_lora_weights", "lora_dropout", "r", "lora_alpha",
    "fan_in_fan_out", "adapter_len", "adapter_layers", "megatron_core", "runtime_config", "qalora_group_size",
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "encoder_hidden_size", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs",
}  # fmt: skip


# What the keys that decide may hold, and for numbers the least and the largest that are believed.
TYPES = {
    "peft_type": (str,),
    "r": (int, 1, 2**16),
    "adapter_len": (int, 1, 2**20),
    "adapter_layers": (int, 1, 2**12),
    "num_virtual_tokens": (int, 1, 2**20),
    "lora_alpha": (float, -1e6, 1e6),
    "lora_dropout": (float, 0, 1),
    "fan_in_fan_out": (bool,),
    "use_dora": (bool,),
    "use_rslora": (bool,),
    "target_modules": (list,),
    "feedforward_modules": (list,),
}


class Layout:
    """What a method's `to_peft` and `from_peft` need to know of the base, by the places of our models."""

    def __init__(self, model):
        self.row, self.modules = architecture_of(model.config), dict(reversed(list(walk(model))))  # inner ones count
        self.fused = self.row.fused
        self.qkv = {place for place in self.modules if place.rpartition(".")[2] in QKV}
        self.attention = self.row.words.get("self_attn", "self_attn")  # what transformers calls it
        attention = self.modules["layers.0.self_attn"]
        self.num_layers, self.num_heads = len(model.layers), attention.num_heads
        self.num_kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.output_bias = self.modules["layers.0.self_attn.o_proj"].bias is not None

    def theirs(self, name):
        """ "layers.3.mlp.down_proj.x" -> "base_model.model.model.layers.3.mlp.down_proj.x", or as a GPT-2 has it."""
        if "." not in name:
            return name  # a table of prompts, which belongs to no module
        prefix = "" if name.startswith("lm_head.") else self.row.prefix
        return "base_model.model." + prefix + rename(name, self.row.words)

    def ours(self, name):
        """The way back; a c_attn keeps its name, `split` cuts it."""
        name = name.removeprefix("base_model.model.").removeprefix(self.row.prefix)
        return rename(name, {new: old for old, new in self.row.words.items()})

    def targets(self, places):
        """The names PEFT knows modules by: the last word, and where that has two meanings (GPT-2), the last two."""
        words = 2 if self.fused else 1
        names = [self.theirs(f"{place}.").removeprefix("base_model.model.").rstrip(".") for place in places]
        return sorted({".".join(name.split(".")[-words:]) for name in names})

    def size(self, place):
        """(out_features, in_features) of the projection at a place."""
        return self.modules[place].out_features, self.modules[place].in_features

    def fuse(self, tensors, absent, join):
        """Joins each layer's query, key and value entry into one of c_attn; absent(place) stands for a missing one."""
        if not self.fused:
            return tensors
        fused = {place: tensor for place, tensor in tensors.items() if place not in self.qkv}
        for parent in dict.fromkeys(place.rpartition(".")[0] for place in tensors if place in self.qkv):
            three = [f"{parent}.{name}" for name in QKV]
            fused[f"{parent}.c_attn"] = join([tensors[at] if at in tensors else absent(at) for at in three])
        return fused

    def split(self, place, tensor, axis):
        """A c_attn entry as those of query, key and value: cut along an axis, or for None the same one three times."""
        parent, _, own = place.rpartition(".")
        if own != "c_attn":
            return {place: tensor}
        three = tensor.chunk(3, axis) if axis is not None else [tensor] * 3
        return {f"{parent}.{name}": part for name, part in zip(QKV, three)}

    def stack_low_rank(self, A, B):
        """(times, A, B): where three places are one matrix, their low-rank paths of rank r as one of rank times · r."""
        if not self.fused:
            return 1, A, B
        rank = next(iter(A.values())).shape[0]
        times = max(1, len({place.rpartition(".")[2] for place in A} & set(QKV)))
        A = self.fuse(A, lambda place: torch.zeros(0, self.size(place)[1]), torch.cat)
        B = self.fuse(B, lambda place: torch.zeros(self.size(place)[0], 0), lambda blocks: torch.block_diag(*blocks))
        A = {place: F.pad(tensor, (0, 0, 0, times * rank - tensor.shape[0])) for place, tensor in A.items()}
        B = {place: F.pad(tensor, (0, times * rank - tensor.shape[1])) for place, tensor in B.items()}
        return times, A, B


def to_peft(model, parts, tensors):
    """(config, tensors) in PEFT's layout for an adapter of ours, or None where it has no such form."""
    if len(parts) != 1 or not hasattr(METHODS[parts[0]["method"]], "PEFT_TYPE"):
        return None
    (part,), layout = parts, Layout(model)
    tensors = {name.replace(f".{part['method']}.", ".", 1): tensor for name, tensor in tensors.items()}
    found = METHODS[part["method"]].to_peft(part, tensors, layout)
    if found is None:
        return None
    config, theirs = found
    return config, {layout.theirs(name): tensor for name, tensor in theirs.items()}


def from_peft(model, config, tensors):
    """(parts, tensors) of ours from a PEFT folder's content; ValueError names what it asks and we do not do."""
    for key, type_ in TYPES.items():
        if config.get(key) is not None:
            believed(key, config[key], *type_)
    kind = config.get("peft_type")
    known = {name: method for name, method in METHODS.items() if hasattr(method, "PEFT_TYPE")}
    methods = {name: method for name, method in known.items() if method.PEFT_TYPE == kind}
    if not methods:
        kinds = dict.fromkeys(method.PEFT_TYPE for method in known.values())
        raise ValueError(f"peft_type is {kind!r}; {', '.join(kinds)} and MINILLAMA can be read")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}, which may have changed the base's weights too; "
            "that is not honoured here"
        )
    asked = [key for key, value in config.items() if key not in NEUTRAL and value not in (None, False, "none", {}, [])]
    refused = {name: [key for key in asked if key not in getattr(methods[name], "PEFT_KEYS", ())] for name in methods}
    name = next((name for name in methods if not refused[name]), None)
    if name is None:
        key = min(refused.values(), key=len)[0]
        raise ValueError(f"{key} is {config[key]!r}, which is not honoured here; only its default is")
    method, layout = methods[name], Layout(model)
    options, own = method.from_peft(config, {layout.ours(key): tensor for key, tensor in tensors.items()}, layout)
    named = {}
    for key, tensor in own.items():
        place, _, last = key.rpartition(".")
        named[f"{place}.{name}.{last}"] = tensor
    return [{"method": name, **options}], named
