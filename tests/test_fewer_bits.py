"""A base that is put into fewer bits while it is read: what comes out is what `quantize` makes of the whole base, a
.gguf file's own blocks are kept to the last bit, and the whole matrices are never in memory together."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from test_gguf import RELATIVES, base, write
from torch import nn

import minillama
from minillama import speed
from minillama.adapters.storage import fingerprint
from minillama.checkpoints import BASES
from minillama.checkpoints.fingerprint import same_base
from minillama.speed import BlockLinear, quantize

BLOCKS = {"8bit": Kind.Q8_0, "4bit": Kind.Q4_0}
QUANTIZE = gguf.quantize


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(speed, "multiplies_float8", lambda device: True)


def same(ours, expected):
    ours, expected = ours.state_dict(), expected.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def sharded(folder):
    """dates-llama in two files."""
    weights = minillama.load("dates-llama")[0].state_dict()
    names = sorted(weights)
    placed = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(placed.values()):
        tensors = {name: weights[name] for name in names if placed[name] == file}
        save_file(
            {name if name == "lm_head.weight" else f"model.{name}": tensors[name] for name in tensors}, folder / file
        )
    index = {name if name == "lm_head.weight" else f"model.{name}": file for name, file in placed.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text((BASES / "dates-llama/config.json").read_text())
    return folder


@pytest.mark.parametrize("how", speed.HOW)
@pytest.mark.parametrize("name", ["dates-llama", "dates-gpt2", "shards"])
def test_reading_in_fewer_bits_is_reading_and_quantising(name, how, tmp_path):
    """In whichever dtype: the blocks are those of the file's numbers."""
    name = sharded(tmp_path) if name == "shards" else name
    model, _ = minillama.load(name, quantize=how)
    plain, _ = minillama.load(name)
    assert not model.training and model.base_fingerprint == fingerprint(plain)
    same(model, quantize(plain, how))
    same(minillama.load(name, torch.bfloat16, quantize=how)[0], plain.to(torch.bfloat16))


OTHERS = [
    (kind, how) for how in BLOCKS for kind in (Kind.F32, Kind.Q4_1, Kind.Q6_K, *BLOCKS.values()) if kind != BLOCKS[how]
]


@pytest.mark.parametrize("kind, how", OTHERS, ids=lambda value: getattr(value, "name", value))
def test_other_kinds_are_made_whole_a_matrix_at_a_time(kind, how, tmp_path):
    path = write(tmp_path / "tiny.gguf", base(attention_bias=True), kind)
    model, _ = minillama.load(path, torch.bfloat16, quantize=how)
    plain, _ = minillama.load(path, torch.float32)
    assert same_base(model.base_fingerprint, fingerprint(plain))
    same(model, quantize(plain, how).to(torch.bfloat16))


def any_codes(matrix, kind):
    """The matrix in blocks whose codes do not reach as far as rounding would make them."""
    blocks = QUANTIZE(matrix, kind)
    if kind in BLOCKS.values():
        inner, random = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), np.random.default_rng(len(matrix))
        half = random.integers(-40, 40, inner[:, 2:].shape, dtype=np.int8).view(np.uint8)
        inner[:, 2:] = half if kind == Kind.Q8_0 else random.integers(4, 12, half.shape, dtype=np.uint8) * 17
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen3"])
def test_a_gguf_files_own_blocks_are_kept_to_the_last_bit(architecture, how, tmp_path, monkeypatch):
    """Of rows that llama.cpp reorders, and of matrices that it fuses, too; rounded again, they would be others."""
    monkeypatch.setattr(gguf, "quantize", any_codes)
    model_type, changes, fields = RELATIVES.get(architecture, ("llama", {}, {}))
    fields = fields | {"rope_dimension_count": changes.get("head_dim", 32)}
    path = write(
        tmp_path / "tiny.gguf", base(model_type=model_type, **changes), BLOCKS[how], architecture=architecture, **fields
    )
    model, _ = minillama.load(path, torch.bfloat16, quantize=how)
    plain, _ = minillama.load(path, torch.float32)  # by the gguf package's dequantisation
    again, names = quantize(minillama.load(path, torch.float32)[0], how), []
    for name, linear in plain.layers.named_modules():
        if isinstance(linear, nn.Linear):
            kept = model.layers.get_submodule(name)
            assert isinstance(kept, BlockLinear) and torch.equal(kept.weight, linear.weight), name
            assert not torch.equal(again.layers.get_submodule(name).codes, kept.codes), name
            names.append(name)
    assert len(names) == 14 and same_base(model.base_fingerprint, fingerprint(plain))
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.float()(ids), plain.to(torch.bfloat16).float()(ids), rtol=0.1, atol=0.1)


