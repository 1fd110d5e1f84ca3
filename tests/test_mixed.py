"""Rows of one batch through adapters of their own: each as if it ran alone, the base passed once."""

import importlib

import pytest
import torch
from methods import CASES, LENGTHS, adapted, run, show
from small import KINDS, make

import minillama
from minillama import adapt, data, delete_adapter, disabled, load_adapter, merge, mixed, save_adapter, set_adapter
from minillama.adapters import adapter_parameters, trainable_parameters, wrappers
from minillama.train import answer_loss, answers, train

NAMES = ["one", None, "two"]
MIXED = importlib.import_module("minillama.adapters.mixed")  # whose name is the function's in the package


def two_adapters(model, first, second):
    with torch.no_grad():
        for name, cases in (("one", first), ("two", second)):
            for case in cases:
                adapted(model, case, name)
            for _, parameter in sorted(adapter_parameters(model, name).items()):
                parameter.normal_(std=0.3)
    return model


COMBINATIONS = [((case,), (case,)) for case in CASES if case not in ("prefix_tuning", "prompt_tuning")] + [
    (("llama_adapter",), ("lora everywhere",)),
    (("ia3",), ("houlsby",)),
    (("parallel", "llama_adapter"), ("ia3", "lora")),
]


WAYS = [(False, False), (True, True), (False, True), (True, False)]
# Pairwise: every combination meets every kind of model, padding and none, a cache and none; every kind meets every way.
# In the fast suite a combination meets one kind.
ROWS = [
    pytest.param(kind, *combination, *WAYS[(i + j) % 4], marks=() if i % len(KINDS) == j else pytest.mark.slow)
    for i, combination in enumerate(COMBINATIONS)
    for j, kind in enumerate(KINDS)
]


@torch.no_grad()
@pytest.mark.parametrize("kind, first, second, padded, cached", ROWS, ids=str)
def test_each_row_as_if_alone(kind, ids, first, second, padded, cached):
    torch.manual_seed(0)
    model = make(kind)
    two_adapters(model, first, second)
    set_adapter(model, "one")
    states = [wrapper.active for _, wrapper in wrappers(model)]
    with mixed(model, NAMES):
        together = run(model, ids, padded, cached)
    assert [wrapper.active for _, wrapper in wrappers(model)] == states
    for row, name in enumerate(NAMES):
        set_adapter(model, *[name] if name else [])
        n = LENGTHS[row] if padded else 9
        alone = show(model, slice(row, row + 1))(ids[row : row + 1, 9 - n :])
        assert (together[row, 9 - n :] - alone[0]).abs().max() < 1e-5 * max(1, alone.abs().max())


@torch.no_grad()
def test_every_row_passes_the_base_once(model, ids):
    two_adapters(model, ("llama_adapter", "ia3"), ("lora everywhere",))
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "bottleneck" not in name:

            def count(module, inputs, _, name=name):
                rows[name] = rows.get(name, 0) + (len(inputs[0]) if inputs[0].dim() == 3 else 0)

            module.register_forward_hook(count)
    with mixed(model, NAMES):
        model(ids)
    assert set(rows.values()) == {3}


def test_training_in_a_mixed_batch_reaches_each_rows_own_adapter(model, ids):
    """The gradients are those that each adapter's own rows give it."""
    two_adapters(model, ("lora",), ("ia3",))
    set_adapter(model, "one", "two")
    with mixed(model, NAMES):
        loss = answer_loss(model, ids, ids)
        loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}
    model.zero_grad()
    for row, name in enumerate(NAMES):
        if name:
            set_adapter(model, name)
            (answer_loss(model, ids[row : row + 1], ids[row : row + 1]) / 3).backward()
    set_adapter(model, "one", "two")
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-5)


