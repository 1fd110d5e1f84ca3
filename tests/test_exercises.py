"""The checker: every right answer passes, every mistake of the catalogue is named,
and what is in no catalogue is described."""

import importlib
from pathlib import Path

import numpy
import pytest
import torch

from minillama.__main__ import main
from minillama.course import exercises as checker
from minillama.course.exercises import Exercise, Mistake, Question, catalogue, check, exercises, judging, predictions
from minillama.course.exercises.observing import calls, fact

ANSWERS = {name: exercise for name, exercise in exercises().items() if isinstance(exercise, Exercise)}
QUESTIONS = {name: exercise for name, exercise in exercises().items() if isinstance(exercise, Question)}
MISTAKES = [(name, mistake) for name, exercise in ANSWERS.items() for mistake in exercise.mistakes]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_right_answer_passes(name):
    verdict = check(name, ANSWERS[name].right)
    assert verdict.passed and verdict.mistake is None, verdict.message


@pytest.mark.parametrize("few", (True, pytest.param(False, marks=pytest.mark.slow)), ids=("few", "all"))
@pytest.mark.parametrize("name", ANSWERS)
def test_every_mistake_is_named(name, few):
    """Within its exercise no two mistakes are the same, and each has a sentence."""
    for mistake in ANSWERS[name].mistakes[: 1 if few else None]:
        verdict = check(name, mistake.answer)
        assert not verdict.passed and verdict.mistake == mistake.name, f"{mistake}: {verdict.message}"
        assert len(mistake.sentence) > 10 and not mistake.sentence.endswith("."), mistake
    names = [mistake.name for mistake in ANSWERS[name].mistakes]
    assert len(set(names)) == len(names)


def test_the_catalogue_is_large_and_its_code_short():
    """What differs in a token is a row of a table; code is for what rows cannot say."""
    paths = Path(checker.__file__).parent.glob("*.py")
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    later = [lines.pop(topic) for topic in checker.TOPICS[8:]]  # of the lessons after 08, each by itself
    assert len(MISTAKES) >= 1000 and sum(lines.values()) <= 3000, (len(MISTAKES), sum(lines.values()))
    assert max(later) <= 250, later


def alternatives():
    for path in sorted(Path(__file__).parent.glob("alternatives_*.py")):
        for name, answers in importlib.import_module(path.stem).ALTERNATIVES.items():
            for answer in answers:
                yield pytest.param(name, answer, id=f"{name}-{answer.__name__}")


@pytest.mark.slow
@pytest.mark.parametrize("name, answer", list(alternatives()))
def test_a_right_answer_written_differently_passes(name, answer):
    verdict = check(name, answer)
    assert verdict.passed, verdict.message


@pytest.mark.parametrize("name", QUESTIONS)
def test_predictions(name):
    question = QUESTIONS[name]
    truth = question.truth()
    assert predictions.judge_prediction(question, truth, [])[0]
    assert predictions.judge_prediction(question, ..., [])[1] == "blank"
    for wrong, sentence in question.wrong.items():
        passed, _, message = predictions.judge_prediction(question, wrong, [])
        assert not passed and sentence in message
        _, _, again = predictions.judge_prediction(question, wrong, ["another"])
        assert question.nudge in again and question.why not in again
    number = isinstance(truth, int | float) and not isinstance(truth, bool)
    assert not predictions.judge_prediction(question, 3 * truth + 1 if number else "nothing of the kind", [])[0]


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


