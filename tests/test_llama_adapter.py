"""Zero-init gated prefix attention: closed, open, over two steps, and against the mistakes one makes when writing it.

Every check is a function of a way to build the adapted model, so that the same checks that pass on the right
implementation are required to fail on each planted mistake.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, left_padded, make, open_gates
from torch import nn

import minillama
from minillama import Cache, adapt, disabled
from minillama.adapters import adapter_parameters, detach, wrappers
from minillama.adapters import llama_adapter
from minillama.adapters.llama_adapter import AdaptedAttention, GatedPrefixAttention

LENGTHS = [9, 4, 6]  # of the rows of `ids`, when padded on the left
VARIANTS = [dict(gate=gate, tanh=tanh) for gate in ("head", "layer", "feature") for tanh in (True, False)]


def run(model, ids, padded=False, cached=False):
    """Logits (B, T, V) of the model by one of the four ways to call it."""
    mask = left_padded(ids, LENGTHS)[1] if padded else None
    if not cached:
        return model(ids, mask)
    cache, parts, seen = Cache(), [], 0
    for part in ids.split([4, 1, 1, 3], dim=1):
        seen += part.shape[1]
        parts.append(model(part, mask[:, :seen] if padded else None, cache))
    return torch.cat(parts, dim=1)


# ── the formula, written out in float64 with loops over rows and heads ──────────────────────────────────────────────


def reference_attention(attention, x, real, rope):
    """y of one adapted attention for x (B, T, D), every element by the paper's equations; padding rows are left 0."""
    base = attention.base
    H, G, d = base.num_heads, base.num_kv_heads, base.head_dim
    q, k, v = (F.linear(x, p.weight, p.bias) for p in (base.q_proj, base.k_proj, base.v_proj))
    pk, pv = (F.linear(attention.prompt, p.weight, p.bias) for p in (base.k_proj, base.v_proj))
    gate = attention.gate.tanh() if attention.tanh else attention.gate
    gate = gate.expand(H, 1, d)
    y = torch.zeros(x.shape[0], x.shape[1], H * d, dtype=x.dtype)
    for b in range(x.shape[0]):
        words = real[b].nonzero()[:, 0]  # n places
        future = torch.ones(len(words), len(words)).triu(1).bool()
        for h in range(H):
            group = h // (H // G)
            of_q, of_k = slice(h * d, h * d + d), slice(group * d, group * d + d)
            query, key = q[b, words, of_q], k[b, words, of_k]  # (n, d)
            if rope is not None:
                query, key = rotated(query, rope), rotated(key, rope)
            scores = (query @ key.T / math.sqrt(d)).masked_fill(future, -math.inf)
            on_words = scores.softmax(-1) @ v[b, words, of_k]
            on_prompts = (query @ pk[:, of_k].T / math.sqrt(d)).softmax(-1) @ pv[:, of_k]
            y[b, words, of_q] = on_words + gate[h] * on_prompts
    return y


def rotated(z, rope):
    """Row n of z (n, d) turned by n times the frequencies."""
    a, b = z.chunk(2, -1)
    angle = torch.arange(len(z))[:, None] * rope.frequencies().double()
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def reference_logits(model, ids, real):
    """Logits of a model whose every layer may be adapted, by the formula."""
    rope = getattr(model, "rope", None)
    x = model.embed_tokens(ids)
    if rope is None:
        x = x + model.embed_positions((real.cumsum(1) - 1).clamp(min=0))
    for layer in model.layers:
        y = reference_attention(layer.self_attn, layer.input_layernorm(x), real, rope)
        o = layer.self_attn.base.o_proj
        x = x + F.linear(y, o.weight, o.bias)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.norm(x))


# ── the checks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_closed(build, ids):
    """At the start: the base's logits bit for bit, both dtypes, with and without cache and padding."""
    for dtype in (torch.float32, torch.bfloat16):
        for padded in (False, True):
            for cached in (False, True):
                base = build(None).to(dtype)
                expected = run(base, ids, padded, cached)
                assert torch.equal(run(build("closed").to(dtype), ids, padded, cached), expected)


def check_open(build, ids):
    """With random gates and prompts: every element equals the formula in float64, all four ways to call the model."""
    model = build("open").double()
    for padded in (False, True):
        real = left_padded(ids, LENGTHS)[1].bool() if padded else torch.ones_like(ids).bool()
        expected = build.reference(ids, real)
        for cached in (False, True):
            assert (run(model, ids, padded, cached) - expected)[real].abs().max() < 1e-6


