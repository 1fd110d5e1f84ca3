"""GGUF files: every quantisation against transformers' own reading of the same file, and every damage a sentence."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch.nn import functional as F

import minillama
from minillama.checkpoints.architectures import ARCHITECTURES
from minillama.checkpoints.gguf import read_gguf
from minillama.generate import left_pad
from minillama.rope import Llama3, RoPE

CONFIG = minillama.LLaMAConfig(
    vocab_size=97, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=5000.0, tie_word_embeddings=True,
)  # fmt: skip
HEADS = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
WORDS = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "behind_attention": "post_attention_norm", "behind_mlp": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def their_name(name):
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("layers."):
        _, index, stem = stem.split(".", 2)
        return f"blk.{index}.{WORDS[stem]}.{suffix}"
    return f"{WORDS[stem]}.{suffix}"


def base(**changes):
    torch.manual_seed(0)
    model = minillama.LLaMA(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
        model.embed_tokens.weight *= 0.1
    return model


def random_blocks(weight, kind):
    """Rows of `weight`'s shape in a K quantisation, of which the gguf package knows only the way back:
    random bytes with small scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(weight.numel()).integers(0, 256, (weight.numel() // block, size), dtype=np.uint8)
    places = {Kind.Q4_K: {0: 2e-4, 2: 15e-5}, Kind.Q6_K: {208: 3e-5}}[kind]  # d and dmin; d
    for place, value in places.items():
        blocks[:, place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1)


def write(path, model, kind=Kind.F32, drop=(), tensors=None, architecture="llama", **fields):
    """A .gguf file by the gguf package, the rows of q and k as llama.cpp wants them:
    features i and i + d/2 side by side."""
    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    known = dict(
        block_count=config.num_hidden_layers, context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size, feed_forward_length=config.intermediate_size,
        head_count=config.num_attention_heads, head_count_kv=config.num_key_value_heads,
        layer_norm_rms_eps=config.rms_norm_eps, rope_freq_base=config.rope_theta, vocab_size=config.vocab_size,
        rope_dimension_count=config.hidden_size // config.num_attention_heads,
    )  # fmt: skip
    for name, value in {key: value for key, value in (known | fields).items() if key not in drop}.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or their_name(name) in drop:
            continue
        if name.endswith("norm.weight") or "behind" in name:
            tensor = tensor + config.norm_offset
        if architecture == "phi3" and name.endswith(("q_proj.weight", "gate_proj.weight")):  # two or three in one
            parts = ("q_proj", "k_proj", "v_proj") if "q_proj" in name else ("gate_proj", "up_proj")
            together = [model.state_dict()[name.replace(parts[0], part)] for part in parts]
            place = f"blk.{name.split('.')[1]}.{'attn_qkv' if 'q_proj' in name else 'ffn_up'}.weight"
            writer.add_tensor(place, gguf.quantize(torch.cat(together).numpy(), kind), raw_dtype=kind)
        if architecture == "phi3" and any(
            f".{part}." in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        ):
            continue
        for proj, H in HEADS.items() if architecture == "llama" else ():
            if f".{proj}." in name:
                d = len(tensor) // H
                order = [i // 2 + i % 2 * (d // 2) for i in range(d)]
                tensor = torch.stack([head[order] for head in tensor.chunk(H)]).reshape(tensor.shape)
        of = Kind.F32 if tensor.dim() == 1 else kind
        by_chance = of in (Kind.Q4_K, Kind.Q6_K)
        blocks = random_blocks(tensor, of) if by_chance else gguf.quantize(tensor.contiguous().numpy(), of)
        writer.add_tensor(their_name(name), blocks, raw_dtype=of)
    for name, (array, of) in (tensors or {}).items():
        writer.add_tensor(name, array, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def ids():
    return torch.randint(0, CONFIG.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))


def close(ours, theirs, tolerance=1e-3):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_as_transformers_reads_the_same_file(kind, tmp_path, ids):
    path = write(tmp_path / "tiny.gguf", base(), kind)
    model, tokenizer = minillama.load(path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert tokenizer is None and model.lm_head.weight is model.embed_tokens.weight
    with torch.no_grad():
        close(model(ids), theirs(ids).logits)
        q = model.layers[1].self_attn.q_proj.weight
        assert q.abs().max() > 0.05 and torch.allclose(q, theirs.model.layers[1].self_attn.q_proj.weight, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}],
    ids=["tied", "untied, biases"],
)
def test_a_plain_file_gives_the_same_model_back(changes, tmp_path, ids):
    model = base(**changes)
    again, _ = minillama.load(write(tmp_path / "tiny.gguf", model))
    assert again.config == dataclasses.replace(model.config, head_dim=32, rms_norm_eps=again.config.rms_norm_eps)
    assert again.config.rms_norm_eps == pytest.approx(1e-5)
    assert torch.equal(again(ids), model(ids))
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


RELATIVES = {
    "qwen2": ("qwen2", dict(attention_bias=True, attention_output_bias=False), {}),
    "qwen3": ("qwen3", dict(qk_norm="head", head_dim=128), dict(key_length=128, value_length=128)),
    "phi3": ("phi3", {}, dict(pad_token_id=0)),
    "gemma3": ("gemma3_text", dict(
        norms="both", norm_offset=1.0, qk_norm="head", hidden_act="gelu_pytorch_tanh", head_dim=256,
        embedding_multiplier=16.0, attention_multiplier=1 / 16, sliding_window=5, num_hidden_layers=7,
        layer_types=("sliding_attention",) * 5 + ("full_attention", "sliding_attention"), rope_local_base_freq=10000.0,
        num_attention_heads=2, num_key_value_heads=1,
    ), dict(key_length=256, value_length=256, sliding_window=5)),
}  # fmt: skip


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RELATIVES if name != "qwen3"]


@pytest.mark.parametrize("kind", (Kind.F32, pytest.param(Kind.Q8_0, marks=pytest.mark.slow)), ids=("F32", "Q8_0"))
@pytest.mark.parametrize("architecture", ["qwen3", *SLOW])
def test_a_relative_as_transformers_reads_the_same_file(architecture, kind, tmp_path, ids):
    model_type, changes, fields = RELATIVES[architecture]
    base_model = base(model_type=model_type, **changes)
    fields = fields | {"rope_dimension_count": changes.get("head_dim", 32)}
    path = write(tmp_path / "tiny.gguf", base_model, kind, architecture=architecture, **fields)
    model, _ = minillama.load(path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert type(theirs).__name__ == ARCHITECTURES[model_type].theirs
    with torch.no_grad():
        close(model(ids), theirs(ids).logits)
        if kind == Kind.F32:
            close(model(ids), base_model(ids), 1e-5)


def test_dtypes(tmp_path):
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        model, _ = minillama.load(write(tmp_path / f"{kind.name}.gguf", base(), kind))
        assert {p.dtype for p in model.parameters()} == {dtype}
    q8 = write(tmp_path / "8.gguf", base(), Kind.Q8_0)
    exact, _ = minillama.load(q8)
    rounded, _ = minillama.load(q8, torch.bfloat16)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact.parameters(), rounded.parameters()))