@pytest.mark.slow  # most are compared with every pair of mistakes first
@pytest.mark.parametrize(
    "answer, mistake, words",
    [
        (lambda *_: None, "blank", "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)"),
        (None, "blank", "not written yet"), (..., "blank", "not written yet"),
        (wrong(lambda out: -out), "sign", "the output (B, T, D) has the wrong sign"),
        (wrong(lambda out: 2 * out), "scale", "is 2 times what it should be"),
        (wrong(lambda out: out.mT), "shape", "The sizes are right and their order is not"),
        (wrong(lambda out: out.flatten(0, 1)), "shape", "has shape ("),
        (wrong(lambda out: out.double()), "dtype", "is torch.float64; needed is torch.float32"),
        (wrong(lambda out: out / 0), "value", "the output (B, T, D)"),
        (wrong(lambda out: 0 * out), "unread", "x makes no difference to what your function returns"),
        (wrong(last_token_lost), "place", "is right at T = [0, 1, 2"),
        (wrong(lambda out: torch.nn.functional.dropout(out, 0.5)), "random", "changes from call to call"),
        (wrong(lambda out: out + out**2), "value", "neither a sign, nor one factor, nor a known mistake"),
        (wrong(lambda out: (out, out)), "shape", "should be a tensor; it is a tuple of 2"),
        (lambda attention, x: x, "error", "it stopped with TypeError"),
        (lambda attention, x, positions, prompt, gate: x @ prompt, "error", "It was called with Attention, ("),
        (3, "form", "needed is a function"),
    ],
)  # fmt: skip
def test_what_is_in_no_catalogue_is_described(answer, mistake, words):
    verdict = check("gated_prefix_attention", answer)
    assert not verdict.passed and verdict.mistake == mistake, verdict.message
    assert words in verdict.message, verdict.message


# ── what any answer can get wrong, on an exercise made for it ───────────────────────────────────────────────────────


def blend(linear, x, gate, share):
    y = linear(x)
    return y + share * gate.to(x.dtype) * y.tanh()


ROWS = (
    ("tanh_forgotten", ("y.tanh()",), ("y",), "the tanh left out"),
    ("share_forgotten", ("share * gate",), ("gate",), "the share left out"),
    ("gate_twice", ("gate.to", "y = linear(x)"), ("gate**2 * gate.to", "y = linear(x)  # and so on"), "the gate cubed"),
)


def inputs(draw, B, T, share):
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4).requires_grad_(False).eval()
    return dict(linear=linear, x=draw(B, T, 4), gate=draw(4), share=share)


BLEND = Exercise(
    "blend(linear, x, gate, share) -> (B, T, D)", blend, catalogue(blend, ROWS),
    calls(inputs, "the output (B, T, D)", (dict(B=2, T=3, share=0.5), dict(B=1, T=1, share=2.0)), float32=("gate",),
          once=("linear",)),
    forbidden={torch.addcmul: "addcmul does it in one call; write the sum"},
)  # fmt: skip


def of_two_lines(linear, x, gate, share):
    y = torch.stack([linear(row) for row in x])
    return torch.lerp(y, y + gate.to(x.dtype) * y.tanh(), share)


def in_place_input(linear, x, gate, share):
    x *= 2
    return blend(linear, x / 2, gate, share)


def in_place_weight(linear, x, gate, share):
    linear.weight.data += 0.1
    return blend(linear, x, gate, share)


def in_place_for_backward(linear, x, gate, share):
    y = linear(x)
    t = y.tanh()
    out = y + share * gate.to(x.dtype) * t
    t += 1
    return out


def unfreezes(linear, x, gate, share):
    linear.requires_grad_(True)
    return blend(linear, x, gate, share)


def gate_without_gradient(linear, x, gate, share):
    return blend(linear, x, gate.detach(), share)


def part_without_gradient(linear, x, gate, share):
    y = linear(x)
    return y + share * gate.to(x.dtype) * y.tanh().detach()


def not_cast(linear, x, gate, share):
    y = linear(x)
    return y + share * gate * y.tanh()


def half_in_float64(linear, x, gate, share):
    return blend(linear, x, gate, share).double() if x.dtype == torch.bfloat16 else blend(linear, x, gate, share)


def sizes_written_down(linear, x, gate, share):
    return blend(linear, x.reshape(2, 3, 4), gate, share)


