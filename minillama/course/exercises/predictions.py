"""Predictions: what will happen, asked before it is run. What is said to each answer stands in questions.md, for all
topics."""

import contextlib
import functools
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import torch

import minillama

from .catalogue import sections
from .observing import Wrong, describe


@dataclass(frozen=True)
class Question:
    """A prediction: truth() runs the thing and returns what happens (text, a number or a set of names); `why` explains.

    wrong: what a mistaken answer reveals, {answer: sentence}.  choices: the words an answer can be made of, where it is
    words; without them, those of truth and `wrong`.  nudge: what to ask back at the second wrong answer, and at a first
    one for which `wrong` has no sentence.
    """

    truth: Callable
    why: str
    wrong: dict
    choices: tuple = ()
    nudge: str = "Go through it once more, a step at a time."

    @functools.cached_property
    def outcome(self):
        """What truth() returns, run when it is first asked for."""
        return self.truth()


def questions(**truths):
    """{name: Question} by the functions that run each; the rest is read from questions.md."""
    made = {}
    for name, truth in truths.items():
        said = dict(SAID[name])
        why, nudge, choices = said.pop("right"), said.pop("otherwise"), said.pop("out of", "`()`")
        wrong = {value_of(answer): sentence for answer, sentence in said.items()}
        made[name] = Question(truth, why, wrong, tuple(value_of(choices)), nudge)
    return made


def value_of(cell):
    """An answer that is written in Python."""
    value = eval(cell.strip("`"), {**vars(math), "METHODS": dict.fromkeys(minillama.adapters.TEXT_METHODS).keys()})
    return frozenset(value) if isinstance(value, Set) else value


SAID = sections(Path(__file__).with_name("questions.md"))
EARLIER = {}  # the wrong answers to each question so far


def judge_prediction(question, answer, earlier):
    """(passed, mistake, message). A first wrong answer hears what it reveals, a second the nudge, a third the truth."""
    if answer is None or answer is ...:
        blank = "not answered yet: put your prediction in the place of the dots, then run the cell again."
        return False, "blank", blank
    truth = question.outcome
    try:
        answer = in_form(question, truth, answer)
    except Wrong as wrong:
        return False, *wrong.args
    if equal(truth, answer):
        return True, None, f"right, {show(truth)}. {question.why}"
    if answer not in earlier:  # the cell run once more is no new answer
        earlier.append(answer)
    foreseen = next((sentence for value, sentence in question.wrong.items() if equal(value, answer)), None)
    if len(earlier) == 1 and foreseen:
        return False, "prediction", foreseen
    if len(earlier) > 2:
        return False, "prediction", f"{foreseen or 'not so.'} Run, it gives: {show(truth)}. {question.why}"
    more = ""
    if not isinstance(truth, str | frozenset | bool):
        more = f"; it is {'more' if truth > answer else 'less'} than {show(answer)}"
    return False, "prediction", f"{foreseen or f'not so{more}.'} {question.nudge}"


def equal(truth, answer):
    """Whether an answer is the truth; numbers with a fraction to 1.5 %, so that 0.33 is a third."""
    if isinstance(truth, float) and not isinstance(answer, str | frozenset):
        return math.isclose(truth, answer, rel_tol=0.015, abs_tol=1e-9)
    return truth == answer


def show(outcome):
    if isinstance(outcome, frozenset):
        return ", ".join(sorted(outcome)) or "nothing"
    return f"{outcome:.4g}" if isinstance(outcome, float) else str(outcome)


def in_form(question, truth, answer):
    """The answer in the truth's form: "0.5" as 0.5, 12.0 as 12, "Smaller" as "smaller", {"gate"} frozen;
    raises Wrong where it has another one."""
    yours = repr(answer)
    if isinstance(truth, bool):
        given, needed, fits = answer, "True or False", isinstance(answer, bool)
    elif isinstance(truth, str | frozenset):
        said = [{x} if isinstance(x, str) else x for x in (truth, *question.wrong)]
        choices = question.choices or sorted(frozenset().union(*said))
        words, given = ", ".join(map(repr, choices)), chosen(answer, choices)
        needed, fits = f"a set made of {words}, or set() for none of them", given is not None
        if isinstance(truth, str):
            needed, fits = f"one of {words}", fits and len(given) == 1
            given = min(given) if fits else None
    else:
        given, kind = as_number(answer), int if isinstance(truth, int) else int | float
        if kind is int and isinstance(given, float) and given.is_integer():
            given = int(given)
        needed, yours = f"a {'whole ' * (kind is int)}number", f"{yours}, {describe(answer)}"
        fits = isinstance(given, kind) and not isinstance(given, bool) and math.isfinite(given)
    if not fits:
        raise Wrong("form", f"the answer is {needed}; yours is {yours}.")
    return given


def chosen(answer, choices):
    """The choices that an answer names, in whatever spelling, or None where it is none of them."""
    spelt = {choice.lower(): choice for choice in choices}
    spelt = {word.removeprefix("the "): choice for word, choice in spelt.items()} | spelt  # "same": "the same"
    given = {answer} if isinstance(answer, str) else answer
    with contextlib.suppress(AttributeError, KeyError):  # no text, no choice
        if isinstance(given, set | frozenset | list | tuple):
            return frozenset(spelt[word.strip().lower()] for word in given)


def as_number(answer):
    """What holds one number, be it numpy's, a tensor, a fraction or a text, as Python's; the rest as it is."""
    with contextlib.suppress(ValueError, RuntimeError, TypeError):
        if isinstance(answer, str):
            answer = answer.replace(",", "").replace("_", "")
        return answer if isinstance(answer, int) else float(answer)
    return answer


def moved(method, steps, prepare=lambda own: None, names=lambda name: name.rpartition(".")[2], **options):
    """For a Question: which of a fresh adapter's parameters, by what `names` makes of their names, have moved after
    `steps` of descent.  prepare: called with {name: parameter} before the first."""

    def truth():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), method, **options)
            ids, own = torch.randint(0, 31, (2, 6)), minillama.adapters.adapter_parameters(model)
            prepare(own)
            before = {name: p.detach().clone() for name, p in own.items()}
            for _ in range(steps):
                model.zero_grad()
                minillama.answer_loss(model, ids, ids).backward()
                for p in own.values():
                    p.data -= 0.1 * p.grad
        return frozenset(names(name) for name, p in own.items() if not torch.equal(p, before[name]))

    return truth
