"""The methods outside minillama: on modules and models of others, each works to the letter or refuses in a sentence.

The table in docs/adapters.md is made here; the lines that each use takes are those of USES.
"""

import importlib.util
import pathlib

import pytest
import torch
import transformers
from small import SHAPE
from torch import nn

import minillama
from minillama.adapters import METHODS, dora, ia3, llama_adapter, lora, prefix_tuning, transformers_llama
from minillama.adapters.llama_adapter import PRESETS
from minillama.rope import rotate

ROOT = pathlib.Path(__file__).parent.parent


class Plain(nn.Module):
    """A block by names of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


def plain():
    return Plain(), (torch.randn(2, 5, 16),)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, 5, 16),)


def of_transformers(name, **changes):
    config = {**SHAPE, **changes}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    return model, (torch.randint(1, 101, (2, 7)),)


def llama():
    return of_transformers("Llama", num_key_value_heads=2)


def gpt2():
    config = transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=2, n_head=6, n_positions=64)
    return transformers.GPT2LMHeadModel(config), (torch.randint(1, 101, (2, 7)),)


def t5():
    config = transformers.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    ids = torch.randint(1, 101, (2, 7))
    return model, (ids, torch.ones_like(ids), ids[:, :4])


MODELS = {"plain module": plain, "TransformerEncoder": encoder, "Llama": llama, "GPT-2": gpt2, "T5": t5}
LORA = {
    "plain module": ("first", "second"),
    "TransformerEncoder": ("linear1", "linear2", "out_proj"),
    "Llama": ("q_proj", "v_proj", "down_proj"),
    "T5": ("q", "v", "wi", "wo"),
}
IA3 = {
    "plain module": dict(outputs=("first",), inputs=("second",)),
    "TransformerEncoder": dict(outputs=("linear1",), inputs=("linear2",)),
    "Llama": {},
    "T5": dict(outputs=("k", "v"), inputs=("wo",)),
}
# How each is put on each: a function of the model; where there is none, `attach` with its defaults must refuse.
USES = {
    **{("lora", name): lambda m, t=targets: lora.attach(m, targets=t) for name, targets in LORA.items()},
    **{("dora", name): lambda m, t=targets: dora.attach(m, targets=t) for name, targets in LORA.items()},
    **{("ia3", name): lambda m, o=options: ia3.attach(m, **o) for name, options in IA3.items()},
    ("bottleneck", "Llama"): lambda m: METHODS["bottleneck"].attach(m),
    ("llama_adapter_v2", "Llama"): lambda m: METHODS["llama_adapter_v2"].attach(m),
    ("llama_adapter", "Llama"): lambda m: transformers_llama.attach(m, prompt_length=4),
    ("prefix_tuning", "Llama"): lambda m: transformers_llama.attach(m, prefix_tuning, prefix_length=4),
}
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)  # transformers' loop without an end
EVERY = [(method, model) for method in METHODS for model in MODELS]


def output(model, inputs):
    if hasattr(model, "generation_config") and len(inputs) == 3:
        return model(input_ids=inputs[0], attention_mask=inputs[1], decoder_input_ids=inputs[2]).logits
    out = model(*inputs)
    return getattr(out, "logits", out)


def own(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("method, kind", [pair for pair in EVERY if pair in USES])
def test_it_works(method, kind):
    """Bit-identical at the start (but for prefix tuning), in eval without gradients too, where torch's encoder reads
    the weights and calls no module; every parameter has an effect, and training reaches it."""
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        base = output(model, inputs)
    USES[method, kind](model)
    assert own(model) and not any(p.requires_grad for p in model.parameters() if p.numel() == 0)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), base) == (method != "prefix_tuning")
        for parameter in own(model):
            parameter += 0.3 * torch.randn_like(parameter)
        opened = output(model, inputs)
    assert (opened - base).abs().max() > 1e-3 * base.abs().max()
    traced = output(model, inputs)  # with gradients: torch's encoder takes its slow path
    torch.testing.assert_close(traced.detach(), opened, rtol=1e-4, atol=1e-5)
    traced.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own(model))


@pytest.mark.parametrize("method, kind", [pair for pair in EVERY if pair not in USES])
def test_it_is_refused(method, kind):
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="the model") as error:
        METHODS[method].attach(model)
    assert len(str(error.value)) > 40 and "\n" not in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


def test_the_table_in_the_docs():
    """docs/adapters.md says the same as the tests above."""
    text = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    for method in METHODS:
        cells = ["works" if (method, kind) in USES else "refused" for kind in MODELS]
        assert f"\n| `{method}` | {' | '.join(cells)} |\n" in text, (method, cells)


# ── zero-init attention on a LLaMA of transformers ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("name", ("Llama", "Mistral", "Qwen2"))
@pytest.mark.parametrize("preset", ("paper", "peft"))
def test_it_equals_ours(name, attention, preset, tmp_path):
    """The same weights and adapter in ours and on transformers' model: closed its base bit for bit, open equal to ours,
    with padding; generation by transformers' own loop and cache gives the same tokens."""
    torch.manual_seed(0)
    theirs, (ids,) = of_transformers(name, num_key_value_heads=2, attn_implementation=attention)
    theirs.eval().requires_grad_(False)
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        base = theirs(ids, attention_mask=mask).logits
        transformers_llama.attach(theirs, prompt_length=4, **PRESETS[preset])
        assert torch.equal(theirs(ids, attention_mask=mask).logits, base)
        minillama.adapt(ours, "llama_adapter", prompt_length=4, **PRESETS[preset])
        for mine, layer in zip(ours.layers, theirs.model.layers):
            mine.self_attn.gate.normal_()
            layer.self_attn.adapted.prompt.copy_(mine.self_attn.prompt)
            layer.self_attn.adapted.gate.copy_(mine.self_attn.gate)
        for kept in (None, mask):
            # transformers counts positions from each row's first real token in generate, but not in a bare forward
            positions = None if kept is None else (kept.cumsum(1) - 1).clamp(min=0)
            expected, logits = ours(ids, kept), theirs(ids, attention_mask=kept, position_ids=positions).logits
            real = torch.ones_like(ids).bool() if kept is None else kept.bool()
            assert (logits - expected)[real].abs().max() < 1e-5
        assert not torch.equal(logits, base)
        expected = minillama.generate(ours, ids, 12)
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **GREEDY)
        assert torch.equal(written, expected)


