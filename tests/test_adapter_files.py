"""Adapter folders: written whole, read back to the same logits, exchanged with PEFT, and refused when anything is off."""

import json

import peft
import pytest
import torch
import transformers
from conftest import SHAPE, open_gates

import minillama
from minillama import adapt, load_adapter, save_adapter
from minillama.adapters import detach, wrappers

VARIANTS = [{}, dict(gate="layer", tanh=False), dict(gate="feature", layers=2, prompt_length=3)]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_round_trip(model, ids, variant, tmp_path):
    expected = open_gates(adapt(model, "llama_adapter", **variant))(ids)
    save_adapter(model, tmp_path)
    detach(model)
    load_adapter(model, tmp_path)
    assert torch.equal(model(ids), expected)
    assert len(wrappers(model)) == variant.get("layers", 3)


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=2)).eval()
    model.save_pretrained(tmp_path / "base")
    return model


@torch.no_grad()
def test_peft_reads_what_we_train(theirs, ids, tmp_path):
    ours, _ = minillama.load(tmp_path / "base")
    adapt(ours, "llama_adapter", prompt_length=4, layers=2, gate="layer", tanh=False)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        with torch.enable_grad():
            minillama.answer_loss(ours, ids, ids).backward()
        optimizer.step()
    save_adapter(ours, tmp_path / "adapter")
    base_logits = theirs(ids).logits.clone()
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (adapted(ids).logits - ours(ids)).abs().max() < 1e-5
    assert (adapted(ids).logits - base_logits).abs().max() > 1e-3


@torch.no_grad()
def test_we_read_what_peft_writes(theirs, ids, tmp_path):
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config).eval()
    for name, parameter in adapted.named_parameters():
        if "adaption" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(minillama.load(tmp_path / "base")[0], tmp_path / "adapter")
    assert (adapted(ids).logits - ours(ids)).abs().max() < 1e-5


def test_peft_refuses_what_it_would_compute_otherwise(theirs, tmp_path):
    """A gate per head under tanh is not PEFT's formula, so the file does not pretend to be PEFT's."""
    ours, _ = minillama.load(tmp_path / "base")
    save_adapter(adapt(ours, "llama_adapter"), tmp_path / "adapter")
    with pytest.raises(Exception, match="MINILLAMA"):
        peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")


def test_bad_adapter_files_are_named_and_leave_the_model_alone(model, ids, tmp_path):
    base = model(ids)

    def refused(match, **options):
        with pytest.raises(minillama.FileError, match=match) as error:
            load_adapter(model, tmp_path, **options)
        assert "\n" not in str(error.value)
        assert not wrappers(model) and torch.equal(model(ids), base)

    refused("adapter_config.json is missing")
    save_adapter(adapt(model, "llama_adapter"), tmp_path)
    detach(model)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content, text = weights.read_bytes(), config.read_text()

    def changed(**changes):
        config.write_text(json.dumps({**json.loads(text), **changes}))

    weights.write_bytes(content[:-10])
    refused("cut short")
    weights.write_bytes(content)
    config.write_text(text[:-10])
    refused("not valid JSON")
    changed(peft_type="LORA")
    refused("peft_type is 'LORA'")
    changed(method="lora2")
    refused("method is 'lora2'")
    changed(layers=7)
    refused("layers is 7")
    changed(layers=2)
    refused("layers.0.self_attn")
    changed(prompt_length=3)
    refused("shape")
    config.write_text(text)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight += 1
    base = model(ids)
    refused("fingerprint")
    load_adapter(model, tmp_path, check_base=False)
    assert len(wrappers(model)) == 3


def test_fingerprint_outlives_dtype_and_adaptation(model):
    from minillama.adapters.peft import fingerprint

    plain = fingerprint(model)
    assert fingerprint(open_gates(adapt(model, "llama_adapter"))) == plain
    assert fingerprint(detach(model).to(torch.bfloat16)) == plain
    with torch.no_grad():
        model.norm.weight += 1
    assert fingerprint(model) != plain


def test_nothing_half_written(model, tmp_path, monkeypatch):
    """A write that fails leaves the old file, and no other."""
    from minillama import files

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


def test_saving_needs_an_adapter(model, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(model, tmp_path)
