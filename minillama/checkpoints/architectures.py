"""One row per architecture: how Hugging Face's config.json and tensor names become ours, and back.

A row says what differs; the functions below do for every row the same. To add an architecture that our page of LLaMA
computes, add a row, and a function where its config.json says of single layers what a key alone does not.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ..gpt2 import GPT2, GPT2Config
from ..llama import LLaMA, LLaMAConfig
from ..rope import SCALINGS, LongRoPE
from ..speed import Blocks
from .files import believed, shortened

QKV = ("q_proj", "k_proj", "v_proj")
SLIDING, FULL = "sliding_attention", "full_attention"

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
    "max_window_layers": (int, 0, 1024),
    "sliding_window_pattern": (int, 1, 1024),
    "no_rope_layer_interval": (int, 1, 1024),
    "rms_norm_eps": (float, 1e-12, 1e-1),
    "layer_norm_eps": (float, 1e-12, 1e-1),
    "rope_theta": (float, 1.0, 1e12),
    "rope_local_base_freq": (float, 1.0, 1e12),
    "attention_bias": (bool,),
    "attention_output_bias": (bool,),
    "mlp_bias": (bool,),
    "tie_word_embeddings": (bool,),
    "use_sliding_window": (bool,),
    "embedding_multiplier": (float, 1e-6, 1e6),
    "residual_multiplier": (float, 1e-6, 1e6),
    "attention_multiplier": (float, 1e-6, 1e6),
    "logits_scaling": (float, 1e-6, 1e6),
    "query_pre_attn_scalar": (int, 1, 2**20),
    "factor": (float, 1.0, 1e6),
    "attention_factor": (float, 1e-3, 1e3),
    "mscale": (float, 0, 1e3),
    "mscale_all_dim": (float, 0, 1e3),
    "beta_fast": (float, 1e-3, 1e6),
    "beta_slow": (float, 1e-3, 1e6),
    "truncate": (bool,),
    "low_freq_factor": (float, 1e-3, 1e6),
    "high_freq_factor": (float, 1e-3, 1e6),
    "original_max_position_embeddings": (int, 2, 2**28),
}
# Why an architecture that people ask for is refused.
REFUSED = {
    "gemma2": "its scores and logits are squashed by a tanh, which no other of these does",
    "gemma3": "it sees pictures too; of the family gemma3_text can be opened",
    "mixtral": "it chooses among experts, where this page has one feed-forward part",
    "qwen3_moe": "it chooses among experts, where this page has one feed-forward part",
    "gpt_oss": "it chooses among experts, and its attention has sinks",
    "deepseek_v3": "it chooses among experts, and its keys and values are compressed",
    "falcon": "its attention and feed-forward stand side by side",
    "gpt_neox": "its attention and feed-forward stand side by side",
    "phi": "its attention and feed-forward stand side by side",
}


def honest(field, value, key=None):
    """The value of a field of ours, where it is of the field's type and within its bounds; ValueError names the key."""
    return believed(key or field, value, *TYPES[field])


@dataclass(frozen=True)
class Architecture:
    """model, config: our classes.  theirs: transformers' class.
    keys: its names of our configuration's fields, where they differ.
    absent: what a key that is missing means there, where our default is another.
    says: the fields of LLaMAConfig beyond a LLaMA's own that its config.json has a key for.
    fixed: what our configuration must say, since config.json there has no key for it.
    honoured: keys that must be missing or have this value, since we compute nothing else.
    read, write: what else its config.json says, {field of ours: value} of its content and number of layers, and back.
    prefix, words: of tensor names, {ours: theirs}.
    fused: matrices that are several of ours in one, {theirs: ours}.  transposed: matrices of layers lie so.
    multiplied: its embedding_multiplier is the embedding's own, and a soft prompt (PEFT's) stands behind it.
    """

    model: type
    config: type
    theirs: str
    keys: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    says: tuple = ()
    fixed: dict = field(default_factory=dict)
    honoured: dict = field(default_factory=dict)
    read: Callable = lambda content, layers: {}
    write: Callable = lambda config: {}
    prefix: str = "model."
    words: dict = field(default_factory=dict)
    fused: dict = field(default_factory=dict)
    transposed: bool = False
    multiplied: bool = False

    @property
    def unsaid(self):
        """{field: value} of all that a configuration of ours must say to be this architecture's."""
        if self.config is not LLaMAConfig:
            return self.fixed
        names = [own.name for own in dataclasses.fields(LLaMAConfig)]
        extra = names[names.index("model_type") + 1 :]  # what LLaMA does without
        defaults = {own.name: own.default for own in dataclasses.fields(LLaMAConfig) if own.name in extra}
        return {name: value for name, value in defaults.items() if name not in self.says} | self.fixed


