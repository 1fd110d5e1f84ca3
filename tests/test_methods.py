"""Every method closed, open, over two steps, merged, switched, nested and stacked; and every planted mistake caught."""

import ast
import pathlib

import pytest
import torch
from methods import CASES, adapted, builder, check_closed, check_open, check_two_steps, checks, fails
from mistakes import CASE_OF, HARMLESS, PLANTED, case_of, plant
from small import KINDS, RELATIVES, open_gates, rotated

import minillama
from minillama import adapt, disabled, merge, set_adapter, unmerge
from minillama.adapters import (
    METHODS,
    adapter_parameters,
    delete_adapter,
    trainable_parameters,
    wrappers,
)
from minillama.adapters.merging import Merged
from minillama.course.exercises import Mistake


def titled(value):
    """A test's title: the case, and the check or the mistake."""
    if isinstance(value, Mistake):
        return f"{case_of(value)}-{value.name}"
    return f"{value[0]}-{value[-1].__name__}" if isinstance(value, tuple) else value


RIGHT = [(case, check) for case in CASES for check in checks(case)]


@pytest.mark.parametrize("kind, right", rotated(KINDS, RIGHT), ids=titled)
def test_right(kind, right, ids):
    case, check = right
    check(builder(kind, case), ids)


@pytest.mark.parametrize("kind, case", rotated(list(RELATIVES), list(CASES)))
def test_open_on_a_relative_of_llama(kind, case, ids):
    check_open(builder(kind, case), ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("case", CASES)
def test_closed_and_over_two_steps_on_a_relative_of_llama(kind, case, ids):
    """Closed in float32, whole, is asked of every pair by test_models_table.py; here of a third in all ways."""
    check_two_steps(builder(kind, case), ids)
    if (list(RELATIVES).index(kind) + list(CASES).index(case)) % 3 == 0:
        check_closed(builder(kind, case), ids)


def is_caught(kind, mistake, ids, monkeypatch):
    case = case_of(mistake)
    # by the right implementation, before it is replaced
    builder(kind, case).reference(ids, torch.ones_like(ids).bool())
    builder(kind, case).reference(ids, torch.stack([torch.arange(9) >= 9 - n for n in (9, 4, 6)]))
    plant(monkeypatch, mistake)
    return any(fails(check, builder(kind, case), ids) for check in checks(case))


@pytest.mark.parametrize("kind, mistake", rotated(KINDS, PLANTED), ids=titled)
def test_mistakes_are_caught(kind, mistake, ids, monkeypatch):
    if kind in HARMLESS.get(mistake.name, ()):
        pytest.skip(f"harmless on {kind}: {mistake.sentence}")
    assert is_caught(kind, mistake, ids, monkeypatch), mistake.sentence


def test_the_catalogue_is_large_and_each_mistake_has_a_sentence():
    assert len(PLANTED) >= 40 and len({(mistake.edited, mistake.sentence) for mistake in PLANTED}) == len(PLANTED)
    assert HARMLESS.keys() <= {mistake.name for mistake in PLANTED}
    assert all(len(mistake.sentence) > 10 and mistake.diff() for mistake in PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("module", CASE_OF)
def test_a_module_planted_unedited_is_caught_in_nothing(module, ids, monkeypatch):
    """What the planted mistakes are edits of is right, and planting breaks nothing by itself."""
    for kind in KINDS:
        assert not is_caught(kind, Mistake("none", "", METHODS[module]), ids, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("model, case", rotated(KINDS, CASES), indirect=["model"])
def test_disabled_is_the_base_bit_for_bit_and_ends(model, case, ids):
    base = model(ids)
    opened = open_gates(adapted(model, case))(ids)
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
    delete_adapter(model)
    assert not wrappers(model) and torch.equal(model(ids), base)


@torch.no_grad()
@pytest.mark.parametrize("method", ("prefix_tuning", "prompt_tuning"))
def test_methods_without_an_identity_start_say_so_and_are_far_from_it(model, method, ids):
    base = model(ids)
    distance = (adapt(model, method)(ids) - base).abs().max() / base.abs().max()
    assert distance > 0.1 and "not the identity at the start" in METHODS[method].__doc__


@torch.no_grad()
def test_zeros_are_no_identity_for_a_prefix(model, ids):
    """Keys and values of 0 still take their share of the softmax: why LLaMA-Adapter needs a gate."""
    base = model(ids)
    adapt(model, "prefix_tuning")
    for parameter in adapter_parameters(model).values():
        parameter.zero_()
    assert (model(ids) - base).abs().max() > 0.1 * base.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("init", ("houlsby", "adapters"))
def test_published_bottleneck_starts_are_only_near_the_identity(model, init, ids):
    base = model(ids)
    distance = (adapt(model, "bottleneck", size=8, init=init)(ids) - base).abs().max()
    assert 0 < distance < 0.3 * base.abs().max()


def test_prompt_begins_with_the_embeddings_of_a_text(model):
    rows = model.embed_tokens.weight[[7, 8, 9, 7, 8]].clone()
    for given in ([7, 8, 9], (7, 8, 9), torch.tensor([7, 8, 9])):
        adapt(model, "prompt_tuning", prompt_length=5, init_ids=given)
        assert torch.equal(adapter_parameters(model)["embed_tokens.prompt_tuning.prompt"], rows)
        delete_adapter(model)


def test_two_prompts_stand_one_behind_the_other(model, ids):
    """Two active prompt adapters are one prompt: words of the vocabulary before the text."""
    longer = torch.cat((torch.tensor([[5, 6, 7, 8]]).expand(3, -1), ids), 1)
    with torch.no_grad():
        expected = model(longer)[:, 4:]
        adapt(model, "prompt_tuning", name="a", prompt_length=2, init_ids=[5, 6])
        adapt(model, "prompt_tuning", name="b", prompt_length=2, init_ids=[7, 8])
        torch.testing.assert_close(set_adapter(model, "a", "b")(ids), expected)


def test_dropout_acts_in_training_alone(model, ids):
    """LoRA's and DoRA's dropout thins the path's input, not the base's; generation is in eval mode by itself."""
    for method in ("lora", "dora"):
        open_gates(adapt(model, method, dropout=0.5))
        with torch.no_grad():
            still = model.eval()(ids)
            assert torch.equal(model(ids), still)
            model.train()
            one, two = model(ids), model(ids)
            assert not torch.equal(one, two)
            written = minillama.generate(model, ids, 3)
            assert model.training and torch.equal(written, minillama.generate(model.eval(), ids, 3))
            for _, wrapper in wrappers(model.train()):
                wrapper.B.zero_()
            if method == "lora":
                with disabled(model):
                    base = model(ids)
                assert torch.equal(model(ids), base)
        delete_adapter(model)


@torch.no_grad()
@pytest.mark.parametrize("inactive", ("ia3", "lora", "dora", "llama_adapter_v2"))
def test_merging_leaves_inactive_adapters_out(model, ids, inactive):
    """The inactive one stands inside, around the same projections."""
    adapt(model, inactive, name="two")
    adapt(model, "lora", name="one", targets=("q_proj", "k_proj", "v_proj", "down_proj"))
    for name in ("one", "two"):
        for parameter in adapter_parameters(model, name).values():
            parameter.normal_(std=0.3)
    expected = set_adapter(model.double(), "one")(ids)
    assert (merge(model)(ids) - expected).abs().max() < 1e-9 * expected.abs().max()
    assert torch.equal(unmerge(model)(ids), expected)
    set_adapter(model)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


def test_what_is_drawn_at_the_start_has_its_published_spread():
    """LoRA's A as nn.Linear draws: uniform up to 1/√in; Houlsby's matrices normal(0, 1e-2) cut at two deviations;
    AdapterHub's normal(0, 0.02)."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 200)
    for wrapper in (METHODS["lora"].LoRALinear(linear, 64), METHODS["dora"].DoRALinear(linear, 64)):
        assert 0.99 * 300**-0.5 < wrapper.A.abs().max() <= 300**-0.5
        assert wrapper.A.std().item() == pytest.approx((3 * 300) ** -0.5, rel=0.03)
    bottlenecks = METHODS["bottleneck"].Bottleneck
    for init, std, largest in (("houlsby", 0.0088, 0.02), ("adapters", 0.02, 0.1)):
        network = bottlenecks(300, 64, init=init)
        for matrix in (network.down.weight, network.up.weight):
            assert matrix.std().item() == pytest.approx(std, rel=0.03) and matrix.abs().max() <= largest


def test_reparameterized_prefix_learns(model, ids):
    adapt(model, "prefix_tuning", prefix_length=3, reparameterize=8)
    names = {name.partition("prefix_tuning.")[2] for name in adapter_parameters(model)}
    assert names >= {"embedding", "mlp.0.weight", "mlp.2.bias"}
    minillama.answer_loss(model, ids, ids).backward()
    assert all((parameter.grad != 0).any() for parameter in trainable_parameters(model).values())


@torch.no_grad()
def test_several_adapters_on_one_base_are_switched_without_copies(model, ids):
    base, alone = model(ids), {}
    cases = {"fr": "lora", "de": "llama_adapter", "fi": "ia3", "hu": "lora", "es": "houlsby"}
    for seed, (name, case) in enumerate(cases.items()):
        adapt(model, **CASES[case][0], name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        alone[name] = model(ids)
        assert set(trainable_parameters(model).values()) == set(adapter_parameters(model, name).values())
    where = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for name, expected in alone.items():
        assert torch.equal(set_adapter(model, name)(ids), expected)
    assert torch.equal(set_adapter(model)(ids), base)
    both = set_adapter(model, "fr", "fi")(ids)
    assert not any(torch.equal(both, logits) for logits in alone.values())
    assert where == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    delete_adapter(model, "de")
    assert torch.equal(set_adapter(model, "hu")(ids), alone["hu"]) and "de" not in model.adapters
    with pytest.raises(ValueError, match="no adapter 'de'.*'fr'"):
        set_adapter(model, "de")
    assert torch.equal(delete_adapter(model)(ids), base)


@torch.no_grad()
def test_one_adapter_of_several_methods(model, ids):
    """Methods stack in one adapter; where both can be merged, the merged model equals it and comes back bit for bit."""
    base = model(ids)
    for method in ("ia3", "lora"):
        adapt(model, method)
    assert torch.equal(model(ids), base)
    adapted = open_gates(model)(ids)
    merge(model)
    merged = [wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, Merged)]
    assert all(isinstance(wrapper.folded, torch.nn.Linear) for wrapper in merged)
    assert (model(ids) - adapted).abs().max() < 2e-5 * adapted.abs().max()
    with disabled(model):
        assert torch.equal(model(ids), base)
    with pytest.raises(ValueError, match="unmerge"):
        adapt(model, "ia3")
    assert torch.equal(unmerge(model)(ids), adapted)
    adapt(model, "bottleneck"), adapt(model, "llama_adapter")
    assert torch.equal(model(ids), adapted) and len(model.adapters["default"]) == 4
    with pytest.raises(ValueError, match="cannot|no fixed weight"):
        merge(model)
    with pytest.raises(ValueError, match="has ia3 already"):
        adapt(model, "ia3")
    assert torch.equal(delete_adapter(model)(ids), base)


@torch.no_grad()
def test_merged_model_is_saved_as_a_plain_one(model, ids, tmp_path):
    open_gates(adapt(model, "lora"))
    with pytest.raises(ValueError, match="save_adapter"):
        minillama.save(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    merge(model)
    minillama.save(model, tmp_path)
    assert torch.equal(minillama.load(tmp_path)[0](ids), model(ids))


@pytest.mark.parametrize(
    "method, options, named",
    [
        ("llama_adapter", dict(layers=0), "layers is 0.*1 to 3"),
        ("llama_adapter", dict(layers=4), "layers is 4"),
        ("llama_adapter", dict(prompt_length=0), "prompt_length is 0"),
        ("llama_adapter", dict(gate="row"), "gate is 'row'"),
        ("llama_adapter", dict(rank=4), "no option 'rank'"),
        ("ia3", dict(outputs=("keys",)), "'keys'"),
        ("ia3", dict(outputs=("k_proj",), inputs=("k_proj",)), "one side"),
        ("lora", dict(rank=0), "rank is 0"),
        ("lora", dict(targets=("c_attn",)), "'c_attn'"),
        ("bottleneck", dict(size=0), "size is 0"),
        ("bottleneck", dict(place="everywhere"), "place is 'everywhere'"),
        ("bottleneck", dict(activation="sin"), "activation is 'sin'"),
        ("prefix_tuning", dict(prefix_length=0), "prefix_length is 0"),
        ("prompt_tuning", dict(prompt_length=0), "prompt_length is 0"),
        ("prompt_tuning", dict(init="text"), "init is 'text'"),
        ("prompt_tuning", dict(init_ids=[101]), "below 101"),
        ("prompt_tuning", dict(init_ids=[]), "below 101"),
        ("lora", dict(rank=8.0), "rank is 8.0"),
        ("lora", dict(targets="c_attn"), "'c_attn'"),
        ("llama_adapter_v2", dict(order="both"), "order is 'both'"),
        ("lama_adapter", {}, "method is 'lama_adapter'; it can be llama_adapter"),
    ],
)
def test_bad_options_leave_the_model_alone(model, method, options, named):
    with pytest.raises(ValueError, match=named):
        adapt(model, method, **options)
    assert not wrappers(model) and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no adapter"):
        merge(model)


@pytest.mark.slow
def test_counts_are_the_papers():
    """Computed from the real shapes, on the meta device."""
    from minillama.course.papers import counts

    computed = {(method, options, model): trained for method, options, model, trained, _ in counts()}
    m, D = 64, 1024
    assert computed == {
        ("llama_adapter", "prompt_length=10, layers=30", "llama_7b"): 1_228_800 + 960,
        ("llama_adapter", "prompt_length=10, layers=30, gate=layer", "llama_7b"): 1_228_800 + 30,
        ("ia3", "", "t0_3b"): 540_672,
        ("ia3", "", "smollm2"): 57_600,
        ("bottleneck", "size=64", "bert_large"): 24 * 2 * (2 * m * D + D + m),
        ("lora", "rank=1", "gpt3"): 4_718_592,
        ("lora", "rank=8", "gpt3"): 37_748_736,
    }
    assert round((1_228_800 + 960) * 4 / 2**20, 2) == 4.69  # MiB in float32, and BERT-large has 335,141,888 parameters:
    assert round(24 * 2 * (2 * m * D + D + m) / 335_141_888, 3) == 0.019


# ── a module copied alone into another project ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", METHODS)
def test_module_imports_torch_alone(name):
    tree = ast.parse(pathlib.Path(METHODS[name].__file__).read_text())
    imported = {
        (node.module or ".") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert {module.partition(".")[0] for module in imported} <= {"torch", "math", "copy"} | (
        {"llama_adapter"} if name == "image_prompt" else set()
    )
    assert len(pathlib.Path(METHODS[name].__file__).read_text().splitlines()) <= 230