def test_prefix_tuning_equals_ours(tmp_path):
    torch.manual_seed(0)
    theirs, (ids,) = llama()
    theirs.eval().requires_grad_(False).save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    transformers_llama.attach(theirs, prefix_tuning, prefix_length=4)
    minillama.adapt(ours, "prefix_tuning", prefix_length=4)
    with torch.no_grad():
        for mine, layer in zip(ours.layers, theirs.model.layers):
            for own_ in ("keys", "values"):
                getattr(layer.self_attn.adapted, own_).copy_(getattr(mine.self_attn, own_))
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-5
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **GREEDY)
        assert torch.equal(written, minillama.generate(ours, ids, 8))


def test_adapterhubs_prefix_is_ours_turned_on_by_its_length(tmp_path):
    """Theirs (adapters 1.3.0) is put before keys that are turned already, and the tokens keep their positions: what
    transformers computes behind a cache that holds it."""
    torch.manual_seed(0)
    theirs, (ids,) = llama()
    theirs.eval().save_pretrained(tmp_path)
    ours, K = minillama.adapt(minillama.load(tmp_path)[0], "prefix_tuning", prefix_length=4), 4
    cache, (B, T) = transformers.DynamicCache(config=theirs.config), ids.shape
    with torch.no_grad():
        for i, layer in enumerate(ours.layers):
            keys, values = torch.randn(2, *layer.self_attn.keys.shape)
            cache.update(*(z.expand(B, -1, -1, -1) for z in (keys, values)), i)
            layer.self_attn.keys.copy_(rotate(keys, *ours.rope(torch.full((K,), K))))
            layer.self_attn.values.copy_(values)
        how = dict(position_ids=torch.arange(T).expand(B, T), attention_mask=torch.ones(B, K + T))
        assert (theirs(ids, past_key_values=cache, **how).logits - ours(ids)).abs().max() < 1e-5


def test_a_refused_attach_leaves_the_model_alone():
    model, (ids,) = llama()
    before = model(ids).logits
    with pytest.raises(ValueError, match="prompt_length is 0"):
        transformers_llama.attach(model, prompt_length=0)
    assert torch.equal(model(ids).logits, before)
    qwen3, _ = of_transformers("Qwen3", num_key_value_heads=2)
    with pytest.raises(ValueError, match="not built as"):
        transformers_llama.attach(qwen3)
    assert llama_adapter.VERBS[0] == "project"


# ── a module copied alone into another project ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ("ia3", "lora", "dora", "bottleneck", "llama_adapter_v2"))
def test_a_module_alone_trains_a_transformers_model(name, tmp_path):
    """The file, copied to a folder of its own, lowers transformers' own loss."""
    copy = tmp_path / f"my_{name}.py"
    copy.write_text(pathlib.Path(METHODS[name].__file__).read_text())
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model, (ids,) = llama()
    model.requires_grad_(False)
    module.attach(model)
    optimizer = torch.optim.SGD(own(model), lr=1.0)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert model(ids, labels=ids).loss < loss