def share_not_read(linear, x, gate, share):
    return blend(linear, x, gate, 0.3)


def runs_twice(linear, x, gate, share):
    return linear(x) + share * gate.to(x.dtype) * linear(x).tanh()


def by_addcmul(linear, x, gate, share):
    y = linear(x)
    return torch.addcmul(y, gate.to(x.dtype), y.tanh(), value=share)


def two_at_once(linear, x, gate, share):
    y = linear(x)
    return y + gate.to(x.dtype) * y


def no_return(linear, x, gate, share):
    y = x * 2  # noqa: F841


def only_dots(linear, x, gate, share):
    """A docstring is no answer."""
    ...


def breaks(linear, x, gate, share):
    return x @ x


def transposed_twice(linear, x, gate, share):
    return gate * torch.nn.functional.linear(x, linear.weight[:3].T, linear.bias)


KEPT = []


def keeps(linear, x, gate, share):
    KEPT.append(1)
    return blend(linear, x, gate, share) + len(KEPT)


@pytest.mark.parametrize(
    "answer, mistake, words",
    [
        (blend, None, "right. Equal to the reference: the output (B, T, D)."), (of_two_lines, None, "right"),
        (in_place_input, "in place", "changes its input x in place; write x = x * …"),
        (in_place_weight, "in place", "changes linear's own weight in place"),
        (in_place_for_backward, "error", "overwrites y, which the backward pass still needs"),
        (unfreezes, "unfrozen", "makes linear's own weights trainable"),
        (gate_without_gradient, "detached", "no gradient reaches gate"),
        (part_without_gradient, "detached", "x's gradient is not: a part of its way is cut off"),
        (not_cast, "not_cast", "right in float32"),
        (half_in_float64, "not_cast", "is torch.float64; needed is torch.bfloat16"),
        (sizes_written_down, "one_size", "right at the first sizes; but for B = 1, T = 1, share = 2.0"),
        (share_not_read, "unread", "share makes no difference"), (runs_twice, "run_twice", "it runs linear twice"),
        (by_addcmul, "shortcut", "the point is missed: addcmul does it in one call"),
        (two_at_once, "tanh_forgotten", "two known mistakes at once. The first: the tanh left out"),
        (no_return, "error", "is a `return` missing?"), (only_dots, "blank", "not written yet"),
        (breaks, "error", "at `return x @ x`"),
        (transposed_twice, "error", "F.linear(x, W) transposes the weight itself"),
        (keeps, "kept", "something is kept from an earlier call"),
    ],
)  # fmt: skip
def test_what_any_answer_can_get_wrong_is_named(answer, mistake, words):
    passed, found, message = judging.judge(BLEND, answer)
    assert (passed, found) == (mistake is None, mistake) and words in message, message


def test_known_mistakes_come_first():
    for mistake in BLEND.mistakes:
        assert judging.judge(BLEND, mistake.answer)[1] == mistake.name


def test_a_row_that_does_not_fit_its_reference_is_an_error():
    for old in ("y", "not there"):  # twice, never
        with pytest.raises(ValueError, match="edits what is not there once"):
            _ = Mistake("name", "sentence", blend, [(old, "z")]).answer


def test_a_fact_has_its_own_sentence():
    def probe(answer, draw):
        yield fact(answer(), "too_small", "it is too small.")

    exercise = Exercise("f() -> a number", lambda: 3, (), probe)
    assert judging.judge(exercise, lambda: 2) == (False, "too_small", "it is too small.")
    assert judging.judge(exercise, lambda: 3)[0]


@pytest.mark.parametrize("number", [12, 12.0, numpy.int64(12), torch.tensor(12), torch.tensor(12.0), numpy.float64(12)])
def test_a_whole_number_in_any_form(number):
    def probe(answer, draw):
        yield checker.Piece("the number", answer())

    exercise = Exercise("f() -> a whole number", lambda: 12, (), probe)
    assert judging.judge(exercise, lambda: number)[0]
    assert judging.judge(exercise, lambda: number + 1)[1] == "value"
    assert judging.judge(exercise, lambda: 12.5)[1] == judging.judge(exercise, lambda: "12")[1] == "form"


