"""Opens a .gguf file, llama.cpp's format: a header of named values, a table of tensors, and the tensors,
mostly quantised.

Everything comes out as Hugging Face has it: names by a short table, the rows of q and k back in their order, weights
dequantised a few rows at a time straight into the wanted dtype, or kept in their blocks where just these are wanted.
The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import dataclasses
import math
import mmap
import os
import re
import struct
from collections import Counter
from functools import partial

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from ..llama import LLaMAConfig
from ..rope import Linear, Llama3, RoPE
from ..speed import BLOCK, Blocks
from .architectures import ARCHITECTURES
from .fields import FULL, SLIDING, honest
from .files import FileError, reading
from .gguf_tokenizer import read_gguf_tokenizer
from .tensors import by_rows, from_hf

STRING, ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
# as `struct` writes them
FORMATS = dict(zip((GGUFValueType(kind) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)), "BbHhIif?Qqd"))
NUMPY = {"B": "u1", "b": "i1", "H": "u2", "h": "i2", "I": "u4", "i": "i4", "f": "f4", "Q": "u8", "q": "i8", "d": "f8"}
PLAIN = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
KEPT = {"8bit": GGMLQuantizationType.Q8_0, "4bit": GGMLQuantizationType.Q4_0}  # the blocks of speed.py
CHUNK = 2**18  # weights that are dequantised at once

# llama.cpp's names and ours, word by word
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "behind_attention",
    "post_ffw_norm": "behind_mlp",
    "attn_qkv": "self_attn.qkv_proj",
}
PARTS = "|".join(list(NAMES)[4:])
# llama.cpp's architectures, and the rows of ours that they are
KNOWN = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma3": "gemma3_text"}
NAMED = re.compile(rf"(token_embd|output_norm|output|blk\.\d{{1,4}}\.({PARTS}))\.(weight|bias)|rope_freqs\.weight")


def read_gguf(path, dtype=None, quantize=None):
    """(LLaMAConfig, weights by our names, tokenizer or None) of a .gguf file of one of the architectures KNOWN; the
    weights as functions that read them, one at a time.

    dtype: of the weights; None: float16 or bfloat16 where all matrices are stored so, else float32.  quantize: what
    becomes of the layers' matrices (speed.HOW): they come in float32, or as Blocks where they lie in those.
    Raises FileError when the file is missing, damaged or not honoured.
    """
    with honoured(path):
        with reading(path):
            fields, tensors = read_header(path)
        config = read_config(fields, tensors)
        tokenizer = read_gguf_tokenizer(fields)
        factors = tensors.pop("rope_freqs.weight", None)  # read_config has taken it in
        if factors is not None:
            with open(path, "rb") as file:
                config = with_factors(config, read_tensor(file, "rope_freqs.weight", factors, torch.float32))
        kinds = {kind for shape, kind, _ in tensors.values() if len(shape) > 1}
        dtype = dtype or (PLAIN.get(*kinds, torch.float32) if len(kinds) == 1 else torch.float32)
        row, weights = ARCHITECTURES[config.model_type], {}
        for name, entry in tensors.items():
            ours = ".".join(NAMES.get(word, word) for word in name.split("."))
            weights[ours] = partial(read_weight, path, name, entry, config, dtype, quantize)
        if row.fused:  # the feed-forward's two matrices are called by the name of one
            weights = {name.replace("mlp.up_proj", "mlp.gate_up_proj"): weight for name, weight in weights.items()}
            weights = from_hf(row, weights, config)
        return config, weights, tokenizer


@contextlib.contextmanager
def honoured(path):
    """Within the block, what is wrong with the file becomes a FileError."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (struct.error, ArithmeticError, IndexError, MemoryError, UnicodeDecodeError) as error:
        raise FileError(
            f"{path} ({os.path.getsize(path):,} bytes) ends within its header or is damaged ({error}): copy it again"
        ) from None
    except KeyError as error:
        raise FileError(
            f"{path} has no {error.args[0]} in its header, which a LLaMA needs: convert the model again"
        ) from None
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: {error}") from None