# ── what single layers are ───────────────────────────────────────────────────────────────────────────────────────────


def listed(key, values, layers, known):
    """A list of config.json with an entry for each layer, as a tuple."""
    if not isinstance(values, list) or len(values) < layers or not all(value in known for value in values):
        raise ValueError(f"{key} is {shortened(values)}; needed is for each of {layers} layers one of {known}")
    return tuple(int(value) if isinstance(value, int) else value for value in values[:layers])


def windows(content, layers, rule):
    """sliding_window and layer_types of a config.json; where it has no list, `rule` of a layer's number says whether it
    slides."""
    window, types = content.get("sliding_window"), content.get("layer_types")
    if types is None:
        types = [SLIDING if rule(i) else FULL for i in range(layers)]
    types = listed("layer_types", types, layers, (SLIDING, FULL))
    if window is None or SLIDING not in types:
        return dict(sliding_window=None, layer_types=None)
    return dict(sliding_window=honest("sliding_window", window), layer_types=types)


def read_qwen(content, layers):
    if not honest("use_sliding_window", content.get("use_sliding_window", False)):
        return dict(sliding_window=None, layer_types=None)
    first = honest("max_window_layers", content.get("max_window_layers", 28))
    return windows({"sliding_window": 4096} | content, layers, lambda i: i >= first)


def write_qwen(config):
    return {"use_sliding_window": config.sliding_window is not None}


def read_smollm3(content, layers):
    rotary, every = content.get("no_rope_layers"), content.get("no_rope_layer_interval", 4)
    if rotary is None:
        every = honest("no_rope_layer_interval", every)
        rotary = [int((i + 1) % every != 0) for i in range(layers)]
    rotary = listed("no_rope_layers", rotary, layers, (0, 1))
    slides = honest("use_sliding_window", content.get("use_sliding_window", False))
    return windows(content, layers, lambda i: slides and not rotary[i]) | dict(no_rope_layers=rotary)


def read_gemma3(content, layers):
    every = honest("sliding_window_pattern", content.get("sliding_window_pattern", 6))
    local = content.get("rope_parameters") or {}
    local = local.get(SLIDING) or {} if isinstance(local, dict) else {}
    if not isinstance(local, dict):
        raise ValueError(f"{SLIDING} is {shortened(local)}; needed is an object with names and values")
    local = {"rope_theta": content.get("rope_local_base_freq", 10000.0), "rope_type": "default"} | local
    if local["rope_type"] != "default":
        raise ValueError(f"rope_type of {SLIDING} is {shortened(local['rope_type'])}; only 'default' can be honoured")
    return windows({"sliding_window": 4096} | content, layers, lambda i: (i + 1) % every) | dict(
        embedding_multiplier=honest("hidden_size", content.get("hidden_size", 2304)) ** 0.5,
        attention_multiplier=honest("query_pre_attn_scalar", content.get("query_pre_attn_scalar", 256)) ** -0.5,
        rope_local_base_freq=float(honest("rope_local_base_freq", local["rope_theta"])),
    )


def write_gemma3(config):
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    ropes = {FULL: write_rope(config), SLIDING: local}
    return {"query_pre_attn_scalar": round(config.attention_multiplier**-2), "rope_parameters": ropes}