def passes(model):
    """How often the bare linear layers were called, counted from now on."""
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    return seen


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=("fp32", "bf16"))
@pytest.mark.parametrize("method, options", [("lora", {"targets": "all-linear"}), ("ia3", {})])
def test_many_adapters_of_one_kind_go_at_once_and_as_in_the_loop(method, options, dtype, tolerance, ids, monkeypatch):
    """Each place passes its base once for all rows; output and gradients are those of rows sorted by adapter."""
    model, names = make("llama").to(dtype), ["a", None, "c", "b", "a", "c"]
    for i, name in enumerate(("a", "b", "c")):
        adapt(model, method, name=name, **options)
        torch.manual_seed(i)
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, method == "ia3", 0.1)
    set_adapter(model, "a", "b", "c")
    seen, results = passes(model), []
    for table in (MIXED.ROW_BY_ROW, {}):
        monkeypatch.setattr(MIXED, "ROW_BY_ROW", table)
        seen.clear()
        with mixed(model, names):
            hidden = model.hidden(ids.repeat(2, 1))
        gradients = torch.autograd.grad(hidden.float().square().sum(), list(trainable_parameters(model).values()))
        results.append([hidden, *gradients])
        wrapped = [module for module in seen if any(wrapper.base is module for _, wrapper in wrappers(model))]
        assert len(wrapped) == len(set(wrapped)) * (4 if not table else 1)
    for mine, other in zip(*results):
        assert mine.norm() > 0 and (mine - other).float().norm() <= tolerance * other.float().norm()


@torch.no_grad()
def test_what_is_not_of_one_kind_is_sorted(model, ids):
    """Another rank, another alpha, two methods of one adapter at a place: a group each, and each row right."""
    for first, second in (
        ([("lora", {})], [("lora", {"rank": 2})]),
        ([("lora", {})], [("lora", {"alpha": 5.0})]),
        ([("lora", {}), ("ia3", {})], [("lora", {}), ("ia3", {})]),
        ([("ia3", {})], [("ia3", {"outputs": (), "inputs": ("v_proj", "down_proj")})]),
    ):
        delete_adapter(model)
        for name, methods in (("one", first), ("two", second)):
            for method, options in methods:
                adapt(model, method, name=name, **options)
            for parameter in adapter_parameters(model, name).values():
                torch.nn.init.normal_(parameter, 1, 0.3)
        with mixed(model, NAMES):
            together = model(ids)
        for row, name in enumerate(NAMES):
            set_adapter(model, *[name] if name else [])
            alone = model(ids[row : row + 1])[0]
            assert (together[row] - alone).abs().max() < 1e-5 * max(1, alone.abs().max()), (first, second)


def test_each_row_at_once_has_a_dropout_of_its_own(ids):
    model = make("llama").train()
    for name in ("one", "two"):
        adapt(model, "lora", name=name, dropout=0.5)
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.ones_(parameter)
    with torch.no_grad(), mixed(model, ["one", "two", "one"]):
        rows = model.hidden(ids[:1].expand(3, -1))
    assert not torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_what_moves_positions_cannot_be_mixed(model, ids):
    adapt(adapt(model, "prompt_tuning", name="prompt"), "prefix_tuning", name="prefix")
    with (
        pytest.raises(ValueError, match="prompt_tuning moves the tokens' positions"),
        mixed(model, ["prompt", None, None]),
    ):
        pass
    if isinstance(model, minillama.LLaMA):
        with torch.no_grad(), mixed(model, ["prefix", None, "prefix"]):
            together = model(ids)
        set_adapter(model, "prefix")
        assert (together[2] - model(ids[2:])[0]).abs().max() < 1e-5
    else:
        with (
            pytest.raises(ValueError, match="prefix_tuning moves the tokens' positions"),
            mixed(model, ["prefix", None, None]),
        ):
            pass


@torch.no_grad()
def test_other_adapters_on_the_model_do_not_disturb(model, ids):
    """A prefix that is not named stays out, on a GPT-2 with its moved positions too."""
    two_adapters(model, ("lora",), ("ia3",))
    adapt(model, "prefix_tuning", name="prefix")
    adapt(model, "prompt_tuning", name="prompt")
    set_adapter(model, "prefix")
    with mixed(model, NAMES):
        together = model(ids)
    for row, name in enumerate(NAMES):
        set_adapter(model, *[name] if name else [])
        assert (together[row] - model(ids[row : row + 1])[0]).abs().max() < 1e-5 * together.abs().max()


