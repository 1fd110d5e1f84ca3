"""The adapter protocol: any number of adapters and methods on one base, saved, loaded, switched, stacked, merged,
converted, copied, compiled, deleted, in any order; whole or not at all."""

import copy
import itertools
import pickle
import random

import peft
import pytest
import torch
import transformers
from methods import CASES, adapted, builder, show
from small import KINDS, SHAPE, make, open_gates, rotated
from torch import nn

import minillama
from minillama import adapt, delete_adapter, disabled, load_adapter, merge, mixed, save_adapter, set_adapter, unmerge
from minillama.adapters import METHODS, adapter_parameters, adapter_tensors, base_tensors, gates, wrappers
from minillama.adapters.llama_adapter import PRESETS

MERGEABLE = [case for case in CASES if builder("llama", case).mergeable]


def opened(model, case, name, seed):
    adapted(model, case, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model, name).items()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def orders():
    """Every method beside every other at least once, in groups of three: a pairwise selection, shuffled by a seed."""
    pairs = {frozenset(pair) for pair in itertools.combinations(METHODS, 2)}
    draw = random.Random(0)
    while pairs:
        tried = [draw.sample(list(METHODS), 3) for _ in range(40)]
        best = max(tried, key=lambda three: len(pairs & {frozenset(pair) for pair in itertools.combinations(three, 2)}))
        pairs -= {frozenset(pair) for pair in itertools.combinations(best, 2)}
        yield tuple(best)


def case_of(method):
    return next(name for name, (arguments, _) in CASES.items() if arguments["method"] == method)


@torch.no_grad()
@pytest.mark.parametrize("kind, three", rotated(KINDS, orders()), ids=str)
def test_three_adapters_are_saved_loaded_switched_and_deleted_in_any_order(kind, three, ids, tmp_path):
    torch.manual_seed(0)
    model = make(kind)
    base = model(ids)
    for seed, method in enumerate(three):
        opened(model, case_of(method), method, seed)
    alone = {}
    for method in three:
        alone[method] = set_adapter(model, method)(ids)
        save_adapter(model, tmp_path / method, method)
    together = set_adapter(model, *three)(ids)
    torch.manual_seed(0)
    fresh = make(kind)
    fused = kind == "gpt2" and {"lora", "dora"} & set(three)  # paths come back from the file at a greater rank
    same = (lambda a, b: (a - b).abs().max() < 1e-5 * b.abs().max()) if fused else torch.equal
    for method in reversed(three):
        show(load_adapter(fresh, tmp_path / method, method))
    for method in three:
        assert same(set_adapter(fresh, method)(ids), alone[method])
    delete_adapter(fresh, three[1])
    for method in (three[0], three[2]):
        assert same(set_adapter(fresh, method)(ids), alone[method])
    show(load_adapter(fresh, tmp_path / three[1], three[1]))
    assert same(set_adapter(fresh, three[1])(ids), alone[three[1]])
    with disabled(fresh):
        assert torch.equal(fresh(ids), base)
    assert not torch.equal(together, base)
    assert torch.equal(delete_adapter(fresh)(ids), base) and not wrappers(fresh)


@torch.no_grad()
@pytest.mark.parametrize(
    "model, methods",
    rotated(KINDS, [
        ("ia3", "llama_adapter_v2"), ("lora", "ia3"), ("llama_adapter_v2", "lora"), ("lora", "dora"),
        ("llama_adapter", "prefix_tuning"),
        ("bottleneck", "ia3", "lora", "dora", "llama_adapter_v2", "llama_adapter"),
    ]),
    indirect=["model"],
)  # fmt: skip
def test_methods_of_one_adapter_never_share_a_key(model, methods, ids, tmp_path):
    for method in methods:
        adapt(model, method)
    numbers = sum(parameter.numel() for parameter in minillama.trainable_parameters(model).values())
    assert sum(parameter.numel() for parameter in adapter_parameters(model).values()) == numbers
    expected = open_gates(model)(ids)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(delete_adapter(model), tmp_path)(ids), expected)


