"""The promises of llama_adapter.py beyond those of every method (test_methods.py):
variants, economy, the layer of its own."""

import pytest
import torch
import torch.nn.functional as F
from methods import builder, check_closed, check_open
from small import KINDS, rotated
from torch import nn

import minillama
from minillama import adapt, delete_adapter, disabled
from minillama.adapters import adapter_parameters, wrappers
from minillama.adapters.llama_adapter import PRESETS, AdaptedAttention, GatedPrefixAttention

VARIANTS = [dict(gate=gate, tanh=tanh) for gate in ("head", "layer", "feature") for tanh in (True, False)]


@pytest.mark.parametrize("kind, variant", rotated(KINDS, VARIANTS), ids=str)
def test_variants_open(kind, variant, ids):
    check_open(builder(kind, "llama_adapter", **variant), ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind, variant", rotated(KINDS, VARIANTS), ids=str)
def test_variants_closed(kind, variant, ids):
    check_closed(builder(kind, "llama_adapter", **variant), ids)


@torch.no_grad()
@pytest.mark.parametrize("kind, preset", rotated(KINDS, PRESETS))
def test_presets(kind, preset, ids):
    """All begin as the base, but for PEFT's where the output projection has a bias, which it adds a second time."""
    if (kind, preset) == ("grouped", "peft_gpt2"):
        with pytest.raises(ValueError, match="60 features together; the layer has 48"):
            builder(kind, "llama_adapter", **PRESETS[preset])("closed")
        return
    build = builder(kind, "llama_adapter", **PRESETS[preset])
    if preset == "peft" and kind != "llama":
        distance = (build("closed")(ids) - build(None)(ids)).abs().max()
        assert distance > 0.01
    else:
        check_closed(build, ids)
    before = builder(kind, "llama_adapter", **{**PRESETS[preset], "join": "before"})
    model, alike = build("open").double(), before("open").double()
    same = torch.allclose(model(ids), alike(ids))
    assert same == (PRESETS[preset]["join"] == "before" or (preset == "peft" and kind == "llama"))
    with disabled(model):
        assert torch.equal(model(ids), build(None).double()(ids))


def test_an_adapter_joined_elsewhere_must_be_the_last(model):
    adapt(model, "llama_adapter", **PRESETS["peft"])
    for method in ("llama_adapter", "prefix_tuning"):
        with pytest.raises(ValueError, match="attach that one last"):
            adapt(model, method, name="second")


def test_gates_at_zero_give_prompts_no_gradient(model, ids):
    adapt(model, "llama_adapter")
    minillama.answer_loss(model, ids, ids).backward()
    for name, parameter in adapter_parameters(model).items():
        assert (parameter.grad == 0).all() if name.endswith("prompt") else (parameter.grad != 0).all()


def test_nothing_runs_backward_below_the_first_adapted_layer(model, ids):
    adapt(model, "llama_adapter", layers=1)
    entered = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, _, x, index=index: entered.update({index: x}))
    minillama.answer_loss(model, ids, ids).backward()
    assert [entered[i].requires_grad for i in range(3)] == [False, False, True]
    assert [isinstance(layer.self_attn, AdaptedAttention) for layer in model.layers] == [False, False, True]


def test_prefix_is_projected_once_per_generation(model, ids):
    adapt(model, "llama_adapter")
    calls = []
    for _, wrapper in wrappers(model):
        original = wrapper.prefix
        wrapper.prefix = lambda dtype, original=original: calls.append(1) or original(dtype)
    minillama.generate(model, ids, 10)
    assert len(calls) == 3
    minillama.generate(model, ids, 10)
    assert len(calls) == 6


def test_base_projections_run_once_per_forward(model, ids):
    """The query and output projections see the words once; keys and values the words and the prompts."""
    adapt(model, "llama_adapter")
    calls = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 0}
    for name in calls:
        for layer in model.layers:
            module = getattr(layer.self_attn.base, name)
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    model(ids)
    assert calls == {"q_proj": 3, "k_proj": 6, "v_proj": 6, "o_proj": 3}


# ── the layer that needs no base model ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_standalone_layer(variant):
    torch.manual_seed(0)
    layer, x = GatedPrefixAttention(24, 4, prompt_length=3, **variant).double(), torch.randn(2, 5, 24).double()
    q, k, v = layer.c_attn(x).chunk(3, -1)
    _, pk, pv = layer.c_attn(layer.prompt).chunk(3, -1)

    def heads(z):
        return z.unflatten(-1, (4, 6)).transpose(-3, -2)

    causal = torch.ones(5, 5).tril().bool()

    def formula(allowed):
        words = (heads(q) @ heads(k).mT / 6**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ heads(v)
        prompts = (heads(q) @ heads(pk).mT / 6**0.5).softmax(-1) @ heads(pv)
        gate = layer.gate.tanh() if variant["tanh"] else layer.gate
        return layer.c_proj((words + gate * prompts).transpose(1, 2).flatten(2))

    attended = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
    plain = layer.c_proj(attended.transpose(1, 2).flatten(2))
    assert torch.equal(layer(x), plain)  # closed
    torch.testing.assert_close(layer(x), formula(causal))
    nn.init.normal_(layer.gate)
    torch.testing.assert_close(layer(x), formula(causal))  # open
    torch.testing.assert_close(layer(x, torch.ones(5, 5).bool()), formula(torch.ones(5, 5).bool()))
    with pytest.raises(ValueError, match="num_heads is 5"):
        GatedPrefixAttention(24, 5)


def test_prompts_as_large_as_the_tokens(model):
    """init "input" draws what "normal" draws, times the size that the norm before the attention gives the words."""
    torch.manual_seed(3)
    normal = {name: parameter.clone() for name, parameter in adapter_parameters(adapt(model, "llama_adapter")).items()}
    delete_adapter(model)
    torch.manual_seed(3)
    adapt(model, "llama_adapter", init="input")
    for index, layer in enumerate(model.layers):
        words = layer.input_layernorm(torch.randn(20_000, 48)) - getattr(layer.input_layernorm, "bias", 0)
        ratio = layer.self_attn.prompt / normal[f"layers.{index}.self_attn.llama_adapter.prompt"]
        torch.testing.assert_close(
            ratio, torch.full_like(ratio, words.square().mean().sqrt().item()), rtol=0.02, atol=0
        )
        assert not layer.self_attn.gate.any()
    with pytest.raises(ValueError, match="init is 'small'"):
        adapt(delete_adapter(model), "llama_adapter", init="small")
