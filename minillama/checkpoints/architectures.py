"""One row per architecture: how Hugging Face's config.json and tensor names become ours, and back.

A row says what differs; the functions below do for every row the same. To add an architecture that our page of LLaMA
computes, add a row.
"""

import dataclasses
from dataclasses import dataclass, field

import torch

from ..gpt2 import GPT2, GPT2Config
from ..llama import LLaMA, LLaMAConfig
from .files import believed, shortened

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of its rope_scaling

# What each field of a configuration may be: its type, and for numbers the least and the largest that are believed.
TYPES = {
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**18),
    "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 1024),
    "num_attention_heads": (int, 1, 2**12),
    "num_key_value_heads": (int, 1, 2**12),
    "head_dim": (int, 1, 2**12),
    "max_position_embeddings": (int, 1, 2**28),
    "sliding_window": (int, 1, 2**28),
    "rms_norm_eps": (float, 1e-12, 1e-1),
    "layer_norm_eps": (float, 1e-12, 1e-1),
    "rope_theta": (float, 1.0, 1e12),
    "attention_bias": (bool,),
    "attention_output_bias": (bool,),
    "mlp_bias": (bool,),
    "tie_word_embeddings": (bool,),
    "factor": (float, 1.0, 1e6),
    "low_freq_factor": (float, 1e-3, 1e6),
    "high_freq_factor": (float, 1e-3, 1e6),
    "original_max_position_embeddings": (float, 1.0, 2**28),
}


def honest(field, value, key=None):
    """The value of a field of ours, where it is of the field's type and within its bounds; ValueError names the key."""
    return believed(key or field, value, *TYPES[field])


@dataclass(frozen=True)
class Architecture:
    """model, config: our classes.  theirs: transformers' class.
    keys: its names of our configuration's fields, where they differ.
    absent: what a key that is missing means there, where our default is another.
    fixed: what our configuration must say, since config.json there has no key for it.
    honoured: keys that must be missing or have this value, since we compute nothing else.
    prefix, words: of tensor names, {ours: theirs}.  fused: query, key and value are one matrix, and matrices of layers
    lie transposed.
    """

    model: type
    config: type
    theirs: str
    keys: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)
    honoured: dict = field(default_factory=dict)
    prefix: str = "model."
    words: dict = field(default_factory=dict)
    fused: bool = False


ROPE = dict(hidden_act="silu", partial_rotary_factor=1.0, quantization_config=None)
ARCHITECTURES = {
    "llama": Architecture(
        LLaMA, LLaMAConfig, "LlamaForCausalLM", honoured=ROPE,
        fixed=dict(sliding_window=None, attention_output_bias=None),
    ),
    "mistral": Architecture(
        LLaMA, LLaMAConfig, "MistralForCausalLM", honoured=ROPE,
        absent=dict(num_key_value_heads=8, intermediate_size=14336, sliding_window=4096),
        fixed=dict(attention_bias=False, attention_output_bias=None, mlp_bias=False),
    ),
    "qwen2": Architecture(  # Qwen2 and Qwen2.5: biases on queries, keys and values alone
        LLaMA, LLaMAConfig, "Qwen2ForCausalLM", honoured=ROPE | dict(use_sliding_window=False),
        absent=dict(max_position_embeddings=32768, intermediate_size=22016, num_key_value_heads=32),
        fixed=dict(attention_bias=True, attention_output_bias=False, mlp_bias=False, sliding_window=None),
    ),
    "gpt2": Architecture(
        GPT2, GPT2Config, "GPT2LMHeadModel", prefix="transformer.", fused=True,
        keys={
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
            "layer_norm_eps": "layer_norm_epsilon",
        },
        honoured=dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=True, tie_word_embeddings=True,
            scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        ),
        words={
            "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
            "self_attn": "attn",
        },
    ),
}  # fmt: skip


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_config(content):
    """(configuration of ours, row) of a config.json's content; ValueError names a key that cannot be honoured."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        *most, last = ARCHITECTURES
        raise ValueError(f"model_type is {shortened(kind)}; this project has {', '.join(most)} and {last}")
    row = ARCHITECTURES[kind]
    for key, value in row.honoured.items():
        values = value if isinstance(value, tuple) else (value,)
        found = content.get(key, values[0])
        if not any(type(found) is type(value) and found == value for value in values):
            raise ValueError(f"{key} is {shortened(found)}; only {values[0]!r} can be honoured")
    known = {own.name for own in dataclasses.fields(row.config)} - {"rope_scaling", "rope_theta", *row.fixed}
    values = {own: content.get(row.keys.get(own, own)) for own in known}
    values = {own: honest(own, value, row.keys.get(own, own)) for own, value in values.items() if value is not None}
    for key, value in row.absent.items():
        if key not in content:  # an explicit null says None
            values[key] = value
    if row.config is LLaMAConfig:
        values |= read_rope(content)
    return row.config(**values | row.fixed), row


def read_rope(content):
    """rope_theta and rope_scaling: transformers 5 writes rope_parameters,
    earlier releases rope_theta and rope_scaling."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = content.get(key) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{key} is {shortened(found)}; needed is an object with names and values")
        rope |= found
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {shortened(rope['partial_rotary_factor'])}; only 1.0 can be honoured"
        )
    theta = {"rope_theta": float(honest("rope_theta", rope.get("rope_theta", content.get("rope_theta", 10000.0))))}
    if kind == "default":
        return theta
    if kind != "llama3":
        raise ValueError(f"rope_type is {shortened(kind)}; only 'default' and 'llama3' can be honoured")
    if missing := [key for key in LLAMA3 if key not in rope]:
        raise ValueError(f"rope_type is 'llama3' and {missing[0]} is missing beside it")
    return theta | {"rope_scaling": tuple(float(honest(key, rope[key])) for key in LLAMA3)}


