"""Adapter folders: written whole, read back to the same logits, exchanged with PEFT,
and refused when anything is off."""

import copy
import json
import math
import re
import subprocess
import sys

import peft
import pytest
import torch
from methods import CASES, adapted, show
from safetensors.torch import load_file, save_file
from small import KINDS, make, open_gates, rotated
from test_models import GROUPED, build

import minillama
from minillama import adapt, load_adapter, save_adapter
from minillama.adapters import adapter_parameters, delete_adapter, wrappers
from minillama.adapters.llama_adapter import PRESETS
from minillama.checkpoints import files
from minillama.checkpoints.files import read_safetensors

NATIVE = list(CASES) + [dict(method="llama_adapter", gate="feature", layers=2, prompt_length=3)]
# What PEFT has and computes alike: our arguments of `adapt`, and its configuration.
EVERY = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
SHARED = {
    "adaption_prompt": (
        dict(method="llama_adapter", prompt_length=4, layers=2),  # and the preset of the base
        lambda kind: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    ),
    "prompt_tuning": (
        dict(method="prompt_tuning", prompt_length=4),
        lambda kind: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
    "prefix_tuning": (
        dict(method="prefix_tuning", prefix_length=4),
        lambda kind: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
    "ia3": (
        dict(method="ia3"),
        lambda kind: peft.IA3Config(
            target_modules=theirs(kind, ["k_proj", "v_proj", "down_proj"]),
            feedforward_modules=theirs(kind, ["down_proj"]),
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
        ),
    ),
    "lora": (dict(method="lora", rank=3, alpha=5.0), lambda kind: lora(kind, ["q_proj", "v_proj"], r=3, lora_alpha=5)),
    "dora": (
        dict(method="dora", rank=3, alpha=5.0),
        lambda kind: lora(kind, ["q_proj", "v_proj"], r=3, lora_alpha=5, use_dora=True),
    ),
    "lora everywhere": (
        dict(method="lora", rank=2, alpha=3.0, targets=EVERY),
        lambda kind: lora(kind, EVERY, r=2, lora_alpha=3),
    ),
}
FUSED = {
    "gpt2": {
        "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "attn.c_proj", "up_proj": "c_fc",
        "down_proj": "mlp.c_proj",
    },
    "phi3": {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "up_proj": "gate_up_proj"},
}  # fmt: skip


def theirs(kind, names):
    """What transformers calls our projections on this base."""
    return sorted({FUSED.get(kind, {}).get(name, name) for name in names})


def lora(kind, targets, **options):
    options = dict(fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM") | options
    return peft.LoraConfig(target_modules=theirs(kind, targets), **options)


BASES = {
    "llama": ("Llama", GROUPED),
    "llama with biases": ("Llama", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "gpt2": "gpt2",
    **{kind: kind for kind in ("qwen3", "smollm3", "olmo2", "phi3", "granite", "gemma3", "yarn")},
}
RELATIVES = list(BASES)[5:]
PAIRS = [
    pytest.param(kind, method, marks=() if kind in ("llama with biases", "gpt2") else pytest.mark.slow)
    for kind in BASES
    for method in SHARED
    if kind not in RELATIVES  # of which test_models_table.py asks the same
    if method != "adaption_prompt" or kind in ("llama", "llama with biases", "mistral", "gpt2", "yarn")
]


@torch.no_grad()
@pytest.mark.parametrize("kind, case", rotated(KINDS, NATIVE), ids=str)
def test_round_trip(kind, ids, case, tmp_path):
    torch.manual_seed(0)
    model = make(kind)
    expected = open_gates(adapted(model, case))(ids)
    parts = model.adapters["default"]
    save_adapter(model, tmp_path)
    delete_adapter(model)
    show(load_adapter(model, tmp_path, name="again"))
    # a rank-r path of a fused GPT-2 matrix comes back as paths of a greater rank: the same but for rounding
    exact = not (isinstance(model, minillama.GPT2) and parts[0]["method"] in ("lora", "dora"))
    far = (model(ids) - expected).abs().max()
    assert torch.equal(model(ids), expected) if exact else far < 1e-5 * expected.abs().max()
    assert list(model.adapters) == ["again"]


@torch.no_grad()
def test_an_adapter_of_two_methods_comes_back(model, ids, tmp_path):
    adapt(adapt(model, "bottleneck", size=3, place="parallel"), "llama_adapter")
    expected = open_gates(model)(ids)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(delete_adapter(model), tmp_path)(ids), expected)


@pytest.fixture
def pair(request, tmp_path):
    """(their base, our base of the same weights, its kind)"""
    kind = request.param
    torch.manual_seed(0)
    theirs = build(BASES[kind]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases at 0 and matrices near it would hide what an adapter does
            parameter += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "base")
    return theirs, minillama.load(tmp_path / "base")[0], kind


@torch.no_grad()
@pytest.mark.parametrize("pair, method", PAIRS, indirect=["pair"])
def test_peft_reads_what_we_train(pair, method, ids, tmp_path):
    theirs, ours, kind = pair
    preset = PRESETS["peft_gpt2" if kind == "gpt2" else "peft"] if method == "adaption_prompt" else {}
    adapt(ours, **SHARED[method][0], **preset)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        with torch.enable_grad():
            minillama.answer_loss(ours, ids, ids).backward()
        optimizer.step()
    save_adapter(ours, tmp_path / "adapter")
    base_logits = theirs(ids).logits.clone()
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (adapted(ids).logits[:, -9:] - ours(ids)).abs().max() < 1e-5
    assert (adapted(ids).logits[:, -9:] - base_logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("pair, method", PAIRS, indirect=["pair"])
def test_we_read_what_peft_writes(pair, method, ids, tmp_path):
    exchanged(*pair, method, ids, tmp_path)


def exchanged(theirs, ours, kind, method, ids, folder):
    """What PEFT writes gives us its logits, and what we write of it gives them to PEFT."""
    base_logits = theirs(ids).logits.clone()
    adapted = peft.get_peft_model(copy.deepcopy(theirs), SHARED[method][1](kind)).eval()
    for name, parameter in adapted.named_parameters():
        if any(word in name for word in ("adaption", "ia3", "lora", "prompt_encoder")):
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    expected = adapted(ids).logits[:, -9:]  # prompt tuning gives the prompt's own too
    load_adapter(ours, folder / "adapter")
    assert (ours(ids) - expected).abs().max() < 1e-5
    assert (expected - base_logits).abs().max() > 1e-2
    save_adapter(ours, folder / "again")  # and what we write of it, PEFT reads
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder / "again").eval()
    assert (again(ids).logits[:, -9:] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "key, value",
    [
        ("init_lora_weights", "pissa"),
        ("rank_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
    ],
)
def test_what_peft_asks_and_we_do_not_do_is_refused_by_name(pair, key, value, tmp_path):
    theirs, ours, _ = pair
    peft.get_peft_model(theirs, SHARED["lora"][1]("llama")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(minillama.FileError, match=f"{key} is"):
        load_adapter(ours, tmp_path / "adapter")
    assert not wrappers(ours)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_peft_refuses_what_it_would_compute_otherwise(pair, tmp_path):
    """A gate per head under tanh is not PEFT's formula, so the file does not pretend to be PEFT's."""
    theirs, ours, _ = pair
    save_adapter(adapt(ours, "llama_adapter"), tmp_path / "adapter")
    with pytest.raises(Exception, match="MINILLAMA"):
        peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")


def without_its_own_config(folder):
    """The folder as another library would have written it."""
    path = folder / "adapter_model.safetensors"
    kept = {"base_fingerprint": read_safetensors(path)[1]["base_fingerprint"]}
    save_file(load_file(path), path, metadata=kept)


def test_bad_adapter_files_are_named_and_leave_the_model_alone(model, ids, tmp_path):
    base = model(ids)

    def refused(match, **options):
        with pytest.raises(minillama.FileError, match=match) as error:
            load_adapter(model, tmp_path, **options)
        assert "\n" not in str(error.value)
        assert not wrappers(model) and torch.equal(model(ids), base)

    refused("holds no adapter")
    save_adapter(adapt(model, "llama_adapter"), tmp_path)
    delete_adapter(model)
    without_its_own_config(tmp_path)  # so that adapter_config.json decides
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content, text = weights.read_bytes(), config.read_text()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(True)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def changed(**changes):
        config.write_text(json.dumps({**json.loads(text), **changes}))

    weights.write_bytes(content[:-10])
    refused("cut short")
    weights.write_bytes(content)
    config.write_text(text[:-10])
    refused("not valid JSON")
    changed(peft_type="LOHA")
    refused("peft_type is 'LOHA'")
    changed(peft_type="LORA")
    refused("parts is")
    for part, named in (
        (dict(method="lora2"), "method is 'lora2'"),
        (dict(method="llama_adapter", layers=7), "layers is 7"),
        (dict(method="llama_adapter", layers=2), "layers.0.self_attn"),
        (dict(method="llama_adapter", prompt_length=3), "shape"),
        (dict(method="llama_adapter", layers="all"), "adapter_config.json"),
    ):
        changed(parts=[part])
        refused(named)
    config.write_text(json.dumps({"peft_type": "MINILLAMA"}))
    refused("parts is missing")
    config.write_text(text)
    assert all(parameter.requires_grad == required for parameter, required in before)
    other = open_gates(adapt(model, "ia3"))(ids)  # another adapter, active and trainable, stays so
    changed(parts=[dict(method="llama_adapter", prompt_length=3)])
    with pytest.raises(minillama.FileError, match="shape"):
        load_adapter(model, tmp_path, name="second")
    assert torch.equal(model(ids), other) and list(model.adapters) == ["default"]
    assert len(minillama.trainable_parameters(model)) == len(wrappers(model)) == 9
    delete_adapter(model)
    config.write_text(text)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight += 1
    base = model(ids)
    refused("fingerprint")
    load_adapter(model, tmp_path, check_base=False)
    assert len(wrappers(model)) == 3


def test_fingerprint_outlives_dtypes_and_adaptation_and_sees_every_weight(model):
    from minillama.adapters.storage import fingerprint, same_base

    plain, half = fingerprint(model), copy.deepcopy(model).half()
    assert fingerprint(open_gates(adapt(model, "llama_adapter"))) == plain
    assert same_base(fingerprint(half), plain)
    assert fingerprint(torch.compile(delete_adapter(model), backend="eager")) == plain
    assert same_base(fingerprint(model.to(torch.bfloat16)), plain)
    for place in (0, 1, -1):  # no weight is left out
        with torch.no_grad():
            model.norm.weight[place] += 1
        assert not same_base(fingerprint(model), plain)
        with torch.no_grad():
            model.norm.weight[place] -= 1
    other = make("llama")
    assert not same_base(fingerprint(other), plain)


def test_nothing_half_written(model, tmp_path, monkeypatch):
    """A write that fails leaves the old file, and no other."""
    from minillama.checkpoints import files

    save_adapter(adapt(model, "llama_adapter"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(open_gates(model), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(minillama.FileError, match="cannot be written"):
        save_adapter(model, tmp_path / "file" / "below")


def test_the_weights_say_how_they_are_read(model, tmp_path):
    """New weights beside an old alpha, as a killed writer or a copy of one file leaves them, are never combined."""
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_adapter(open_gates(adapt(model, "lora", rank=4, alpha=8)), tmp_path)
    delete_adapter(model)
    text, alpha = config.read_text(), json.loads(config.read_text())["lora_alpha"]
    config.write_text(text.replace(f'"lora_alpha": {alpha}', '"lora_alpha": 99'))
    with pytest.raises(minillama.FileError, match=f"lora_alpha is 99, .* written with {alpha}: the two do not belong"):
        load_adapter(model, tmp_path)
    assert not wrappers(model)
    config.write_text(text.replace('"inference_mode": true', '"inference_mode": false'))  # decides nothing
    delete_adapter(load_adapter(model, tmp_path))
    config.unlink()
    delete_adapter(load_adapter(model, tmp_path))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(minillama.FileError, match="not those that were written"):
        load_adapter(model, tmp_path)


def test_numbers_that_are_none_are_neither_saved_nor_read(model, tmp_path):
    save_adapter(adapt(model, "ia3"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    before = path.read_bytes()
    (name, first), *_ = adapter_parameters(model).items()
    for number in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            first[0] = number
        with pytest.raises(ValueError, match="holds NaN or infinity.*lower learning rate"):
            save_adapter(model, tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    delete_adapter(model)
    tensors = load_file(path)
    key = next(iter(tensors))
    for changed, words in (
        (tensors[key] * math.nan, "holds NaN or infinity"),
        (tensors[key] * 0 + 3e38, r"holds the number 3\.0e\+38"),  # one that is finite, and overflows when multiplied
        (tensors[key].to(torch.int64), "is of int64; needed is one of float32"),
        (tensors[key].to(torch.float8_e4m3fn), "is of float8_e4m3fn"),
        (tensors[key].to(torch.bool), "is of bool"),
    ):
        save_file(tensors | {key: changed}, path)
        with pytest.raises(minillama.FileError, match=f"{re.escape(key)} {words}"):
            load_adapter(model, tmp_path)


@pytest.mark.slow
def test_two_writers_do_not_mix(tmp_path):
    """Another process holds the folder; this one says so, and writes when it is free."""
    model = adapt(make("llama"), "ia3")
    held = "import sys; from minillama.checkpoints.files import locked\n"
    held += "with locked(sys.argv[1]): print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(minillama.FileError, match="another process is writing"):
            save_adapter(model, tmp_path)
        other.communicate("\n")
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path)


def test_what_a_killed_writer_left_is_swept(model, tmp_path):
    """Its half file, and the one that safetensors writes beside that."""
    left = tmp_path / ".adapter_model.safetensors-abcdefgh"
    left.mkdir()
    for name in ("adapter_model.safetensors", ".tmpXyZ123"):
        (left / name).write_bytes(b"half")
    with files.replacing(tmp_path / "adapter_model.safetensors") as mine:  # one that is being written stays
        save_adapter(adapt(model, "ia3"), tmp_path)
        assert mine.parent.exists() and not left.exists()
        mine.write_bytes((tmp_path / "adapter_model.safetensors").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_odd_names_and_odd_fingerprints_end_in_one_line(model, tmp_path):
    """A soak of 20,000 damaged files: keys with line breaks in them, fingerprints that are no hex digits."""
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_adapter(adapt(model, "ia3"), tmp_path)
    delete_adapter(model)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"one\ntwo\r\x1b[1m": 3}))
    with pytest.raises(minillama.FileError, match=r"says one\\ntwo\\r\\x1b\[1m is 3") as refused:
        load_adapter(model, tmp_path)
    assert "\n" not in str(refused.value)
    beside.unlink()
    data = path.read_bytes()
    start = data.index(b'"base_fingerprint":"') + len(b'"base_fingerprint":"')
    path.write_bytes(data[: start + 9] + b"~" + data[start + 10 :])
    with pytest.raises(minillama.FileError, match="was trained on a base with fingerprint"):
        load_adapter(model, tmp_path)


def test_saving_needs_an_adapter(model, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(model, tmp_path)