def write_phi3(config):
    """Of long RoPE transformers believes the number that stands beside rope_parameters, not the one within."""
    original = getattr(config.rope_scaling, "original_max_position_embeddings", config.max_position_embeddings)
    return {"original_max_position_embeddings": int(original)}


ROPE = dict(hidden_act="silu", partial_rotary_factor=1.0, quantization_config=None)
ARCHITECTURES = {
    "llama": Architecture(LLaMA, LLaMAConfig, "LlamaForCausalLM", honoured=ROPE),
    "mistral": Architecture(
        LLaMA, LLaMAConfig, "MistralForCausalLM", honoured=ROPE, says=("sliding_window",),
        absent=dict(
            num_key_value_heads=8, intermediate_size=14336, sliding_window=4096, max_position_embeddings=131072,
        ),
        fixed=dict(attention_bias=False, mlp_bias=False),
    ),
    "qwen2": Architecture(  # Qwen2 and Qwen2.5: biases on queries, keys and values alone
        LLaMA, LLaMAConfig, "Qwen2ForCausalLM", honoured=ROPE, says=("sliding_window", "layer_types"),
        absent=dict(max_position_embeddings=32768, intermediate_size=22016, num_key_value_heads=32),
        fixed=dict(attention_bias=True, attention_output_bias=False, mlp_bias=False),
        read=read_qwen, write=write_qwen,
    ),
    "qwen3": Architecture(  # norms on the queries and keys of each head
        LLaMA, LLaMAConfig, "Qwen3ForCausalLM", honoured=ROPE, says=("sliding_window", "layer_types"),
        absent=dict(max_position_embeddings=32768, intermediate_size=22016, num_key_value_heads=32, head_dim=128),
        fixed=dict(qk_norm="head", mlp_bias=False), read=read_qwen, write=write_qwen,
    ),
    "smollm3": Architecture(  # every fourth layer without RoPE
        LLaMA, LLaMAConfig, "SmolLM3ForCausalLM", honoured=ROPE,
        says=("sliding_window", "layer_types", "no_rope_layers"), read=read_smollm3, write=write_qwen,
        absent=dict(
            max_position_embeddings=32768, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2000000.0,
        ),
    ),
    "olmo2": Architecture(  # norms behind the sublayers, and on all queries and all keys
        LLaMA, LLaMAConfig, "Olmo2ForCausalLM", honoured=ROPE, absent=dict(rms_norm_eps=1e-5),
        fixed=dict(norms="behind", qk_norm="all", mlp_bias=False),
        words={"behind_attention": "post_attention_layernorm", "behind_mlp": "post_feedforward_layernorm"},
    ),
    "phi3": Architecture(  # query, key and value in one matrix, gate and up in another
        LLaMA, LLaMAConfig, "Phi3ForCausalLM", honoured=ROPE, says=("sliding_window",), write=write_phi3,
        absent=dict(
            intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5,
            original_max_position_embeddings=4096,
        ),
        fixed=dict(attention_bias=False, mlp_bias=False),
        fused={"qkv_proj": QKV, "gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "granite": Architecture(  # four multipliers
        LLaMA, LLaMAConfig, "GraniteForCausalLM", honoured=ROPE, absent=dict(attention_multiplier=1.0),
        says=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
    "gemma3_text": Architecture(  # norms around the sublayers, 1 + weight; GeGLU; most layers see a window
        LLaMA, LLaMAConfig, "Gemma3ForCausalLM", multiplied=True, read=read_gemma3, write=write_gemma3,
        says=(
            "sliding_window", "layer_types", "rope_local_base_freq", "embedding_multiplier", "attention_multiplier",
        ),
        absent=dict(
            intermediate_size=9216, num_key_value_heads=4, head_dim=256, max_position_embeddings=131072,
            tie_word_embeddings=True, rope_theta=1000000.0,
        ),
        fixed=dict(norms="both", norm_offset=1.0, qk_norm="head", hidden_act="gelu_pytorch_tanh", mlp_bias=False),
        honoured=dict(
            hidden_activation="gelu_pytorch_tanh", partial_rotary_factor=1.0, quantization_config=None,
            attn_logit_softcapping=None, final_logit_softcapping=None, use_bidirectional_attention=(False, None),
        ),
        words={
            "post_attention_layernorm": "pre_feedforward_layernorm", "behind_attention": "post_attention_layernorm",
            "behind_mlp": "post_feedforward_layernorm",
        },
    ),
    "gemma": Architecture(  # the first: a LLaMA with GeGLU, 1 + weight and a multiplied embedding
        LLaMA, LLaMAConfig, "GemmaForCausalLM", multiplied=True, says=("embedding_multiplier",),
        read=lambda content, _: dict(embedding_multiplier=honest("hidden_size", content.get("hidden_size")) ** 0.5),
        absent=dict(
            intermediate_size=24576, num_key_value_heads=16, head_dim=256, max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        fixed=dict(norm_offset=1.0, hidden_act="gelu_pytorch_tanh", mlp_bias=False),
        honoured=ROPE | dict(hidden_act=("gelu_pytorch_tanh", "gelu"), use_bidirectional_attention=(None, False)),
    ),
    "gpt2": Architecture(
        GPT2, GPT2Config, "GPT2LMHeadModel", prefix="transformer.", fused={"attn.c_attn": QKV}, transposed=True,
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
    if isinstance(kind, str) and kind in REFUSED:
        raise ValueError(f"model_type is {kind!r}, which this project has not: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        *most, last = ARCHITECTURES
        raise ValueError(f"model_type is {shortened(kind)}; this project has {', '.join(most)} and {last}")
    row = ARCHITECTURES[kind]
    for key, value in row.honoured.items():
        values = value if isinstance(value, tuple) else (value,)
        found = content.get(key, values[0])
        if not any(type(found) is type(value) and found == value for value in values):
            raise ValueError(f"{key} is {shortened(found)}; only {values[0]!r} can be honoured")
    known = {own.name for own in dataclasses.fields(row.config)} & TYPES.keys() - {"rope_theta"} - row.unsaid.keys()
    values = {own: content.get(row.keys.get(own, own)) for own in known}
    values = {own: honest(own, value, row.keys.get(own, own)) for own, value in values.items() if value is not None}
    for key, value in row.absent.items():
        if key in known and key not in content:  # an explicit null says None
            values[key] = value
    values |= row.read(content, values.get("num_hidden_layers", row.config.num_hidden_layers))
    if row.config is LLaMAConfig:
        values |= read_rope(content, row) | {"model_type": kind}
    config = row.config(**values | row.fixed)
    if isinstance(scaling := getattr(config, "rope_scaling", None), LongRoPE):
        pairs = (config.head_dim or config.hidden_size // config.num_attention_heads) // 2
        for key in ("short_factor", "long_factor"):
            if len(getattr(scaling, key)) != pairs:
                raise ValueError(f"{key} has {len(getattr(scaling, key))} numbers; each of {pairs} pairs needs one")
    return config, row


def read_rope(content, row):
    """rope_theta and rope_scaling: transformers 5 writes rope_parameters, earlier releases rope_theta and
    rope_scaling."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = content.get(key) or {}
        if not isinstance(found, dict) or not isinstance(found.get(FULL, {}), dict):
            raise ValueError(f"{key} is {shortened(found)}; needed is an object with names and values")
        rope |= found.get(FULL, found)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if row.theirs == "Phi3ForCausalLM" and kind in ("su", "yarn"):  # as early Phi-3s call it
        kind = "longrope"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {shortened(rope['partial_rotary_factor'])}; only 1.0 can be honoured"
        )
    theta = rope.get("rope_theta", content.get("rope_theta", row.absent.get("rope_theta", 10000.0)))
    theta = {"rope_theta": float(honest("rope_theta", theta))}
    if kind == "default":
        return theta
    if not isinstance(kind, str) or kind not in SCALINGS:
        *most, last = SCALINGS
        raise ValueError(
            f"rope_type is {shortened(kind)}; only 'default', {', '.join(most)} and {last} can be honoured"
        )
    longest = content.get("max_position_embeddings", row.absent.get("max_position_embeddings", 2048))
    rope = {"original_max_position_embeddings": longest} | rope | {"max_position_embeddings": longest}
    original = content.get("original_max_position_embeddings", row.absent.get("original_max_position_embeddings"))
    if original is not None:  # what stands outside of rope_scaling counts more to transformers
        rope["original_max_position_embeddings"] = original
    numbers = {key: honest(key, value) for key, value in rope.items() if key in TYPES and value is not None}
    if kind == "longrope":
        numbers |= {key: factors(key, rope[key]) for key in ("short_factor", "long_factor") if key in rope}
        numbers.setdefault("factor", longest / numbers["original_max_position_embeddings"])
    if kind in ATTENTION_FACTORS and "factor" in numbers:
        numbers.setdefault("attention_factor", ATTENTION_FACTORS[kind](numbers))
    fields = dataclasses.fields(SCALINGS[kind])
    if missing := [own.name for own in fields if own.default is dataclasses.MISSING and own.name not in numbers]:
        raise ValueError(f"rope_type is {kind!r} and {missing[0]} is missing beside it")
    numbers = {own.name: numbers[own.name] for own in fields if own.name in numbers}
    numbers = {key: float(value) if TYPES.get(key, (0,))[0] is float else value for key, value in numbers.items()}
    return theta | {"rope_scaling": SCALINGS[kind](**numbers)}


def yarn_attention(numbers):
    """YaRN's attention_factor where config.json gives none: 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""

    def grown(by):
        return 1.0 if numbers["factor"] <= 1 else 0.1 * by * math.log(numbers["factor"]) + 1

    by, by_all = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return grown(by) / grown(by_all) if by and by_all else grown(1)


def long_attention(numbers):
    """Long RoPE's: √(1 + ln factor / ln original length)."""
    factor = max(1.0, numbers["factor"])
    return math.sqrt(1 + math.log(factor) / math.log(numbers["original_max_position_embeddings"]))


ATTENTION_FACTORS = {"yarn": yarn_attention, "longrope": long_attention}


def factors(key, values):
    """A list of positive numbers, one for each pair of features, as a tuple."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} is {shortened(values)}; needed is a list of numbers")
    return tuple(float(believed(key, value, float, 1e-6, 1e6)) for value in values)


def architecture_of(config):
    """The row that can say all that a configuration of ours says: that of its model_type, or another."""
    own = ARCHITECTURES.get(getattr(config, "model_type", None))
    for row in [own, *ARCHITECTURES.values()] if own else ARCHITECTURES.values():
        if row.config is type(config) and all(getattr(config, key) == value for key, value in row.unsaid.items()):
            return row
    raise ValueError(f"no architecture of transformers has what this configuration asks for together: {config}")


def write_config(config):
    """The content of config.json for a configuration of ours; transformers reads it."""
    row = architecture_of(config)
    (kind,) = (kind for kind, other in ARCHITECTURES.items() if other is row)
    values = {own.name: getattr(config, own.name) for own in dataclasses.fields(config) if own.name not in row.unsaid}
    for key, value in row.honoured.items():
        if value is not None and key != "partial_rotary_factor":
            values[key] = value[0] if isinstance(value, tuple) else value
    if row.config is LLaMAConfig:
        values["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
        values["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
        values["rope_parameters"] = write_rope(config)
        values["pad_token_id"] = None  # transformers' default for SmolLM3 and Phi-3 is beyond a small vocabulary
        for key in ("rope_theta", "rope_scaling", "model_type"):
            values.pop(key)
    named = {row.keys.get(name, name): value for name, value in values.items()}
    return {"architectures": [row.theirs], "model_type": kind} | named | row.write(config)


def write_rope(config):
    """The rope_parameters of config.json."""
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    (kind,) = (kind for kind, scaling in SCALINGS.items() if isinstance(config.rope_scaling, scaling))
    numbers = dataclasses.asdict(config.rope_scaling)
    for key, value in numbers.items():
        if isinstance(value, tuple):
            numbers[key] = list(value)
    if kind == "dynamic":
        del numbers["max_position_embeddings"]  # stands in config.json already
    return {"rope_type": kind, "rope_theta": config.rope_theta} | numbers


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rename(name, table):
    """Replaces whole words of a dotted name: "h.3.ln_1.weight" with {"h": "layers", ...} -> "layers.3.ln_1.weight"."""
    if not table:
        return name
    words = "|".join(map(re.escape, table))
    return re.sub(rf"(?<![^.])({words})(?=\.)", lambda found: table[found[0]], name)


def widths(config, parts):
    """How many rows each of the matrices has that are fused into one."""
    H, G = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // H
    return [{"q_proj": H * d, "k_proj": G * d, "v_proj": G * d}.get(part, config.intermediate_size) for part in parts]


def from_hf(row, weights, config):
    """A checkpoint's tensors by our names, in our layout. Both sides are {name: a function that reads the tensor}.
    ValueError where two of them have one name of ours."""
    back, ours, kept = {new: old for old, new in row.words.items()}, {}, {}
    plain = [name.removeprefix(row.prefix) for name in weights]
    if twice := sorted(name for name in set(plain) if plain.count(name) > 1):
        raise ValueError(f"the weights hold {twice[0]} twice, with {row.prefix!r} before it and without")

    def whole(name, read):
        tensor = read()
        if row.transposed and tensor.dim() == 2 and name.startswith("h."):
            tensor = tensor.T
        return by_rows(tensor, torch.Tensor.contiguous)

    def piece(name, read, rows, i):
        if name not in kept:  # the one that was read last waits for its other pieces
            kept.clear()
            kept[name] = whole(name, read)
        seen = (*kept[name].shape, 0)[0]
        if seen != sum(rows):
            raise ValueError(f"{name} has {seen} rows and the configuration asks for {sum(rows)}")
        return by_rows(kept[name], lambda tensor: tensor.split(rows)[i].contiguous())

    for name, read in weights.items():
        name = name.removeprefix(row.prefix)
        if name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue  # frequencies and causal masks, which old checkpoints carry along
        matrix = next((matrix for matrix in row.fused if f".{matrix}." in name), None)
        if matrix is None:
            ours[rename(name, back)] = partial(whole, name, read)
            continue
        rows = widths(config, row.fused[matrix])
        for i, part in enumerate(row.fused[matrix]):
            place = name.replace(matrix, f"{matrix.rpartition('.')[0]}.{part}".lstrip("."))
            ours[rename(place, back)] = partial(piece, name, read, rows, i)
    return ours


def by_rows(weight, change):
    """A matrix, or its Blocks, with its rows changed."""
    return Blocks(*map(change, weight)) if isinstance(weight, Blocks) else change(weight)


def to_hf(row, weights):
    """Our tensors by the checkpoint's names, in its layout."""
    theirs, done = {}, {part: (matrix, parts) for matrix, parts in row.fused.items() for part in parts}
    for name, tensor in weights.items():
        place, _, part = name.rpartition(".")[0].rpartition(".")
        kind = name.rpartition(".")[2]
        if part in done:
            matrix, parts = done[part]
            if part != parts[0]:
                continue
            tensor = torch.cat([weights[f"{place}.{each}.{kind}"] for each in parts])
            name = f"{place}.{matrix.rpartition('.')[2]}.{kind}"
        if row.transposed:
            tensor = tensor.T if tensor.dim() == 2 and name.startswith("layers.") else tensor
        prefix = "" if name.startswith("lm_head.") else row.prefix
        theirs[prefix + rename(name, row.words)] = tensor
    return theirs
