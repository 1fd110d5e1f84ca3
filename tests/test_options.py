"""Options of the methods, whoever gives them: typed by the annotations of `attach`."""

import numpy
import pytest
from test_command_line import inside, sentence

import minillama
from minillama.adapters import METHODS, adapters
from minillama.adapters.options import WORDS, known_options, said


@pytest.mark.parametrize(
    "method, option, value, words",
    [
        ("llama_adapter", "prompt_length", 1e3, "prompt_length is 1000.0; needed is a whole number"),
        ("llama_adapter", "prompt_length", 10**9, "a whole number of at most 1,048,576"),
        ("llama_adapter", "prompt_length", True, "prompt_length is True"),
        ("llama_adapter", "tanh", "maybe", "tanh is 'maybe'; needed is True or False"),
        ("llama_adapter", "tanh", 1, "tanh is 1; needed is True or False"),
        ("llama_adapter", "gate", None, "gate is None; needed is a name"),
        ("lora", "alpha", float("nan"), "alpha is nan; needed is a number"),
        ("lora", "alpha", "16", "alpha is '16'; needed is a number"),
        ("lora", "targets", 3, "targets is 3; needed is a name, or several"),
        ("lora", "targets", ["q_proj", 3], "needed is a name, or several"),
        ("prefix_tuning", "reparameterize", "8", "needed is a whole number of at most 1,048,576 or None"),
        ("prompt_tuning", "init_ids", [1, "2"], "init_ids is"),
        ("bottleneck", "scale", None, "scale is None; needed is a number"),
    ],
)
def test_a_value_of_another_kind_is_named(method, option, value, words):
    model = minillama.load("dates-llama")[0]
    with pytest.raises(ValueError) as refused:
        minillama.adapt(model, method, **{option: value})
    assert words in str(refused.value) and not adapters(model)


def test_numbers_of_numpy_and_whole_ones_for_real_ones_are_taken():
    model = minillama.load("dates-llama")[0]
    minillama.adapt(model, "lora", rank=numpy.int64(4), alpha=8, targets={"q_proj"})
    minillama.adapt(model, "ia3", outputs="k_proj", name="second")


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_annotated(method):
    annotations = METHODS[method].attach.__annotations__
    assert list(annotations) == known_options(METHODS[method].attach)
    assert all(said(kind) for kind in annotations.values()) and len(WORDS) == 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--option", "prompt_length=1e3"), "prompt_length is 1000.0"),
        (("--option", "tanh=maybe"), "tanh is 'maybe'"),
        (("--method", "prefix_tuning", "--option", "reparameterize=0"), "reparameterize is 0"),
        (("--learning-rate", "nan"), "--learning-rate: nan is out of range"),
        (("--learning-rate", "1e400"), "--learning-rate: 1e400 is out of range"),
        (("--seed", str(2**64)), "--seed: 18446744073709551616 is too large"),
        (("--seed", "-1"), "--seed: -1 is too small"),
        (("--test-dates", "1e10"), "--test-dates: 1e10 is no whole number"),
        (("--test-dates", str(10**10)), "--test-dates: 10000000000 is too large"),
        (("--steps", "9" * 5000), "is too large"),
        (("--out", ""), "--out: it is empty"),
        (("--device", "meta"), "meta"),
        (("--languages", "fr\n"), "language"),
        (("--batch-size", "x"), "--batch-size: x is no whole number"),
        (("--checkpoint-every", "-1"), "--checkpoint-every: -1 is out of range"),
        (("--resume", "nowhere"), "holds no run to go on with"),
        (("--resume", "nowhere", "--steps", "3"), "leave --steps out"),
    ],
)
def test_adapt_refuses_before_any_work(arguments, words, tmp_path):
    code, _, err = inside("adapt", *arguments, cwd=tmp_path)
    assert code == 2 and words in sentence(err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("pretrain", "--out", "x", "--typos", "nan"), "--typos: nan is out of range"),
        (("pretrain", "--out", "x", "--typos", "2"), "--typos: 2 is out of range"),
        (("pretrain", "--out", ""), "--out: it is empty"),
        (("generate", "--prompt", "x", "--temperature", "1e-45"), "temperature"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", "--prompt", "x", "--max-new-tokens", "1e9"), "--max-new-tokens"),
        (("generate", "--prompt", "x", "--adapter", ""), "--adapter: it is empty"),
    ],
)
def test_other_commands_refuse_too(arguments, words, tmp_path):
    code, _, err = inside(*arguments, cwd=tmp_path)
    assert code == 2 and words in sentence(err) and not list(tmp_path.iterdir())
