"""The checker: every right answer passes, every mistake of the catalogue is named,
and what is in no catalogue is described."""

import pytest
import torch

from minillama.course import exercises as checker
from minillama.course.exercises import Exercise, Question, check, exercises

ANSWERS = {name: exercise for name, exercise in exercises().items() if isinstance(exercise, Exercise)}
QUESTIONS = {name: exercise for name, exercise in exercises().items() if isinstance(exercise, Question)}
MISTAKES = [(name, mistake) for name, exercise in ANSWERS.items() for mistake in exercise.mistakes]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_right_answer_passes(name):
    verdict = check(name, ANSWERS[name].right)
    assert verdict.passed and verdict.mistake is None, verdict.message


@pytest.mark.parametrize("name, mistake", MISTAKES, ids=lambda value: getattr(value, "__name__", value))
def test_every_mistake_is_named(name, mistake):
    verdict = check(name, mistake)
    assert not verdict.passed and verdict.mistake == mistake.__name__, verdict.message
    assert len(mistake.__doc__) > 10


def alternatives():
    import importlib
    from pathlib import Path

    for path in sorted(Path(__file__).parent.glob("alternatives_*.py")):
        for name, answers in importlib.import_module(path.stem).ALTERNATIVES.items():
            for answer in answers:
                yield pytest.param(name, answer, id=f"{name}-{answer.__name__}")


@pytest.mark.parametrize("name, answer", list(alternatives()))
def test_a_right_answer_written_differently_passes(name, answer):
    verdict = check(name, answer)
    assert verdict.passed, verdict.message


@pytest.mark.parametrize("name", QUESTIONS)
def test_predictions(name):
    question = QUESTIONS[name]
    truth = question.truth()
    assert check(name, truth).passed
    assert check(name, ...).mistake == "blank"
    for wrong, sentence in question.wrong.items():
        verdict = check(name, wrong)
        assert not verdict.passed and sentence in verdict.message
    number = isinstance(truth, int | float) and not isinstance(truth, bool)
    assert not check(name, 3 * truth + 1 if number else "nothing of the kind").passed


# ── what is in no catalogue is described ────────────────────────────────────────────────────────────────────────────


