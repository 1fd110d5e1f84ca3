"""Translation between our adapters and the PEFT library's files.

What PEFT calls a method's tensors and options stands with the method: `to_peft(options, tensors, layout)` gives
(config, tensors) in PEFT's form, or None where PEFT would compute something else; `from_peft(config, tensors, layout)`
gives (options, tensors) of ours, for a file of the method's PEFT_TYPE that asks for nothing special but its PEFT_KEYS.
Both name places as our models do; here the places become those of transformers' model, and back.

Where an architecture keeps several of our matrices in one, such as query, key and value in `c_attn` (GPT-2) or
`qkv_proj` (Phi-3), what stands at our places is joined into one and cut again: end to end, or for low-rank paths
stacked, each with rows and columns of its own; one that PEFT trained is read as several that share A's values.
"""

import re

import torch
import torch.nn.functional as F

from ..checkpoints.architectures import architecture_of
from ..checkpoints.files import believed, shortened
from ..checkpoints.tensors import rename
from . import METHODS, walk

# What a configuration may say without changing what is computed at inference.
NEUTRAL = {
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "peft_version", "revision", "auto_mapping",
    "target_modules", "feedforward_modules", "init_ia3_weights", "init_lora_weights", "lora_dropout", "r", "lora_alpha",
    "fan_in_fan_out", "adapter_len", "adapter_layers", "megatron_core", "runtime_config", "qalora_group_size",
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
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
    "exclude_modules": (list,),
    "layers_pattern": (list,),
}
# Why a file that asks for it is refused.
REFUSED = {
    "modules_to_save": "whole layers were trained beside the adapter, and an adapter here holds none",
    "rank_pattern": "an adapter here has one rank",
    "alpha_pattern": "an adapter here has one alpha",
    "bias": "the base's own biases were trained too, and the base here stays frozen",
    "lora_bias": "B has a bias there, and here none",
    "layer_replication": "layers of the base are used several times",
    "trainable_token_indices": "rows of the embedding were trained too, and the base here stays frozen",
    "target_parameters": "parameters that belong to no linear layer were adapted",
    "prefix_projection": "the prefix goes through an MLP that all layers share, and here each layer has its own",
}