def check_two_steps(build, ids):
    """The first step moves the gates alone, the second everything trainable; nothing frozen moves at all."""
    model = build("closed").double().train()  # in float64 no step is too small to be seen
    own = adapter_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step():
        optimizer.zero_grad()
        minillama.answer_loss(model, ids, ids).backward()
        optimizer.step()
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    assert step() == {name for name in own if name.endswith("gate")}
    assert step() == set(own)
    for name in own:
        assert (own[name] != before[name]).all(), f"a part of {name} never moved"


def check_fresh_prefix(build, ids):
    """After a step the next forward uses the new prompts: nothing stale outlives the step or a generation."""
    model = build("open")
    with torch.no_grad():
        model(ids), minillama.generate(model, ids, 2)
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("prompt"):
                parameter += 1.0
        fresh = build("open")
        for mine, theirs in zip(adapter_parameters(fresh).values(), adapter_parameters(model).values()):
            mine.copy_(theirs)
        assert torch.equal(model(ids), fresh(ids))
        assert torch.equal(minillama.generate(model, ids, 4), minillama.generate(fresh, ids, 4))


def check_eval_is_deterministic(build, ids):
    model = build("open").eval()
    assert torch.equal(model(ids), model(ids))


CHECKS = [check_two_steps, check_open, check_fresh_prefix, check_eval_is_deterministic, check_closed]


def builder(kind, **options):
    """build(state): the same random base each time, plain (None), freshly adapted, or with its gates open."""

    def build(state):
        torch.manual_seed(0)
        model = make(kind)
        if state is None:
            return model
        torch.manual_seed(1)
        adapt(model, "llama_adapter", prompt_length=4, **options)
        return open_gates(model) if state == "open" else model

    build.reference = lambda ids, real: reference(kind, tuple(options.items()), tuple(ids.flatten().tolist()), tuple(map(tuple, real.tolist())))
    return build