def right_prefix(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    group = attention.num_heads // attention.num_kv_heads
    pk, pv = (z.repeat_interleave(group, 0) for z in attention.keys_values(prompt.to(x.dtype)))
    term = (q @ pk.mT / attention.head_dim**0.5).softmax(-1) @ pv
    return attention.output(attention.attend(q, k, v) + torch.tanh(gate).to(x.dtype) * term)


def wrong(change):
    return lambda *arguments: change(right_prefix(*arguments))


def last_token_lost(out):
    return torch.cat((out[:, :-1], 0 * out[:, -1:]), 1)


@pytest.mark.parametrize(
    "answer, mistake, words",
    [
        (lambda *_: None, "blank", "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)"),
        (wrong(lambda out: -out), "sign", "the output (B, T, D) has the wrong sign"),
        (wrong(lambda out: 2 * out), "scale", "is 2 times what it should be"),
        (
            wrong(lambda out: out.mT),
            "shape",
            "has shape (2, 40, 5); needed is (2, 5, 40). The sizes are right and their order is not",
        ),
        (wrong(lambda out: out.flatten(0, 1)), "shape", "has shape (10, 40); needed is (2, 5, 40)"),
        (wrong(lambda out: out.double()), "dtype", "is torch.float64; needed is torch.float32"),
        (wrong(lambda out: out / 0), "value", "never mind"),
        (wrong(lambda out: 0 * out), "value", "is 0 everywhere"),
        (wrong(last_token_lost), "place", "is right at T = [0, 1, 2, 3] and wrong at T = [4]. It depends on the token"),
        (wrong(lambda out: torch.nn.functional.dropout(out, 0.5)), "random", "changes from call to call"),
        (wrong(lambda out: out + out**2), "value", "neither a sign, nor one factor, nor a known mistake"),
        (wrong(lambda out: (out, out)), "shape", "should be a tensor; it is a tuple of 2"),
        (lambda attention, x: x, "error", "it stopped with TypeError"),
        (
            lambda attention, x, positions, prompt, gate: x @ prompt,
            "error",
            "It was called with Attention, (2, 5, 40), (5,), (3, 40), (6, 1, 1)",
        ),
        (3, "shape", "needed is a function"),
    ],
)
def test_what_is_in_no_catalogue_is_described(answer, mistake, words):
    verdict = check("gated_prefix_attention", answer)
    assert not verdict.passed and verdict.mistake == mistake, verdict.message
    assert words in verdict.message or words == "never mind", verdict.message


def test_the_line_of_an_error_is_shown():
    assert "at `return x @ prompt`" in check("gated_prefix_attention", breaks).message


def breaks(attention, x, positions, prompt, gate):
    return x @ prompt


# ── wrong in more than one way, wrong in form ───────────────────────────────────────────────────────────────────────


def scaled_in_place(linear, x, scale, shift):
    x *= 2
    return scale * (linear(x) + shift)


def shift_in_place(linear, x, scale, shift):
    shift += linear.bias
    return scale * (x @ linear.weight.T + shift)


def kept_for_backward(linear, x, scale, shift):
    y = linear(x) + shift
    out = scale * y
    y += 1
    return out


def weight_transposed_twice(linear, x, scale, shift):
    return scale * torch.nn.functional.linear(x, linear.weight.T, linear.bias)


def no_return(linear, x, scale, shift):
    y = x * 2  # noqa: F841


def only_dots(linear, x, scale, shift):
    """A docstring is no answer."""
    ...


def bias_left_out_and_dtype(linear, x, scale, shift):
    return scale * (x.float() @ linear.weight.T.float() + shift)


@pytest.mark.parametrize(
    "answer, mistake, words",
    [
        (scaled_in_place, "in place", "changes its input x in place; write x = x * …"),
        (
            shift_in_place,
            "error",
            "overwrites y, which the backward pass still needs, at `shift += linear.bias`: write y = y + …",
        ),
        (kept_for_backward, "error", "overwrites y, which the backward pass still needs: write y = y + …"),
        (weight_transposed_twice, "error", "F.linear(x, W) transposes the weight itself"),
        (no_return, "error", "is a `return` missing?"),
        (only_dots, "blank", "not written yet"),
        (bias_left_out_and_dtype, "own_bias_dropped", "the layer's own bias b₀ left out"),
        (lambda linear, x, scale, shift: scale * linear(x.to(scale.dtype)), "shift_forgotten", "the shift b left out"),
        (lambda linear, x, scale, shift: 1 - scale * (linear(x) + shift), "value", "is 1 minus what it should be"),
    ],
)
def test_mistakes_that_python_or_torch_would_hide_are_said(answer, mistake, words):
    verdict = check("scaled_linear", answer)
    assert not verdict.passed and verdict.mistake == mistake and words in verdict.message, verdict.message


def test_dtypes_are_listed_where_they_do_not_fit():
    def uncast(attention, x, positions, prompt, gate):
        attention.keys_values(prompt)
        return right_prefix(attention, x, positions, prompt, gate)

    dtypes = "The dtypes: attention bfloat16, x bfloat16, positions int64, prompt float32, gate float32."
    assert dtypes in check("gated_prefix_attention", uncast).message


class Norm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.active = norm, True


class BlankNorm(Norm):
    def forward(self, x): ...


class NormWithoutReturn(Norm):
    def forward(self, x):
        y = self.norm(x)  # noqa: F841


class NormInPlace(Norm):
    def forward(self, x):
        x += 1
        return self.norm(x)


def test_modules_are_asked_for_their_return_as_functions_are():
    assert check("trained_norm", BlankNorm).mistake == check("trained_norm", Norm).mistake == "blank"
    assert "is a `return` missing?" in check("trained_norm", NormWithoutReturn).message
    assert "changes its input x in place" in check("trained_norm", NormInPlace).message


def test_what_changes_a_weight_and_goes_unnoticed_at_first_is_a_sentence():
    def probe(answer, draw):
        linear = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(linear.weight), torch.nn.init.ones_(linear.bias)
        out = answer(linear)
        yield "the output (B)", out
        if (linear.weight == 1).all():
            yield "another (B)", out

    def overwrites(linear):
        linear.weight.data.mul_(2)
        return torch.ones(3)

    verdict = checker.judge(Exercise("f(linear) -> (B)", lambda linear: torch.ones(3), (), probe), overwrites)
    assert not verdict.passed and verdict.mistake == "in place", verdict.message


def test_a_start_must_be_normal_not_only_as_wide():
    gate = torch.zeros(6, 1, 1)

    def uniform(factor):
        return lambda K, D, H: (factor * torch.rand(K, D), gate)

    for factor in (1, 12**0.5):
        verdict = check("initial_values", uniform(factor))
        assert verdict.mistake == "uniform_prompt" and "torch.randn" in verdict.message
    assert "uniform" in check("initial_values", lambda K, D, H: (2 * 3**0.5 * (torch.rand(K, D) - 0.5), gate)).message
    shifted = check("initial_values", lambda K, D, H: (torch.randn(K, D) + 1, gate))
    assert "the prompt's mean is 1; needed is 0" in shifted.message
    narrow = check("initial_values", lambda K, D, H: (torch.randn(K, D) / 2, gate))
    assert "deviation is 0.5; needed is 1" in narrow.message
    assert check("initial_values", lambda K, D, H: (torch.randn(K, D), gate)).passed


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────

NUMBER = Question(lambda: 0.25, "Because.", {0.5: "twice too much: why?"}, nudge="Count again?")
COUNT = Question(lambda: 102400, "Because.", {})
WORD = Question(lambda: "the same", "Because.", {"different": "in what?"})
NAMES = Question(lambda: frozenset(["gate"]), "Because.", {frozenset(["prompt"]): "the other one?"})


@pytest.mark.parametrize(
    "question, answer, passed, words",
    [
        (NUMBER, "0.25", True, "Because"), (NUMBER, torch.tensor(0.25), True, "Because"),
        (NUMBER, 0.2501, True, "Because"),
        (NUMBER, "one", False, "a number; yours is 'one', a str"), (NUMBER, True, False, "a number; yours is True"),
        (NUMBER, 0.5, False, "twice too much: why?"), (NUMBER, 0.3, False, "not so; it is less than 0.3. Count again?"),
        (COUNT, 102400, True, "Because"), (COUNT, "102400", True, "Because"),
        (COUNT, 102401, False, "it is less than 102401"),
        (COUNT, 102400.0, False, "a whole number, an int; yours is 102400.0, a float"),
        (COUNT, torch.tensor(102400), False, "a whole number, an int; yours is tensor(102400)"),
        (WORD, "The same ", True, "Because"), (WORD, "same", False, "one of 'different', 'the same'; yours is 'same'"),
        (WORD, True, False, "one of 'different', 'the same'; yours is True"), (WORD, "different", False, "in what?"),
        (NAMES, ["gate"], True, "Because"), (NAMES, "gate", True, "Because"),
        (NAMES, set(), False, "another wrong answer is told"),
        (NAMES, {}, False, "a set made of 'gate', 'prompt', or set() for none of them; yours is {}"),
        (NAMES, {"tanh"}, False, "a set made of 'gate', 'prompt'"),
        (NAMES, [["gate"]], False, "a set made of 'gate', 'prompt'"),
    ],
)  # fmt: skip
def test_predictions_in_their_form(question, answer, passed, words):
    verdict = checker.judge_prediction(question, answer, [])
    assert verdict.passed is passed and words in verdict.message, verdict.message


def test_the_first_wrong_prediction_is_asked_back_and_a_second_is_told():
    earlier = []
    says = lambda answer: checker.judge_prediction(NUMBER, answer, earlier).message  # noqa: E731
    assert "Count again?" in says(0.3) and "Count again?" in says(0.3)  # the cell run once more
    assert "a number; yours is 'x'" in says("x") and len(earlier) == 2  # a slip of form is no answer
    assert "twice too much: why?" in says(0.5)
    assert "run, it gives: 0.25. Because." in says(0.4)


# ── what is left as it was ──────────────────────────────────────────────────────────────────────────────────────────


def test_check_prints_what_it_returns_and_leaves_random_numbers_alone(capsys):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    verdict = check("gated_prefix_attention", right_prefix)
    assert torch.equal(torch.rand(2), expected)
    printed = capsys.readouterr().out  # in lines that a notebook's page need not break within a word
    assert verdict.passed and verdict.message.startswith("✓ gated_prefix_attention: right")
    assert " ".join(printed.split()) == verdict.message and max(map(len, printed.splitlines())) <= 108


def test_an_unknown_exercise_is_a_sentence():
    with pytest.raises(ValueError, match="there is no exercise 'gated_prefix': perhaps .*gated_prefix_attention"):
        check("gated_prefix", right_prefix)