def test_the_frequencies_of_llama_3(tmp_path):
    factor = 32.0
    plain, scaled = (RoPE(32, 5000.0, scaling).frequencies() for scaling in (None, Llama3(factor, 1.0, 4.0, 8192.0)))
    path = write(tmp_path / "tiny.gguf", base(), tensors={"rope_freqs.weight": ((plain / scaled).numpy(), Kind.F32)})
    assert minillama.load(path)[0].config.rope_scaling == Llama3(factor, 1.0, 4.0, 8192.0)
    odd = {"rope_freqs.weight": (np.linspace(1, 9, 16, dtype=np.float32), Kind.F32)}
    path = write(tmp_path / "odd.gguf", base(), tensors=odd)
    with pytest.raises(minillama.FileError, match="rope_freqs.weight"):
        minillama.load(path)


REFUSED = {
    "architecture": (dict(architecture="mamba"), "'mamba'.*'llama'"),
    "a mixture of experts": (dict(expert_count=8), "expert_count is 8"),
    "partial rotation": (dict(rope_dimension_count=16), "rope.dimension_count is 16"),
    "scaling": (dict(rope_scaling_type=gguf.RopeScalingType.YARN), "rope.scaling.type is 'yarn'"),
    "a missing field": (dict(drop=["block_count"]), "block_count"),
    "a missing tensor": (dict(drop=["blk.1.ffn_up.weight"]), "layers.1.mlp.up_proj.weight"),
    "a tensor too many": (dict(tensors={"blk.0.attn_sinks.weight": (np.ones(4, np.float32), Kind.F32)}), "attn_sinks"),
    "another shape": (dict(embedding_length=128, rope_dimension_count=16), "shape"),
    "heads that do not fit": (dict(head_count_kv=3), "num_key_value_heads is 3"),
    "quantisation": (
        dict(tensors={"blk.0.attn_q.bias": (np.ones(4, np.int32), Kind.I32)}),
        "blk.0.attn_q.bias holds numbers of kind I32",
    ),
    "tokenizer": (dict(tokenizer_model="bert"), "'bert'"),
    "words cut otherwise": (dict(tokenizer_model="gpt2", tokenizer_pre="poro-chat"), "'poro-chat'"),
    "a tokenizer without merges": (
        dict(tokenizer_model="gpt2", tokenizer_pre="smollm", token_list=["a", "b"]),
        "merges",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_honoured_is_named(case, tmp_path):
    changes, words = REFUSED[case]
    path = write(tmp_path / "tiny.gguf", base(), **changes)
    with pytest.raises(minillama.FileError, match=words) as caught:
        minillama.load(path)
    assert "tiny.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_or_damaged_is_refused(tmp_path):
    tokenizer = dict(tokenizer_model="gpt2", tokenizer_pre="smollm", token_list=["a", "b", "ab"], token_merges=["a b"])
    whole = write(tmp_path / "whole.gguf", base(), Kind.Q8_0, **tokenizer).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 61), *np.linspace(3000, len(whole) - 33, 20, dtype=int)]:
        path.write_bytes(whole[:length])
        with pytest.raises(minillama.FileError, match="copy it again"):
            read_gguf(path)
    key, norm, pack = b"general.architecture", b"output_norm.weight", struct.pack
    damaged = {
        "kind 77": (key + pack("<I", 8), key + pack("<I", 77)),
        "version 1": (b"GGUF\3", b"GGUF\1"),
        "the word GGUF": (b"GGUF", b"GGML"),
        "kind 99": (norm + pack("<IQI", 1, 256, 0), norm + pack("<IQI", 1, 256, 99)),
        "promises": (key + pack("<IQ", 8, 5), key + pack("<IQ", 8, 2**63)),
    }
    for words, (old, new) in damaged.items():
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(minillama.FileError, match=words):
            read_gguf(path)
    with pytest.raises(minillama.FileError, match="is missing"):
        minillama.load(tmp_path / "nowhere.gguf")