@torch.no_grad()
def test_disabled_and_saving_within_a_mixed_batch(model, ids, tmp_path):
    base = model(ids)
    two_adapters(model, ("lora", "llama_adapter"), ("ia3",))
    expected = set_adapter(model, "one")(ids)
    with mixed(model, NAMES):
        together = model(ids)
        with disabled(model):
            assert torch.equal(model(ids), base)
        assert torch.equal(model(ids), together)
        save_adapter(model, tmp_path, "one")
        for refused in (lambda: set_adapter(model, "one"), lambda: delete_adapter(model), lambda: merge(model)):
            with pytest.raises(ValueError, match="leave the block"):
                refused()
        with pytest.raises(ValueError, match="leave the block"), mixed(model, NAMES):
            pass
    assert (load_adapter(delete_adapter(model), tmp_path)(ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_on_the_head_is_mixed_or_refused(model, ids):
    """Logits and generation tell the rows apart; a loss that picks the answers' places first does not, and says so."""
    adapt(model, "lora", name="one", targets=("lm_head",))
    adapt(model, "lora", name="two", targets=("lm_head", "q_proj"))
    with torch.no_grad():
        for name in ("one", "two"):
            for parameter in adapter_parameters(model, name).values():
                parameter.normal_(std=0.3)
        with mixed(model, NAMES):
            together, written = model(ids), minillama.generate(model, ids, 5)
        for row, name in enumerate(NAMES):
            set_adapter(model, *[name] if name else [])
            assert (together[row] - model(ids[row : row + 1])[0]).abs().max() < 1e-4
            assert torch.equal(written[row : row + 1], minillama.generate(model, ids[row : row + 1], 5))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 7  # as many places as rows
    with mixed(model, NAMES):
        for wanted in (ids, labels):
            with pytest.raises(ValueError, match="no longer tells the rows of the batch apart"):
                answer_loss(model, ids, wanted)


def test_names_are_checked_and_the_model_comes_back(model, ids):
    two_adapters(model, ("lora",), ("llama_adapter",))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no adapter 'three'.*'one'"), mixed(model, ["three"]):
        pass
    for names in (["one", "two"], ["one", "one"], ["one"]):
        with pytest.raises(ValueError, match=f"3 rows and {len(names)} adapters"), mixed(model, names):
            model(ids)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.slow
def test_32_rows_over_four_languages():
    """Four adapters of four methods on one base, one batch: each row gets its own language's answer."""
    model, tokenizer = minillama.load("dates-llama")
    train_days, test_days = data.split_dates()
    methods = [("ia3", {}, 0.1), ("lora", {}, 0.01), ("llama_adapter", {}, 0.1), ("bottleneck", {}, 0.01)]
    languages = ("fr", "de", "es", "it")
    torch.manual_seed(0)
    for i, language in enumerate(languages):
        method, options, rate = methods[i]
        adapt(model, method, name=language, **options)
        pairs = data.examples(language, train_days, 80 * 8)
        train(model, tokenizer, pairs, steps=80, batch_size=8, learning_rate=rate, progress=False)
    rows = [(language, pair) for language in languages for pair in data.examples(language, test_days, 8, seed=5)]
    names, pairs = [language for language, _ in rows], [pair for _, pair in rows]
    with mixed(model, names):
        written = answers(model, tokenizer, [prompt for prompt, _ in pairs], 11)
    assert len(rows) == 32
    for language, (prompt, _), text in zip(names, pairs, written):
        set_adapter(model, language)
        assert answers(model, tokenizer, [prompt], 11) == [text]
    right = sum(answer == text for (_, answer), text in zip(pairs, written))
    assert right >= 28, f"{right} of 32 right"