@torch.no_grad()
def test_a_reparameterized_prefix_beside_a_parallel_bottleneck(model, ids, tmp_path):
    """He et al.'s MAM adapter: the bottleneck finds the model's feed-forward parts, not the prefix's own network."""
    adapt(model, "prefix_tuning", prefix_length=3, reparameterize=8)
    adapt(model, "bottleneck", size=4, place="parallel")
    places = [place for place, wrapper in wrappers(model) if wrapper.method == "bottleneck"]
    assert places == [f"layers.{i}.mlp" for i in range(3)]
    adapt(model, "lora", targets="all-linear")
    for kind in (METHODS["bottleneck"].Adapted, METHODS["lora"].LoRALinear):  # none stands within another's own network
        there = [module for module in model.modules() if isinstance(module, kind)]
        assert len(there) == len([wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, kind)])
    expected = open_gates(model)(ids)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(delete_adapter(model), tmp_path)(ids), expected)


def test_all_linear_is_every_projection_but_the_head(model):
    adapt(model, "lora", targets="all-linear")
    linear = {name for name, module in make("gpt2").named_modules() if isinstance(module, nn.Linear)}
    assert {place for place, _ in wrappers(model)} >= linear - {"lm_head"}
    assert not any(place == "lm_head" for place, _ in wrappers(model))
    assert len(wrappers(adapt(delete_adapter(model), "lora", targets="q_proj"))) == 3  # a name alone is one name


# ── merged ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("kind, case", rotated(KINDS, MERGEABLE))
def test_a_merged_model_knows_that_it_is_one(kind, case, ids, tmp_path):
    build = builder(kind, case)
    base, model = build(None)(ids), build("open")
    adapted, random_numbers = model(ids), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    merge(model)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    merged = model(ids)
    assert (merged - adapted).abs().max() < 2e-5 * adapted.abs().max()
    with disabled(model):
        assert torch.equal(model(ids), base)
    assert torch.equal(model(ids), merged)
    for refused in (
        lambda: merge(model),
        lambda: set_adapter(model),
        lambda: delete_adapter(model),
        lambda: adapt(model, "ia3", name="more"),
        lambda: mixed(model, [None] * 3).__enter__(),
    ):
        with pytest.raises(ValueError, match="unmerge"):
            refused()
    save_adapter(model, tmp_path)
    assert torch.equal(model(ids), merged)
    again = load_adapter(build(None), tmp_path)
    assert (again(ids) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    unmerge(model)
    assert torch.equal(model(ids), adapted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


@torch.no_grad()
@pytest.mark.parametrize("case", MERGEABLE)
def test_a_merged_model_is_converted_copied_and_pickled(case, ids):
    model = merge(builder("grouped", case)("open"))
    merged = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), merged)
    wide = unmerge(model.double())(ids)
    assert wide.dtype == torch.float64 and (wide - merged).abs().max() < 1e-4 * merged.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, case", rotated((*KINDS, "mistral", "tied"), [*MERGEABLE[:4], "lora head", *MERGEABLE[4:], "v2 and ia3"])
)
def test_a_merged_model_is_saved_whole_or_refused(kind, case, ids, tmp_path):
    """What `save` writes of a merged model, we and transformers open with the same logits;
    else it says why it cannot."""
    torch.manual_seed(0)
    changes = {"mistral": dict(sliding_window=64), "tied": dict(tie_word_embeddings=True)}.get(kind, {})
    model = make(kind) if not changes else minillama.LLaMA(minillama.LLaMAConfig(**SHAPE, **changes)).eval()
    base = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    if case == "lora head":
        adapt(model, "lora", targets=("lm_head",))
    elif case == "v2 and ia3":
        adapt(adapt(model, "llama_adapter_v2"), "ia3")
    else:
        adapt(model, **CASES[case][0])
    expected = merge(open_gates(model))(ids)
    refused = (
        (kind, case) == ("gpt2", "lora head") or (kind == "mistral" and case.startswith("v2")) or case == "v2, head"
    )
    if refused:
        with pytest.raises(ValueError, match="unmerge, and save_adapter"):
            minillama.save(model, tmp_path / "never")
        assert not (tmp_path / "never").exists()
        return
    minillama.save(model, tmp_path)
    tolerance = 1e-5 * expected.abs().max()
    assert (minillama.load(tmp_path)[0](ids) - expected).abs().max() <= tolerance
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (theirs(ids).logits - expected).abs().max() <= tolerance + 1e-5
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_tensors(unmerge(model)).items())