def test_few_whole_numbers_are_listed_and_many_are_not():
    def probe(answer, draw):
        yield checker.Piece("the codes (N)", answer())

    for many, words in (
        (3, "the codes (N) is [1, 2, 3]; needed is [0, 1, 2]."),
        (900, "by up to 1 where numbers go up"),
    ):
        exercise = Exercise("f() -> (N)", lambda many=many: torch.arange(many), (), probe)
        message = judging.judge(exercise, lambda many=many: torch.arange(many) + 1)[2]
        assert words in message and len(message) < 300, message


def test_dtypes_are_listed_where_they_do_not_fit():
    def uncast(linear, x, gate, share):
        return linear(x.double())

    dtypes = "The dtypes: linear float32, x float32, gate float32."
    assert dtypes in judging.judge(BLEND, uncast)[2]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_what_nothing_explains_is_wrong_all_the_same(name):
    """After every pair of mistakes that is tried, which are not too many to wait for."""
    verdict = check(name, lambda *arguments: torch.zeros(3))
    assert not verdict.passed and len(judging.pairs(ANSWERS[name])) <= 400


def test_the_command_shows_mistakes_as_diffs(capsys):
    assert main(["mistakes", "lora_linear"]) == 0
    shown = capsys.readouterr().out
    assert "ScaledByAlpha" in shown and "\n    +" in shown and "\n    -" in shown
    assert main(["mistakes"]) == 0
    assert "prefix_share" in capsys.readouterr().out and main(["mistakes", "lora_linea"]) == 2
    assert "perhaps" in capsys.readouterr().err


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────

NUMBER = Question(lambda: 0.25, "Because.", {0.5: "twice too much: why?"}, nudge="Count again?")
THIRD = Question(lambda: 1 / 3, "Because.", {})
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
        (COUNT, 102400.0, True, "Because"), (COUNT, "102,400", True, "Because"), (COUNT, numpy.int64(102400), True, ""),
        (COUNT, torch.tensor(102400), True, "Because"), (COUNT, 102400.5, False, "a whole number; yours is 102400.5"),
        (THIRD, 0.33, True, "Because"), (THIRD, 0.34, False, "it is less than 0.34"),
        (WORD, "The same ", True, "Because"), (WORD, "same", True, "Because"),
        (WORD, "sane", False, "one of 'different', 'the same'; yours is 'sane'"),
        (WORD, True, False, "one of 'different', 'the same'; yours is True"), (WORD, "different", False, "in what?"),
        (NAMES, ["gate"], True, "Because"), (NAMES, "gate", True, "Because"),
        (NAMES, set(), False, "Go through it once more"),
        (NAMES, {}, False, "a set made of 'gate', 'prompt', or set() for none of them; yours is {}"),
        (NAMES, {"tanh"}, False, "a set made of 'gate', 'prompt'"),
        (NAMES, [["gate"]], False, "a set made of 'gate', 'prompt'"),
    ],
)  # fmt: skip
def test_predictions_in_their_form(question, answer, passed, words):
    right, _, message = predictions.judge_prediction(question, answer, [])
    assert right is passed and words in message, message


def test_a_first_wrong_prediction_is_heard_a_second_nudged_a_third_told():
    earlier = []
    says = lambda answer: predictions.judge_prediction(NUMBER, answer, earlier)[2]  # noqa: E731
    assert says(0.5) == says(0.5) == "twice too much: why?"  # the cell run once more
    assert "a number; yours is 'x'" in says("x") and len(earlier) == 1  # a slip of form is no answer
    assert says(0.3) == "not so; it is less than 0.3. Count again?"
    assert "Run, it gives: 0.25. Because." in says(0.4)


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