def test_a_sentencepiece_tokenizer_as_transformers(tmp_path):
    from test_tokenizer import ROOT, strings

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [(ROOT / "README.md").read_text(encoding="utf-8")],
        tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False),
    )
    learned = trained.get_vocab()
    words = [word for word in sorted(learned, key=learned.get) if word != " "]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    path = write(
        tmp_path / "tiny.gguf", base(vocab_size=len(tokens)),
        tokenizer_model="llama", tokenizer_pre="default", token_list=tokens,
        token_scores=[0.0] * 259 + [-float(i) for i in range(len(words))],
        token_types=[2, 3, 3, *[6] * 256, *[1] * len(words)],
        bos_token_id=1, eos_token_id=2, unk_token_id=0,
    )  # fmt: skip
    _, ours = minillama.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    texts = [text for text in strings() if not any(token in text for token in tokens[:3])]
    for text in texts:
        # SentencePiece puts a space before every text; transformers before those that begin with none.
        spaced = " " + text if text.startswith(" ") else text
        assert ours.encode(text) == theirs(spaced, add_special_tokens=False).input_ids, text[:80]
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")  # which SentencePiece takes for a space
    assert len(texts) > 450 and ours.eos_id == 2 and len(ours.encode("adapters of the model")) < 12


def test_llama_3s_way_to_cut_words_as_transformers(tmp_path):
    from test_tokenizer import small, strings

    trained = json.loads(small().to_str())["model"]
    tokens, merges = sorted(trained["vocab"], key=trained["vocab"].get), [" ".join(pair) for pair in trained["merges"]]
    path = write(
        tmp_path / "tiny.gguf", base(vocab_size=len(tokens)),
        tokenizer_model="gpt2", tokenizer_pre="llama-bpe", token_list=tokens, token_merges=merges,
        token_types=[3] * 3 + [1] * (len(tokens) - 3), eos_token_id=2,
    )  # fmt: skip
    _, ours = minillama.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in strings():
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False).input_ids, text[:80]
    assert ours.encode("x  7") != type(ours)(small()).encode("x  7")  # cut by SmolLM2's rule


# ── SmolLM2-135M-Instruct, from the wheel ────────────────────────────────────────────────────────────────────────────

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "3 mars 2021 = ", "Water boils at",
    "🦙 is an emoji of", "In 1969, Neil Armstrong", "Le petit prince", "To make pancakes you need",
    "The three laws of robotics are",
]  # fmt: skip


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm2):
    """Twelve tokens behind each of ten prompts, in one batch padded on the left: what they would have written."""
    model, tokenizer = minillama.load(smollm2, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    ids, mask = left_pad([tokenizer.encode(prompt) for prompt in PROMPTS])
    written, mask = minillama.generate(model, ids, 12, attention_mask=mask), F.pad(mask, (0, 11), value=1)
    with torch.no_grad():
        ours, reference = model(written[:, :-1], mask), theirs(written[:, :-1], mask).logits
    apart = (ours - reference)[mask.bool()].abs().max() / reference[mask.bool()].abs().max()
    assert apart <= 1e-3
    choices = reference[:, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(written[:, ids.shape[1] :], choices)
    print(f"\nlargest relative difference of logits {apart:.1e}; {choices.numel()} greedy tokens alike")


@pytest.mark.slow
def test_opening_smollm2_takes_little_memory(smollm2):
    load = f"import torch, minillama; minillama.load({str(smollm2)!r}, torch.bfloat16)"
    code = f"{load}; print(open('/proc/self/status').read())"
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process's memory is read from Linux's /proc")
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    megabytes = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1000
    print(f"\npeak memory {megabytes:.0f} MB")
    assert megabytes < 700