# ── whole or not at all ─────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_a_refused_adapter_changes_nothing(model, ids, tmp_path):
    """A join that no other can wrap stands in the top layer alone: the layers below it are already wrapped by then."""
    adapt(model, "llama_adapter", name="a", layers=1, **PRESETS["peft"])
    before, names = model(ids), [name for name, _ in model.named_modules()]
    for method in ("llama_adapter", "prefix_tuning"):
        with pytest.raises(ValueError, match="attach that one last"):
            adapt(model, method, name="b")
    torch.manual_seed(0)
    plain = make("llama") if isinstance(model, minillama.LLaMA) else make("gpt2")
    save_adapter(adapt(plain, "llama_adapter"), tmp_path)
    with pytest.raises(minillama.FileError, match="attach that one last"):
        load_adapter(model, tmp_path, "b", check_base=False)
    assert [name for name, _ in model.named_modules()] == names and list(model.adapters) == ["a"]
    assert torch.equal(set_adapter(model, "a")(ids), before)
    assert {parameter.shape for parameter in minillama.trainable_parameters(model).values()} == {(10, 48), (1,)}
    with pytest.raises(ValueError, match="no adapter 'nope'.*'a'"):
        delete_adapter(model, "nope")
    with pytest.raises(ValueError, match="rank is 8.0"):
        adapt(model, "lora", name="b", rank=8.0)


# ── autocast, compile, other places ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("kind, case", rotated(KINDS, [case for case in CASES if builder("llama", case).identity]))
def test_closed_under_autocast(kind, case, ids):
    """float32 weights, bfloat16 arithmetic: the base's logits bit for bit, with cache and without."""
    build = builder(kind, case)
    with torch.autocast("cpu", torch.bfloat16):
        expected = build(None)(ids)
        model = build("closed")
        assert torch.equal(model(ids), expected)
        cache, plain = minillama.Cache(), minillama.Cache()
        base = build(None)
        for part in ids.split([5, 1, 3], dim=1):
            assert torch.equal(model(part, cache=cache), base(part, cache=plain))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_saves_what_the_plain_one_saves(model, ids, tmp_path):
    open_gates(adapt(model, "llama_adapter"))
    expected, names = model(ids), list(adapter_parameters(model))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids), expected)
    assert list(adapter_parameters(compiled)) == names
    save_adapter(compiled, tmp_path / "adapter")
    delete_adapter(model)
    minillama.save(torch.compile(model, backend="eager"), tmp_path / "base")
    again, _ = minillama.load(tmp_path / "base")
    assert torch.equal(load_adapter(again, tmp_path / "adapter")(ids), expected)