def read_header(path):
    """(values by name, {tensor name: (shape, quantisation, place in the file)}), shapes in torch's order.

    Refused is what llama.cpp refuses: a name twice, arrays in arrays, an alignment that is no power of two, a tensor
    that does not begin where the one before it ends. The gguf package's own reader makes an array of every string of
    the vocabulary: 2.3 s and 170 MB for SmolLM2.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                "it does not begin with the word GGUF, so it is no .gguf file, or a damaged one: copy it again"
            )
        data, at = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 4

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text():
        return take(f"{fitting(*take('Q'))}s")[0].decode("utf-8")

    def fitting(count, size=1):
        if count * size > len(data) - at:
            raise ValueError(
                f"byte {at:,} promises {count:,} things and the file has {len(data):,} bytes: copy it again"
            )
        return count

    def value(kind, within=False):
        nonlocal at
        if kind == STRING:
            return text()
        if kind == ARRAY and not within:
            kind, count = take("IQ")
            if kind in FORMATS:
                form = np.dtype(f"<{NUMPY.get(FORMATS[kind], FORMATS[kind])}")
                numbers = np.frombuffer(data, form, fitting(count, form.itemsize), at).copy()
                at += numbers.nbytes
                return numbers
            return [value(kind, True) for _ in range(fitting(count, 8))]
        if kind not in FORMATS:
            what = "an array in an array" if kind == ARRAY else f"a value of kind {kind}"
            raise ValueError(f"its header holds {what}, which the format does not have: it is damaged, copy it again")
        return take(FORMATS[kind])[0]

    with data:
        version, tensor_count, field_count = take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version} of the format; needed is 2 or 3: convert the model again")
        pairs = [(text(), value(*take("I"))) for _ in range(fitting(field_count, 12))]
        table = []
        for _ in range(fitting(tensor_count, 24)):
            name, (dimensions,) = text(), take("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{name} has {dimensions} dimensions; a tensor has 1 to 4: copy it again")
            table.append((name, take(f"{dimensions}Q"), *take("IQ")))
        size = len(data)
    for what, names in (("the key", [name for name, _ in pairs]), ("the tensor", [name for name, *_ in table])):
        if twice := sorted(name for name, times in Counter(names).items() if times > 1):
            raise ValueError(f"its header holds {what} {twice[0]!r} twice: it is damaged, copy it again")
    fields = dict(pairs)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; needed is a power of two from 8: copy it again")
    return fields, placed(table, at + -at % alignment, alignment, size)


def placed(table, start, alignment, size):
    """{tensor name: (shape, quantisation, place in the file)}; each tensor begins where the one before it ends."""
    known, tensors, end = {kind.value for kind in GGMLQuantizationType}, {}, 0
    for name, shape, kind, offset in table:
        if kind not in known:
            raise ValueError(
                f"{name} is quantised by kind {kind}, which nobody here knows: "
                "take a file in Q8_0, Q6_K, Q4_K, F16 or BF16"
            )
        shape, kind = shape[::-1], GGMLQuantizationType(kind)
        if not NAMED.fullmatch(name):
            raise ValueError(f"it holds a tensor {name!r}, for which a LLaMA has no place")
        if kind.name.startswith(("I", "F64")) and not kind.name.startswith("IQ"):
            raise ValueError(f"{name} holds numbers of kind {kind.name}, in which no weights are kept: copy it again")
        if len(shape) == 1 and kind != GGMLQuantizationType.F32:
            raise ValueError(f"{name} is a vector of kind {kind.name}; vectors are kept in F32: copy it again")
        block, width = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(
                f"{name} has rows of {shape[-1]} weights and {kind.name} holds {block} a block: "
                "the file is damaged, copy it again"
            )
        if offset != end:
            raise ValueError(f"{name} begins at {offset:,} and the tensor before it ends at {end:,}: copy it again")
        length = math.prod(shape) // block * width
        if start + offset + length > size:
            raise ValueError(
                f"{name} should end at byte {start + offset + length:,} and the file has {size:,}: "
                "it was cut short, copy it again"
            )
        tensors[name], end = (shape, kind, start + offset), offset + length + -length % alignment
    return tensors


def read_config(fields, tensors):
    kind = fields["general.architecture"]
    if not isinstance(kind, str) or kind not in KNOWN:
        *most, last = map(repr, KNOWN)
        raise ValueError(f"its architecture is {kind!r}; only {', '.join(most)} and {last} can be honoured")
    values = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    D = honest("hidden_size", values["embedding_length"], f"{kind}.embedding_length")
    H = honest("num_attention_heads", values["attention.head_count"], f"{kind}.attention.head_count")
    head_dim = values.get("attention.key_length", D // H)
    refused = {
        "expert_count": (0,),
        "rope.scaling.type": ("none", "linear"),
        "rope.dimension_count": (head_dim,),
        "attention.value_length": (head_dim,),
    }
    for name, honoured in refused.items():
        if values.get(name, honoured[0]) not in honoured:
            raise ValueError(f"{kind}.{name} is {values[name]!r}; only {honoured[0]!r} can be honoured")
    found = dict(
        hidden_size=D,
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=H,
        num_key_value_heads=values.get("attention.head_count_kv", H),
        head_dim=head_dim,
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        rope_theta=values.get("rope.freq_base", 10000.0),
    )
    if values.get("attention.sliding_window"):
        found["sliding_window"] = values["attention.sliding_window"]
    found = {field: honest(field, value) for field, value in found.items()}
    if kind == "gemma3":
        layers = found["num_hidden_layers"]
        found["layer_types"] = tuple(SLIDING if (i + 1) % 6 else FULL for i in range(layers))
        # as llama.cpp: the largest, of 62 layers, divides by the width of D / H features, the others by the head's
        scores = (D // H if layers == 62 else head_dim) ** -0.5
        found |= dict(embedding_multiplier=D**0.5, attention_multiplier=scores, rope_local_base_freq=10000.0)
    if values.get("rope.scaling.type") == "linear":
        found["rope_scaling"] = Linear(honest("factor", values["rope.scaling.factor"]))
    biases = dict(attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_gate.bias" in tensors)
    return LLaMAConfig(
        **found | biases | ARCHITECTURES[KNOWN[kind]].fixed,
        model_type=KNOWN[kind],
        vocab_size=tensors["token_embd.weight"][0][0],
        tie_word_embeddings="output.weight" not in tensors,
    )


def with_factors(config, factors):
    """The configuration whose RoPE divides its frequencies by `factors` (d/2,): how a Llama 3.1 or later is stored."""
    scaling = Llama3(factors.max().item(), 1.0, 4.0, 8192.0)  # the three that all of them share
    plain, scaled = (RoPE(config.head_dim, config.rope_theta, s).frequencies() for s in (None, scaling))
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-4):
        raise ValueError(
            "rope_freqs.weight holds other factors than those of Llama 3.1 to 3.3, which alone can be honoured"
        )
    return dataclasses.replace(config, rope_scaling=scaling)


def read_weight(path, name, entry, config, dtype, quantize):
    """One tensor as Hugging Face has it."""
    shape, kind, _ = entry
    matrix = name.startswith("blk.") and len(shape) > 1
    offset = config.norm_offset if name.endswith("norm.weight") else 0  # llama.cpp has added Gemma's 1
    with honoured(path), open(path, "rb") as file:
        if matrix and KEPT.get(quantize) == kind:
            weight = read_blocks(file, entry)
        else:
            whole = offset or (matrix and quantize)
            weight = read_tensor(file, name, entry, torch.float32 if whole else dtype)
    if config.model_type == "llama":  # whose rows alone llama.cpp reorders
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        H = next((H for part, H in heads.items() if f".{part}." in name), None)
        if H and shape[0] % (2 * H) == 0:  # another length is refused later, with its shape
            weight = by_rows(weight, partial(interleaved_to_halves, H=H))
    return (weight - offset).to(dtype) if offset else weight


def read_blocks(file, entry):
    """A matrix in Q8_0 or Q4_0 as the file has it: each block's scale, and then its codes."""
    (rows, columns), kind, place = entry
    width = GGML_QUANT_SIZES[kind][1]  # bytes a block
    codes = torch.empty(rows, columns // BLOCK, width - 2, dtype=torch.int8 if kind == KEPT["8bit"] else torch.uint8)
    blocks = Blocks(codes, torch.empty(rows, columns // BLOCK, 1, dtype=torch.float16))
    file.seek(place)
    for codes, scales in zip(*(tensor.split(max(1, CHUNK // columns)) for tensor in blocks)):
        data = torch.from_numpy(np.fromfile(file, np.uint8, scales.numel() * width)).view(*scales.shape[:2], width)
        codes.copy_(data[..., 2:].view(codes.dtype))
        scales.copy_(data[..., :2].view(torch.float16))
    return blocks


def read_tensor(file, name, entry, dtype):
    """One tensor, dequantised by the gguf package CHUNK weights at a time,
    so that little more than itself is in memory."""
    shape, kind, place = entry
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = math.prod(shape[:-1]), shape[-1]
    width = columns // block * size  # bytes a row
    file.seek(place)
    weight = torch.empty(rows, columns, dtype=dtype)
    for part in weight.split(max(1, CHUNK // columns)):
        data = np.fromfile(file, np.uint8, len(part) * width).reshape(len(part), width)
        try:
            part.copy_(torch.from_numpy(dequantize(data, kind)))
        except NotImplementedError:
            raise ValueError(
                f"{name} is quantised as {kind.name}, which cannot be opened: "
                "take a file in Q8_0, Q6_K, Q4_K, F16 or BF16"
            ) from None
    return weight.view(shape)


def interleaved_to_halves(weight, H):
    """llama.cpp turns feature 2i of a head with 2i + 1, Hugging Face i with i + d/2:
    the rows of q and k back in order."""
    return weight.view(H, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
