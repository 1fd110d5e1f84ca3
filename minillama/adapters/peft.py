"""Translation between our adapters and the PEFT library's files.

What PEFT calls a method's tensors and options stands with the method: `to_peft(options, tensors, layout)` gives
(config, tensors) in PEFT's form, or None where PEFT would compute something else; `from_peft(config, tensors, layout)`
gives (options, tensors) of ours, for a file of the method's PEFT_TYPE that asks for nothing special but its PEFT_KEYS.
Both name places as our models do; here the places become those of transformers' model, and back.

Where an architecture keeps several of our matrices in one, such as query, key and value in `c_attn` (GPT-2) or
`qkv_proj` (Phi-3), what stands at our places is joined into one and cut again: end to end, or for low-rank paths
stacked, each with rows and columns of its own; one that PEFT trained is read as several that share A's values.
"""

import torch
import torch.nn.functional as F

from ..checkpoints.architectures import architecture_of, rename
from ..checkpoints.files import believed
from . import METHODS, walk

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
        self.transposed = self.row.transposed
        self.fused = {matrix.rpartition(".")[2]: parts for matrix, parts in self.row.fused.items()}
        self.attention = self.row.words.get("self_attn", "self_attn")  # what transformers calls it
        attention = self.modules["layers.0.self_attn"]
        self.num_layers, self.num_heads = len(model.layers), attention.num_heads
        self.num_kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.prompt_scale = model.config.embedding_multiplier if self.row.multiplied else 1.0  # of theirs beside ours
        self.output_bias = self.modules["layers.0.self_attn.o_proj"].bias is not None

    def theirs(self, name):
        """ "layers.3.mlp.down_proj.x" -> "base_model.model.model.layers.3.mlp.down_proj.x", or as a GPT-2 has it."""
        if "." not in name:
            return name  # a table of prompts, which belongs to no module
        prefix = "" if name.startswith("lm_head.") else self.row.prefix
        return "base_model.model." + prefix + rename(name, self.row.words)

    def ours(self, name):
        """The way back; a fused matrix keeps its name, `split` cuts it."""
        name = name.removeprefix("base_model.model.").removeprefix(self.row.prefix)
        return rename(name, {new: old for old, new in self.row.words.items()})

    def targets(self, places):
        """The names PEFT knows modules by: the last word, and where that has two meanings (GPT-2), the last two."""
        words = 2 if self.transposed else 1
        names = [self.theirs(f"{place}.").removeprefix("base_model.model.").rstrip(".") for place in places]
        return sorted({".".join(name.split(".")[-words:]) for name in names})

    def size(self, place):
        """(out_features, in_features) of the projection at a place."""
        return self.modules[place].out_features, self.modules[place].in_features

    def is_fused(self, place):
        """Whether a place is a part of a matrix that holds several."""
        return any(place.rpartition(".")[2] in parts for parts in self.fused.values())

    def fuse(self, tensors, absent, join):
        """Joins the entries of each fused matrix's parts into one; absent(place) stands for a missing one."""
        joined = {place: tensor for place, tensor in tensors.items() if not self.is_fused(place)}
        for matrix, parts in self.fused.items():
            parents = [place.rpartition(".")[0] for place in tensors if place.rpartition(".")[2] in parts]
            for parent in dict.fromkeys(parents):
                places = [f"{parent}.{part}" for part in parts]
                joined[f"{parent}.{matrix}"] = join([tensors[at] if at in tensors else absent(at) for at in places])
        return joined

    def split(self, place, tensor, axis):
        """A fused matrix's entry as those of its parts: cut along an axis, or for None the same one for each."""
        parent, _, matrix = place.rpartition(".")
        if matrix not in self.fused:
            return {place: tensor}
        places = [f"{parent}.{part}" for part in self.fused[matrix]]
        if axis is None:
            return dict.fromkeys(places, tensor)
        rows = [self.size(at)[0] for at in places]
        if tensor.shape[axis] != sum(rows):
            raise ValueError(f"{place} has an entry of {tensor.shape[axis]} rows and this base needs {sum(rows)}")
        return dict(zip(places, tensor.split(rows, axis)))

    def stack_low_rank(self, A, B):
        """(times, A, B): where several places are one matrix, their paths of rank r as one of rank times · r."""
        if not self.fused:
            return 1, A, B
        rank, used = next(iter(A.values())).shape[0], {place.rpartition(".")[2] for place in A}
        times = max(1, *(len(used & set(parts)) for parts in self.fused.values()))
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