def test_tracing_goes_through(model, ids):
    """torch.onnx's exporter traces: shapes are tensors there, and is_causal must be a bool."""
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        torch.testing.assert_close(traced(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "method, options",
    [("lora", dict(targets=("lm_head", "q_proj"))), ("ia3", dict(outputs=("lm_head",), inputs=("down_proj",)))],
)
@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_an_adapter_on_the_head_goes_to_peft(kind, method, options, ids, tmp_path):
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=3, n_head=6, n_positions=64)
        theirs = transformers.GPT2LMHeadModel(config).eval()
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path / "base")
    ours, _ = minillama.load(tmp_path / "base")
    expected = open_gates(adapt(ours, method, **options))(ids)
    save_adapter(ours, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (adapted(ids).logits - expected).abs().max() < 1e-4
    assert (load_adapter(delete_adapter(ours), tmp_path / "adapter")(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", ("lora", "ia3", "llama_adapter_v2", "dora", "bottleneck"))
def test_a_wrapper_answers_like_the_layer_it_stands_for(model, method, ids):
    adapt(model, method)
    for _, wrapper in wrappers(model):
        inner = wrapper
        while hasattr(inner, "base"):
            inner = inner.base
        assert wrapper.weight.shape == inner.weight.shape and wrapper.weight.dtype == inner.weight.dtype
        if isinstance(inner, nn.Linear):
            assert (wrapper.in_features, wrapper.out_features) == (inner.in_features, inner.out_features)
            assert wrapper.bias is None or wrapper.bias.shape == (inner.out_features,)
        assert torch.equal(wrapper.weight, inner.weight)  # at the start


class SharedLinear(nn.Module):
    """VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454) in short: random matrices that all layers share,
    frozen, and two trained vectors each."""

    own, mergeable = ("A", "B", "d", "b"), True

    def __init__(self, base, A, B):
        super().__init__()
        self.base, self.active = base, True
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("A", A), self.register_buffer("B", B)
        self.d, self.b = nn.Parameter(torch.full((len(A),), 0.1)), nn.Parameter(torch.zeros(len(B)))

    def forward(self, x):
        y = self.base(x)
        return y + self.b * ((x @ self.A.T * self.d) @ self.B.T) if self.active else y

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def attach_shared(model, rank=4):
    A, B = torch.randn(rank, 48), torch.randn(48, rank)
    for layer in model.layers:
        layer.self_attn.q_proj = SharedLinear(layer.self_attn.q_proj, A, B)


def test_a_method_with_shared_buffers_needs_no_special_case(ids, tmp_path, monkeypatch):
    """Buffers are saved, once, and never train; a new method is a module with `attach` and a row in METHODS."""
    module = type(METHODS["ia3"])("vera")
    module.attach, module.LEARNING_RATES = attach_shared, (1e-2, 1e-2)
    monkeypatch.setitem(METHODS, "vera", module)
    torch.manual_seed(0)
    model = make("llama")
    adapt(model, "vera", rank=3)
    assert set(minillama.trainable_parameters(model).values()) == set(adapter_parameters(model).values())
    assert len(adapter_parameters(model)) == 6 and len(adapter_tensors(model)) == 8
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_()
    adapt(model, "lora", name="other")
    expected = set_adapter(model, "default")(ids)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    assert torch.equal(load_adapter(make("llama"), tmp_path)(ids), expected)


@pytest.mark.parametrize("gate, tanh", [("head", True), ("head", False), ("feature", False), ("layer", True)])
def test_gates_are_what_the_term_is_multiplied_by(model, gate, tanh):
    """One number per head: its gate under the tanh, or the mean of its features' gates."""
    adapt(model, "llama_adapter", gate=gate, tanh=tanh)
    open_gates(model)
    for index, shown in gates(model)["gates"].items():
        numbers = model.layers[int(index)].self_attn.gate
        numbers = numbers.tanh() if tanh else numbers
        expected = numbers.squeeze() if gate == "head" else numbers.flatten(1).mean(1) if gate == "feature" else numbers
        assert shown == pytest.approx(expected.tolist()) and len(shown) == (1 if gate == "layer" else 6)


def test_gates_of_several_adapters_are_told_apart(model):
    adapt(adapt(model, "llama_adapter", name="one"), "llama_adapter", name="two", layers=1)
    assert list(gates(model)["gates"]) == ["2"]
    assert list(gates(set_adapter(model, "one", "two"))["gates"]) == ["0 one", "1 one", "2 two", "2 one"]
    assert gates(set_adapter(model)) == {}