def architecture_of(config):
    """The row that can say all that a configuration of ours says."""
    for row in ARCHITECTURES.values():
        if row.config is type(config) and all(getattr(config, key) == value for key, value in row.fixed.items()):
            return row
    raise ValueError(f"no architecture of transformers has what this configuration asks for together: {config}")


def write_config(config):
    """The content of config.json for a configuration of ours; transformers reads it."""
    row = architecture_of(config)
    (kind,) = (kind for kind, other in ARCHITECTURES.items() if other is row)
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in row.fixed}
    for key, value in row.honoured.items():
        if value is not None and key != "partial_rotary_factor":
            values[key] = value[0] if isinstance(value, tuple) else value
    if row.config is LLaMAConfig:
        theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
        values["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
        values["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        if scaling is not None:
            values["rope_parameters"] |= {"rope_type": "llama3"} | dict(zip(LLAMA3, scaling))
            values["rope_parameters"][LLAMA3[-1]] = int(scaling[-1])
    named = {row.keys.get(name, name): value for name, value in values.items()}
    return {"architectures": [row.theirs], "model_type": kind} | named


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rename(name, table):
    """Replaces whole words of a dotted name: "h.3.ln_1.weight" with {"h": "layers", ...} -> "layers.3.ln_1.weight"."""
    name = f".{name}"
    for old, new in table.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name[1:]


def from_hf(row, weights):
    """A checkpoint's tensors by our names, in our layout. ValueError where two of them have one name of ours."""
    back, ours = {new: old for old, new in row.words.items()}, {}
    plain = [name.removeprefix(row.prefix) for name in weights]
    if twice := sorted(name for name in set(plain) if plain.count(name) > 1):
        raise ValueError(f"the weights hold {twice[0]} twice, with {row.prefix!r} before it and without")
    for name, tensor in weights.items():
        name = name.removeprefix(row.prefix)
        if name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue  # frequencies and causal masks, which old checkpoints carry along
        if row.fused:
            tensor = tensor.T if tensor.dim() == 2 and name.startswith("h.") else tensor
            if ".attn.c_attn." in name:
                if tensor.dim() == 0 or len(tensor) % 3:
                    raise ValueError(
                        f"{name} has {len(tensor) if tensor.dim() else 0} rows, which are not three times as many"
                    )
                for proj, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                    ours[rename(name.replace("c_attn", proj), back)] = part.contiguous()
                continue
            tensor = tensor.contiguous()
        ours[rename(name, back)] = tensor
    return ours


def to_hf(row, weights):
    """Our tensors by the checkpoint's names, in its layout."""
    theirs = {}
    for name, tensor in weights.items():
        if row.fused:
            if ".q_proj." in name:
                three = [weights[name.replace("q_proj", proj)] for proj in ("q_proj", "k_proj", "v_proj")]
                name, tensor = name.replace("q_proj", "c_attn"), torch.cat(three)
            elif ".k_proj." in name or ".v_proj." in name:
                continue
            tensor = tensor.T if tensor.dim() == 2 and name.startswith("layers.") else tensor
        prefix = "" if name.startswith("lm_head.") else row.prefix
        theirs[prefix + rename(name, row.words)] = tensor
    return theirs