@functools.cache
def reference(kind, options, ids, real):
    """The formula's logits for what `builder(kind, **options)` opens; the same for every planted mistake."""
    real = torch.tensor(real)
    model = builder(kind, **dict(options))("open").double()
    return reference_logits(model, torch.tensor(ids).view(real.shape), real)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_right(kind, check, ids):
    with torch.set_grad_enabled(check is check_two_steps):
        check(builder(kind), ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(kind, variant, ids):
    check_closed(builder(kind, **variant), ids)
    check_open(builder(kind, **variant), ids)


# ── planted mistakes: wrong versions of the wrapper, each of which some check must catch ────────────────────────────


class Mistaken(AdaptedAttention):
    """A wrapper with one thing wrong; subclasses say what."""

    def term(self, q, k, v):
        return llama_adapter.prefix_attention(q, k, v)

    def opened(self, y):
        return llama_adapter.opening(self.gate, self.tanh).to(y.dtype)

    def attend(self, q, k, v, mask=None, cache=None):
        y = self.base.attend(q, k, v, mask, cache)
        if not self.active:
            return y
        return y + self.opened(y) * self.term(q, *self.prefix(q.dtype))


class ScaledByModelWidth(Mistaken):
    """scores divided by √D instead of √d"""

    def term(self, q, k, v):
        return super().term(q * (self.head_dim / self.width) ** 0.5, k, v)


class Unscaled(Mistaken):
    """scores not divided at all"""

    def term(self, q, k, v):
        return super().term(q * self.head_dim**0.5, k, v)


class RotatedPrefix(Mistaken):
    """RoPE on the prompts' keys"""

    def prefix(self, dtype):
        k, v = super().prefix(dtype)
        rope = self.base.rope
        if rope is None:  # a GPT-2 has none: there the mistake is to shift the keys by a position embedding
            return k + 0.1 * torch.arange(k.shape[1], dtype=dtype)[:, None], v
        return minillama.attention.rotate(k, *rope(torch.arange(k.shape[1]))), v


class OneSoftmax(Mistaken):
    """one softmax over words and prompts, the gate outside"""

    def attend(self, q, k, v, mask=None, cache=None):
        y = self.base.attend(q, k, v, mask, cache)
        pk, pv = self.prefix(q.dtype)
        pk, pv = (z.repeat_interleave(self.num_heads // z.shape[0], 0).expand(len(q), -1, -1, -1) for z in (pk, pv))
        if cache is not None:
            k = cache.k
        k = k.repeat_interleave(self.num_heads // k.shape[1], 1)
        scores = q @ torch.cat((pk, k), 2).transpose(-1, -2) / self.head_dim**0.5
        return y + self.opened(y) * (scores.softmax(-1)[..., : pk.shape[2]] @ pv)


class GateAfterOutput(Mistaken):
    """the gated term added behind the output projection, never projected (seeds of this kind abound)"""

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        term = self.opened(q) * self.term(q, *self.prefix(q.dtype))  # (B, H, T, d)
        term = term.transpose(1, 2).flatten(2)
        return self.output(self.base.attend(q, k, v, mask, cache)) + F.pad(term, (0, self.width))[..., : self.width]


class BiasTwice(Mistaken):
    """the term sent through the output projection by itself, so that its bias is added twice"""

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        return self.output(self.base.attend(q, k, v, mask, cache)) + self.output(self.opened(q) * self.term(q, *self.prefix(q.dtype)))


class HeadsInTheWrongOrder(Mistaken):
    """grouped key heads repeated as a b a b a b instead of a a a b b b"""

    def term(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        return super().term(q, k.repeat(repeat, 1, 1), v.repeat(repeat, 1, 1))


class StalePrefix(Mistaken):
    """prompts' keys and values kept in the module from one step to the next"""

    def prefix(self, dtype):
        if not hasattr(self, "kept"):
            self.kept = [z.detach() for z in super().prefix(dtype)]
        return [z.to(dtype) for z in self.kept]


class NoTanh(Mistaken):
    """the gate not squashed"""

    def opened(self, y):
        return self.gate.to(y.dtype)


class Sigmoid(Mistaken):
    """a sigmoid for the gate: half open at zero"""

    def opened(self, y):
        return torch.sigmoid(self.gate).to(y.dtype)


class GateOnScores(Mistaken):
    """the gate multiplies the scores before the softmax"""

    def term(self, q, k, v):
        return super().term(q * llama_adapter.opening(self.gate, self.tanh).to(q.dtype), k, v)

    def opened(self, y):
        return 1.0


class OneMinusGate(Mistaken):
    """(1 - g) · words + g · prompts: the words fade as the gate opens"""

    def attend(self, q, k, v, mask=None, cache=None):
        g, y = self.opened(q), self.base.attend(q, k, v, mask, cache)
        return (1 - g) * y + g * self.term(q, *self.prefix(q.dtype))


class CausalPrefix(Mistaken):
    """a causal mask between words and prompts"""

    def term(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        k, v = (z.repeat_interleave(repeat, 0).expand(len(q), -1, -1, -1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class DropoutInEval(Mistaken):
    """dropout of 0.1 on the prompts' weights, in eval mode too"""

    def term(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        k, v = (z.repeat_interleave(repeat, 0).expand(len(q), -1, -1, -1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class KeysForValues(Mistaken):
    """the prompts' keys used as values too"""

    def prefix(self, dtype):
        k, _ = super().prefix(dtype)
        return k, k


class UnrotatedQueries(Mistaken):
    """queries of the prefix term without RoPE, while the published ones have it"""

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        plain = self.project(x, None)[0]
        if self.base.rope is None:
            plain = plain + 1.0  # a GPT-2's queries have no RoPE to forget: here the mistake is another query
        return self.output(self.base.attend(q, k, v, mask, cache) + self.opened(q) * self.term(plain, *self.prefix(q.dtype)))


class DetachedPrompt(Mistaken):
    """the prompt detached from the graph: only the gate ever learns"""

    def prefix(self, dtype):
        return self.base.keys_values(self.prompt.detach().to(dtype))


class TrainedProjections(Mistaken):
    """the base's projections left trainable"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.base.k_proj.requires_grad_(True)


class ZeroPrompt(Mistaken):
    """prompts that start at zero as well: at a zero gate neither ever gets a gradient"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.prompt)

    def prefix(self, dtype):
        return [z * 0 if (self.prompt == 0).all() else z for z in super().prefix(dtype)]


class OpenGate(Mistaken):
    """a gate that starts at one"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.ones_(self.gate)


MISTAKES = Mistaken.__subclasses__()


def fails(check, build, ids):
    try:
        with torch.set_grad_enabled(check is check_two_steps):
            check(build, ids)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_are_caught(kind, mistake, ids, monkeypatch):
    if mistake is HeadsInTheWrongOrder and kind != "grouped":
        pytest.skip("nothing is repeated where every query head has its own key head")
    if mistake is BiasTwice and kind == "llama":
        pytest.skip("the same thing where the output projection has no bias")
    monkeypatch.setattr(llama_adapter, "AdaptedAttention", mistake)
    assert any(fails(check, builder(kind), ids) for check in CHECKS), mistake.__doc__


def test_the_harness_passes_what_is_right(ids, monkeypatch):
    """The class that the mistakes derive from is right, so a mistake is caught for what it changes."""
    monkeypatch.setattr(llama_adapter, "AdaptedAttention", Mistaken)
    for kind in KINDS:
        assert not any(fails(check, builder(kind), ids) for check in CHECKS)


# ── the rest of the module's promises ───────────────────────────────────────────────────────────────────────────────


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


@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit_and_ends(model, ids):
    base = model(ids)
    opened = open_gates(adapt(model, "llama_adapter"))(ids)
    assert not torch.equal(opened, base)
    with disabled(model):
        assert torch.equal(model(ids), base)
        with disabled(model):
            pass
        assert torch.equal(model(ids), base)
    assert torch.equal(model(ids), opened)
    with pytest.raises(RuntimeError), disabled(model):
        raise RuntimeError
    assert torch.equal(model(ids), opened)
    detach(model)
    assert not wrappers(model) and torch.equal(model(ids), base)


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


def test_several_adapted_wrappers_nest(model, ids):
    """A wrapper wraps a wrapper: both terms are added, the base's verbs still run once."""
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn = AdaptedAttention(AdaptedAttention(layer.self_attn, 3), 2)
        base = model(ids)
        open_gates(model)
        assert not torch.equal(model(ids), base)
        with disabled(model):
            assert torch.equal(model(ids), base)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(layers=0), "layers is 0.*1 to 3"),
        (dict(layers=4), "layers is 4"),
        (dict(prompt_length=0), "prompt_length is 0"),
        (dict(gate="row"), "gate is 'row'"),
        (dict(rank=4), "no option 'rank'"),
    ],
)
def test_bad_options_leave_the_model_alone(model, options, named):
    with pytest.raises(ValueError, match=named):
        adapt(model, "llama_adapter", **options)
    assert not wrappers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_method_twice_and_merge(model):
    with pytest.raises(ValueError, match="llama_adapter"):
        adapt(model, "lama_adapter")
    with pytest.raises(ValueError, match="no adapter"):
        minillama.merge(model)
    adapt(model, "llama_adapter")
    with pytest.raises(ValueError, match="carries an adapter"):
        adapt(model, "llama_adapter")
    with pytest.raises(ValueError, match="cannot be merged"):
        minillama.merge(model)
    with pytest.raises(ValueError, match="save_adapter"):
        minillama.save(model, "never-written")


def test_llama_7b_counts_as_in_the_paper():
    """1.2M parameters (Zhang et al., section 4.1): 30 layers, 10 prompts of width 4096, 32 gates a layer."""
    with torch.device("meta"):
        model = adapt(minillama.LLaMA(minillama.LLaMAConfig()), "llama_adapter", prompt_length=10, layers=30)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 1_228_800 + 960


# ── the layer that needs no base model ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_standalone_layer(variant):
    torch.manual_seed(0)
    layer, x = GatedPrefixAttention(24, 4, prompt_length=3, **variant).double(), torch.randn(2, 5, 24).double()
    q, k, v = layer.c_attn(x).chunk(3, -1)
    _, pk, pv = layer.c_attn(layer.prompt).chunk(3, -1)
    heads = lambda z: z.unflatten(-1, (4, 6)).transpose(-3, -2)
    causal = torch.ones(5, 5).tril().bool()

    def formula(allowed):
        words = (heads(q) @ heads(k).mT / 6**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ heads(v)
        prompts = (heads(q) @ heads(pk).mT / 6**0.5).softmax(-1) @ heads(pv)
        gate = layer.gate.tanh() if variant["tanh"] else layer.gate
        return layer.c_proj((words + gate * prompts).transpose(1, 2).flatten(2))

    plain = layer.c_proj(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True).transpose(1, 2).flatten(2))
    assert torch.equal(layer(x), plain)  # closed
    torch.testing.assert_close(layer(x), formula(causal))
    nn.init.normal_(layer.gate)
    torch.testing.assert_close(layer(x), formula(causal))  # open
    torch.testing.assert_close(layer(x, torch.ones(5, 5).bool()), formula(torch.ones(5, 5).bool()))
    with pytest.raises(ValueError, match="num_heads is 5"):
        GatedPrefixAttention(24, 5)


def test_module_reads_alone(tmp_path):
    """Copied into another project, the file works on torch alone."""
    import pathlib
    import subprocess
    import sys

    (tmp_path / "adapter.py").write_text(pathlib.Path(llama_adapter.__file__).read_text())
    code = "import sys, torch, adapter; adapter.GatedPrefixAttention(8, 2)(torch.randn(1, 3, 8)); assert 'minillama' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
