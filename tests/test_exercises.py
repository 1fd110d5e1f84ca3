"""The checker: every right answer passes, every mistake of the catalogue is named, and what is in no catalogue is described."""

import pytest
import torch

from minillama.exercises import Exercise, Question, check, exercises

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


@pytest.mark.parametrize("name, answer", alternatives())
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
    assert not check(name, 3 * truth + 1 if isinstance(truth, int | float) and not isinstance(truth, bool) else "nothing of the kind").passed


# ── what is in no catalogue is described ────────────────────────────────────────────────────────────────────────────


def right_prefix(attention, x, positions, prompt, gate):
    q, k, v = attention.project(x, positions)
    pk, pv = (z.repeat_interleave(attention.num_heads // attention.num_kv_heads, 0) for z in attention.keys_values(prompt.to(x.dtype)))
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
        (wrong(lambda out: out.mT), "shape", "has shape (2, 40, 5); needed is (2, 5, 40). The sizes are right and their order is not"),
        (wrong(lambda out: out.flatten(0, 1)), "shape", "has shape (10, 40); needed is (2, 5, 40)"),
        (wrong(lambda out: out.double()), "dtype", "is torch.float64; needed is torch.float32"),
        (wrong(lambda out: out / 0), "value", "never mind"),
        (wrong(lambda out: 0 * out), "value", "is 0 everywhere"),
        (wrong(last_token_lost), "place", "is right at T = [0, 1, 2, 3] and wrong at T = [4]. It depends on the token"),
        (wrong(lambda out: torch.nn.functional.dropout(out, 0.5)), "random", "changes from call to call"),
        (wrong(lambda out: out + out**2), "value", "neither a sign, nor one factor, nor a known mistake"),
        (wrong(lambda out: (out, out)), "shape", "should be a tensor; it is a tuple of 2"),
        (lambda attention, x: x, "error", "it stopped with TypeError"),
        (lambda attention, x, positions, prompt, gate: x @ prompt, "error", "It was called with Attention, (2, 5, 40), (5,), (3, 40), (6, 1, 1)"),
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


def test_check_prints_what_it_returns_and_leaves_random_numbers_alone(capsys):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    verdict = check("gated_prefix_attention", right_prefix)
    assert torch.equal(torch.rand(2), expected)
    assert verdict.passed and capsys.readouterr().out.strip() == verdict.message and verdict.message.startswith("✓ gated_prefix_attention: right")


def test_an_unknown_exercise_is_a_sentence():
    with pytest.raises(ValueError, match="there is no exercise 'gated_prefix': perhaps .*gated_prefix_attention"):
        check("gated_prefix", right_prefix)