class Layout:
    """What a method's `to_peft` and `from_peft` need to know of the base, by the places of our models."""

    def __init__(self, model):
        self.row, self.modules = architecture_of(model.config), dict(reversed(list(walk(model))))  # inner ones count
        self.transposed = self.row.transposed
        self.fused = {matrix.rpartition(".")[2]: parts for matrix, parts in self.row.fused.items()}
        # every linear layer by our names, and as PEFT finds them, several of ours in one
        self.parts = [place for place, module in self.modules.items() if hasattr(module, "in_features")]
        self.matrices = set(self.fuse(dict.fromkeys(self.parts), lambda place: None, lambda parts: None))
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

    def named(self, places):
        """How PEFT is told of these places, so that it takes no others: by their names, where all layers have them, or
        one by one."""
        kinds = {place.rpartition(".")[2] for place in places}
        every = {place for place in self.matrices if place.rpartition(".")[2] in kinds}
        if every == {*places}:
            return self.targets(places)
        return sorted(self.theirs(f"{place}.").removeprefix("base_model.model.").rstrip(".") for place in places)

    def asked(self, places):
        """target_modules of PEFT's LoRA, and layers_to_transform where the same parts of some layers are meant."""
        numbers = {int(place.split(".")[1]) for place in places if place.startswith("layers.")}
        kinds = {place.rpartition(".")[2] for place in places}
        there = {p for p in self.matrices if p.rpartition(".")[2] in kinds and p.startswith("layers.")}
        there = {place for place in there if int(place.split(".")[1]) in numbers}
        if len(numbers) < self.num_layers and there == {*places}:
            return {"target_modules": self.targets(places), "layers_to_transform": sorted(numbers)}
        return {"target_modules": self.named(places)}

    def given(self, *groups, names=("targets",)):
        """The options of a method that put it at these places: own names, and `layers` where not all have them; whole
        names where layers differ."""
        groups = [list(group) for group in groups]
        numbers = {int(place.split(".")[1]) for group in groups for place in group if place.startswith("layers.")}
        some = len(numbers) < self.num_layers and not any(place == "lm_head" for group in groups for place in group)
        options = {}
        for name, group in zip(names, groups):
            kinds = {place.rpartition(".")[2] for place in group}
            every = {place for place in self.parts if place.rpartition(".")[2] in kinds}
            if some:
                every = {p for p in every if p.startswith("layers.") and int(p.split(".")[1]) in numbers}
            options[name] = sorted(kinds if every == {*group} else group)
        return options | ({"layers": sorted(numbers)} if some and numbers else {})

    def promised(self, config):
        """The places that a configuration asks for, by PEFT's rules; None where it asks by a regular expression, which
        is not run for a stranger: the tensors' names say the same."""
        targets, excluded = config["target_modules"], config.get("exclude_modules") or []
        numbers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
        numbers = [numbers] if isinstance(numbers, int) else numbers or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        by_rule = isinstance(targets, str) and targets != "all-linear"
        if by_rule or isinstance(excluded, str) or not all(pattern.isidentifier() for pattern in patterns):
            return None
        found, word = set(), self.theirs("layers.").removeprefix(f"base_model.model.{self.row.prefix}").rstrip(".")
        for place in self.matrices:
            name = self.theirs(f"{place}.").removeprefix("base_model.model.").rstrip(".")
            number = re.match(rf".*?\.{word}\.(\d+)\.", name)
            counted = not numbers or (number and int(number[1]) in numbers and (not patterns or word in patterns))
            ends = {name[i + 1 :] for i, letter in enumerate(name) if letter == "."} | {name}
            taken = (
                place != "lm_head" if targets == "all-linear" else name in targets or (ends & {*targets} and counted)
            )
            if taken and not ends & {*excluded}:
                found.add(place)
        return found

    def refuse_others(self, config, adapted):
        """ValueError where a file adapts other places than its configuration asks for."""
        promised = self.promised(config)
        if promised is not None and (unlike := sorted(promised ^ adapted)):
            asked, has = ("asks for", "nothing") if unlike[0] in promised else ("does not ask for", "an adapter")
            name = self.theirs(f"{unlike[0]}.").removeprefix("base_model.model.").rstrip(".")
            raise ValueError(
                f"it {asked} {name} (target_modules and what stands beside it), for which the weights have {has}: "
                "the two files do not belong together"
            )

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
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}, which may have changed the base's weights too; "
            "that is not honoured here"
        )
    plain = lambda value: value is None or value is False or value in ("none", {}, [])  # noqa: E731
    asked = [key for key, value in config.items() if key not in NEUTRAL and not plain(value)]
    refused = {name: [key for key in asked if key not in getattr(methods[name], "PEFT_KEYS", ())] for name in methods}
    name = next((name for name in methods if not refused[name]), None)
    if name is None:
        key = min(refused.values(), key=len)[0]
        reason = f": {REFUSED[key]}" if key in REFUSED else ""
        raise ValueError(f"{key} is {shortened(config[key])}, which is not honoured here{reason}; only its default is")
    method, layout = methods[name], Layout(model)
    renamed = {layout.ours(key): tensor for key, tensor in tensors.items()}
    for key in [key for key in renamed if key.endswith(".base_layer.weight")]:  # PEFT writes the head's along
        own, given = layout.modules.get(key.removesuffix(".base_layer.weight")), renamed.pop(key)
        own = getattr(own, "weight", torch.empty(0)).detach().cpu()
        if own.shape != given.shape or not (
            torch.equal(own.to(given.dtype), given) or torch.equal(own, given.to(own.dtype))
        ):
            raise ValueError(f"the weights bring {key}, and the base here has other numbers there: load its own base")
    options, own = method.from_peft(config, renamed, layout)
    if config.get("target_modules") is not None and kind != "ADAPTION_PROMPT":
        layout.refuse_others(config, {re.split(r"\.(?:lora_|ia3_l)", key)[0] for key in renamed})
    named = {}
    for key, tensor in own.items():
        place, _, last = key.rpartition(".")
        named[f"{place}.{name}.{last}"] = tensor
    return [{"method": name, **options}], named