def test_no_room_is_made_for_what_no_file_of_this_size_can_hold(tmp_path):
    """68 GB of blocks a matrix, were the configuration believed."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((BASES / "dates-llama" / file).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": 2**18, "head_dim": 2**12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(minillama.FileError, match="the weights take .* bytes, and the configuration asks for"):
        minillama.load(tmp_path, quantize="8bit")


def test_what_is_wrong_with_a_file_is_said_all_the_same(tmp_path):
    path = write(tmp_path / "tiny.gguf", base(), Kind.Q8_0)
    data, weight = bytearray(path.read_bytes()), base().layers[1].mlp.up_proj.weight.detach().numpy()
    at = data.index(gguf.quantize(weight, Kind.Q8_0).tobytes())
    data[at : at + 2] = np.float16(np.nan).tobytes()  # a block's scale
    path.write_bytes(data)
    with pytest.raises(minillama.FileError, match=r"tiny.gguf: layers.1.mlp.up_proj.weight holds NaN or infinity"):
        minillama.load(path, quantize="8bit")
    path = write(tmp_path / "lacking.gguf", base(), Kind.Q8_0, drop=["blk.1.ffn_up.weight"])
    with pytest.raises(minillama.FileError, match=r"the weights lack layers.1.mlp.up_proj.weight"):
        minillama.load(path, quantize="4bit")
    path = write(tmp_path / "narrow.gguf", base(), Kind.Q8_0, feed_forward_length=256)
    with pytest.raises(
        minillama.FileError, match=r"_proj.weight has shape \(512, 256\) and the configuration asks for"
    ):
        minillama.load(path, quantize="8bit")
    with pytest.raises(ValueError, match="quantize is '3bit'; it can be 8bit, 4bit, float8"):
        minillama.load("nowhere", quantize="3bit")


PEAK = """
import pathlib, re, sys, torch, minillama
def held(word):
    return 1024 * int(re.search(rf"Vm{word}:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
minillama.load("dates-llama", torch.bfloat16, quantize=sys.argv[2])  # what loading needs once
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = held("RSS")
model, _ = minillama.load(sys.argv[1], torch.bfloat16, quantize=sys.argv[2])
print(held("HWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of 151 M random weights, 302 MB in bfloat16, in a folder."""
    folder = tmp_path_factory.mktemp("large")
    config = minillama.LLaMAConfig(512, 512, 1408, 47, 8, 8)
    with torch.device("meta"):
        model = minillama.LLaMA(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    minillama.save(model, folder)
    assert 290e6 < (folder / "model.safetensors").stat().st_size < 320e6
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="a process's peak is read from Linux's /proc")
@pytest.mark.parametrize("form, how", [("safetensors", "4bit"), ("gguf", "8bit")])
def test_a_base_does_not_grow_on_loading(form, how, large, tmp_path):
    """But for what the C library keeps of memory that was freed: here it keeps nothing."""
    path = large
    if form == "gguf":
        path = write(tmp_path / "large.gguf", minillama.load(large, torch.float32)[0], BLOCKS[how])
    kept = {f"MALLOC_{what}_THRESHOLD_": "131072" for what in ("TRIM", "MMAP")}  # what is freed goes back at once
    said = subprocess.run(
        [sys.executable, "-c", PEAK, path, how], capture_output=True, text=True, check=True, env=os.environ | kept
    ).stdout
    peak, size = map(int, said.split())
    print(f"\n{form} in {how}: {size / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB, {peak / size:.2f} times")
    assert 75e6 < size < 170e6 and peak < 1.25 * size
