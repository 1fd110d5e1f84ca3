"""The lessons' exercises: `check("gated_prefix_attention", your_function)` runs your code and names the mistake in it.

A topic is a module here, named as its lesson; its EXERCISES are what `check` knows by name. An exercise has the right
answer, a catalogue of wrong ones that are easily written, and a probe, which calls an answer on random inputs with
every gate open and yields what came of it, piece by piece. An answer is right when every piece equals the right
answer's; otherwise it is held against every entry of the catalogue, and where none matches, what is wrong is described.
The test suite plants the same catalogue in the models, where each entry must fail.
"""

import contextlib
import difflib
import dis
import functools
import importlib
import inspect
import linecache
import math
import re
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

import minillama

TOPICS = ("base_models", "prefix_tuning", "llama_adapter", "ia3", "bottleneck", "lora")


@dataclass(frozen=True)
class Exercise:
    """What an answer is held against.

    call:     how the answer is called and what it returns, for messages: "rms_norm(x, weight, eps) -> (B, T, D)";
              where it ends in "-> a whole number", nothing but an int will do.
    right:    the right answer.
    mistakes: wrong ones, functions (or classes) called likewise; the docstring's first paragraph says what is wrong.
    probe:    probe(answer, draw) yields pairs (what, tensor), where draw(*shape) gives random numbers, the same for
              every answer; capital and small letters in the brackets of `what` name the axes: "the output (B, T, D)".
    """

    call: str
    right: Callable
    mistakes: tuple
    probe: Callable


@dataclass(frozen=True)
class Question:
    """A prediction: truth() runs the thing and returns what happens (text, a number or a set of names); `why` explains.

    wrong: what a mistaken answer reveals, {answer: sentence}.  choices: the words an answer can be made of, where it is
    words; without them, those of truth and `wrong`.  nudge: what to ask back where `wrong` has no sentence for the
    first wrong answer.
    """

    truth: Callable
    why: str
    wrong: dict
    choices: tuple = ()
    nudge: str = "Go through it once more, a step at a time; another wrong answer is told what happens."

    @functools.cached_property
    def outcome(self):
        """What truth() returns, run when it is first asked for."""
        return self.truth()


@dataclass(frozen=True)
class Verdict:
    """passed, and mistake: the catalogue's name of what went wrong, or blank, form, error, in place, shape, dtype,
    kept, random, swapped, sign, scale, place, value, or None."""

    passed: bool
    mistake: str | None
    message: str

    def _ipython_display_(self):
        """Nothing: `check` has printed the message, and a notebook would print the verdict once more."""


def exercises():
    """All exercises and questions by name."""
    topics = [importlib.import_module(f"{__name__}.{topic}") for topic in TOPICS]
    return {name: exercise for topic in topics for name, exercise in topic.EXERCISES.items()}


def check(name, answer):
    """Prints a verdict on an answer to the exercise of that name, and returns it.

    answer: a function (or class) as the exercise asks for it, or for a prediction its value.
    Raises ValueError for a name that no exercise has.
    """
    known = exercises()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"perhaps {' or '.join(near)}" if near else f"they are {', '.join(known)}"
        raise ValueError(f"there is no exercise {name!r}: {hint}")
    exercise = known[name]
    if isinstance(exercise, Question):
        verdict = judge_prediction(exercise, answer, EARLIER.setdefault(name, []))
    else:
        verdict = judge(exercise, answer)
    verdict = Verdict(verdict.passed, verdict.mistake, f"{'✓' if verdict.passed else '✗'} {name}: {verdict.message}")
    wrap = functools.partial(textwrap.wrap, width=108, break_long_words=False, break_on_hyphens=False)
    print(*(line for part in verdict.message.splitlines() for line in wrap(part)), sep="\n")
    return verdict


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────

EARLIER = {}  # the wrong answers to each question so far: the first is asked back, a later one may be told what happens


def judge_prediction(question, answer, earlier):
    if answer is None or answer is ...:
        blank = "not answered yet: put your prediction in the place of the dots, then run the cell again."
        return Verdict(False, "blank", blank)
    truth = question.outcome
    try:
        answer = in_form(question, truth, answer)
    except Wrong as wrong:
        return Verdict(False, *wrong.args)
    passed = math.isclose(truth, answer, rel_tol=0.01, abs_tol=1e-9) if isinstance(truth, float) else truth == answer
    if passed:
        return Verdict(True, None, f"right, {show(truth)}. {question.why}")
    earlier.append(answer)
    foreseen = next((sentence for value, sentence in question.wrong.items() if value == answer), None)
    if foreseen is not None:
        return Verdict(False, "prediction", foreseen)
    if answer == earlier[0]:
        more = ""
        if not isinstance(truth, str | frozenset | bool):
            more = f"; it is {'more' if truth > answer else 'less'} than {show(answer)}"
        return Verdict(False, "prediction", f"not so{more}. {question.nudge}")
    return Verdict(False, "prediction", f"run, it gives: {show(truth)}. {question.why}")


def show(outcome):
    if isinstance(outcome, frozenset):
        return ", ".join(sorted(outcome)) or "nothing"
    return f"{outcome:.4g}" if isinstance(outcome, float) else str(outcome)


def in_form(question, truth, answer):
    """The answer in the truth's form: "0.5" as 0.5, "Smaller" as "smaller", {"gate"} frozen;
    raises Wrong where it has another one."""
    said = (truth, *question.wrong) if isinstance(truth, str | frozenset) else ()
    choices = question.choices or sorted({word for x in said for word in ([x] if isinstance(x, str) else x)})
    words = ", ".join(map(repr, choices))
    if isinstance(truth, frozenset):
        given = {answer} if isinstance(answer, str) else answer
        if not isinstance(given, set | frozenset | list | tuple) or not all(word in choices for word in given):
            raise Wrong("form", f"the answer is a set made of {words}, or set() for none of them; yours is {answer!r}.")
        return frozenset(given)
    if isinstance(truth, str):
        given = answer.strip().lower() if isinstance(answer, str) and truth.islower() else answer
        if not isinstance(given, str) or given not in choices:
            raise Wrong("form", f"the answer is one of {words}; yours is {answer!r}.")
        return given
    if isinstance(truth, bool):
        if not isinstance(answer, bool):
            raise Wrong("form", f"the answer is True or False; yours is {answer!r}.")
        return answer
    given, whole = answer, isinstance(truth, int)
    if isinstance(answer, torch.Tensor) and answer.numel() == 1 and not whole:
        given = answer.item()
    if isinstance(answer, str):
        with contextlib.suppress(ValueError):
            given = type(truth)(answer)
    if isinstance(given, bool) or not isinstance(given, int if whole else int | float):
        needed = "whole number, an int" if whole else "number"
        raise Wrong("form", f"the answer is a {needed}; yours is {answer!r}, {describe(answer)}.")
    return given


# ── answers that run ────────────────────────────────────────────────────────────────────────────────────────────────


class Wrong(Exception):
    """What a probe raises when it cannot go on with an answer: Wrong(kind, sentence)."""


def named(names, result):
    """Pairs (name, tensor) of an answer that returns several tensors, for a probe to yield."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise Wrong("shape", f"needed are {len(names)} tensors, {' and '.join(names)}; it returned {describe(result)}")
    return list(zip(names, result))


def gradients(out, *inputs):
    """The gradient of a fixed weighting of `out` with respect to each input; zeros where none flows."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    weighting = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    found = torch.autograd.grad((out * weighting).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found)]


def moved(method, steps, **options):
    """For a Question: which of a fresh adapter's parameters, by the last word of their names,
    have moved after `steps` of descent."""

    def truth():
        torch.manual_seed(0)
        model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), method, **options)
        ids, own = torch.randint(0, 31, (2, 6)), minillama.adapters.adapter_parameters(model)
        before = {name: p.detach().clone() for name, p in own.items()}
        for _ in range(steps):
            model.zero_grad()
            minillama.answer_loss(model, ids, ids).backward()
            for p in own.values():
                p.data -= 0.1 * p.grad
        return frozenset(name.rpartition(".")[2] for name, p in own.items() if not torch.equal(p, before[name]))

    return truth


def describe(value):
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{'an' if name[0] == 'i' else 'a'} {name} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(describe, value))}"
    return f"{value!r}" if value is None else f"{'an' if type(value) is int else 'a'} {type(value).__name__}"


def observe(exercise, answer, salt=0):
    """(pieces, error): what the probe yields for this answer, and how it ended early, as (kind, sentence), or None.

    salt: the state of torch's random numbers at each call, which a deterministic answer does not notice.
    """
    pieces, calls, generator = [], [], torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def begin(function, arguments):
        torch.manual_seed(salt)
        before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        calls.append((function, arguments, before))

    def end(result):
        function, arguments, before = calls[-1]
        if result is None or result is ...:
            if is_blank(function):
                raise NotImplementedError
            nothing = f"it returned nothing when called with {shapes(arguments)}: is a `return` missing?"
            raise Wrong("error", f"{nothing} Needed is {exercise.call}.")
        for i, (x, copy) in enumerate(zip(arguments, before)):
            if isinstance(x, torch.Tensor) and not torch.equal(x.detach(), copy):
                x = name_of(function, i)
                instead = f"write {x} = {x} * … (or + …), a new tensor, instead of {x} *= …"
                raise Wrong("in place", f"your function changes its input {x} in place; {instead}.")

    def called(*arguments, **names):
        begin(answer, arguments)
        result = answer(*arguments, **names)
        end(result)
        if exercise.call.endswith("-> a whole number") and type(result) is not int:
            returned = f"it returned {result!r}, {describe(result)} (`//` divides whole numbers, `/` makes floats)"
            raise Wrong("form", f"needed is a whole number, an int; {returned}.")
        if isinstance(result, torch.nn.Module):
            result.register_forward_pre_hook(lambda module, inputs: begin(module.forward, inputs))
            result.register_forward_hook(lambda module, inputs, result: end(result))
        return result

    try:
        with torch.random.fork_rng(devices=[]):
            for what, value in exercise.probe(called, draw):
                if not isinstance(value, torch.Tensor):
                    raise Wrong("shape", f"{what} should be a tensor; it is {describe(value)}")
                pieces.append((what, value.detach().clone()))
    except NotImplementedError:
        unwritten = f"not written yet: it should be {exercise.call}. Fill in the dots, then run the cell again."
        return pieces, ("blank", unwritten)
    except Wrong as wrong:
        return pieces, wrong.args
    except Exception as error:  # whatever a student's code may raise is part of the verdict
        function, arguments, _ = calls[-1] if calls else (answer, (), ())
        if isinstance(error, RuntimeError) and re.search("in-?place operation", str(error)):
            needed = f"an assignment like `y += …` overwrites y, which the backward pass still needs{place_of(error)}"
            return pieces, ("error", f"{needed}: write y = y + …, a new tensor.")
        stopped = f"it stopped with {type(error).__name__}: {str(error).rstrip('.')}{place_of(error)}."
        given = f"It was called with {shapes(arguments) or 'nothing'}; needed is {exercise.call}."
        return pieces, ("error", f"{stopped}{advice(error, function, arguments)} {given}")
    return pieces, None


def is_blank(function):
    """Whether its body is a docstring, dots, `pass` or a bare `return`."""
    steps = {step.opname for step in dis.get_instructions(function)} if hasattr(function, "__code__") else set()
    idle = "RESUME COPY_FREE_VARS NOP LOAD_CONST LOAD_SMALL_INT POP_TOP RETURN_VALUE RETURN_CONST"
    return steps <= set(idle.split())


def name_of(function, place):
    """What the function calls its argument at this place."""
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return list(inspect.signature(function).parameters)[place]
    return f"number {place + 1}"


def advice(error, function, arguments):
    """What torch's own words leave out."""
    if "shapes cannot be multiplied" in str(error) and "linear(" in place_of(error):
        return " F.linear(x, W) transposes the weight itself: it is x @ W.T."
    if re.search("same dtype|scalar type", str(error)):
        tensors = [next(x.parameters(), None) if isinstance(x, torch.nn.Module) else x for x in arguments]
        dtypes = {name_of(function, i): x.dtype for i, x in enumerate(tensors) if isinstance(x, torch.Tensor)}
        return f" The dtypes: {', '.join(f'{name} {str(dtype)[6:]}' for name, dtype in dtypes.items())}."
    return ""


def shapes(arguments):
    """What a call was given, short: tensors by their shapes, others by their values or types."""
    plain = [x if isinstance(x, int | float) else type(x).__name__ for x in arguments]
    return ", ".join(f"{tuple(x.shape) if isinstance(x, torch.Tensor) else y}" for x, y in zip(arguments, plain))


expected = functools.cache(observe)  # of the right answer and of the catalogue, which do not change


def place_of(error):
    """The last line of the student's own code on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not re.search(r"[/\\](minillama|torch)[/\\]", frame.filename)]
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip() if own else ""
    return f", at `{line}`" if line else ""


def tolerance(tensor):
    return 0.1 if tensor.dtype in (torch.bfloat16, torch.float16) else 1e-4  # there the dtype is what is looked at


def close(a, b):
    """Equal in shape, dtype and, to rounding, in value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit, a, b = tolerance(a), a.double(), b.double()
    if not a.numel() or not torch.equal(a.isnan(), b.isnan()):
        return not a.numel()
    return bool((a - b).abs().nan_to_num().max() <= limit * b.abs().nan_to_num().max() + 1e-12)


def alike(first, second):
    """Whether two observations are the same: every piece, and the way they ended."""
    (pieces, error), (others, other) = first, second
    if len(pieces) != len(others) or ended(error) != ended(other):
        return False
    return all(close(a, b) for (_, a), (_, b) in zip(pieces, others))


def ended(error):
    """An error but for where it stood and what the call was given, which do not matter."""
    return error and (error[0], re.sub(r", at `.*?`| The dtypes: .*| It was called.*", "", error[1]))


def alike_so_far(right, seen, theirs):
    """Whether a wrong answer is the same as another up to where it also stops, or goes on in another dtype:
    two mistakes in one."""
    pieces, theirs, right = ([value for _, value in observed[0]] for observed in (seen, theirs, right))
    end = next((i for i, (a, b) in enumerate(zip(pieces, right)) if a.dtype != b.dtype), len(pieces))
    if not end < len(right) or len(theirs) < end:
        return False
    return all(map(close, pieces[:end], theirs)) and not all(map(close, pieces[:end], right))


def judge(exercise, answer):
    """The verdict on an answer that runs."""
    if not callable(answer):
        return Verdict(False, "shape", f"the answer is {describe(answer)}; needed is a function, {exercise.call}.")
    seen, right = observe(exercise, answer), expected(exercise, exercise.right)
    if alike(seen, right):
        if all(close(a, b) for (_, a), (_, b) in zip(seen[0], observe(exercise, answer, salt=1)[0])):
            equal = ", ".join(dict.fromkeys(what for what, _ in seen[0]))
            return Verdict(True, None, f"right. Equal to the reference: {equal}.")
    if seen[1] and seen[1][0] == "blank":
        return Verdict(False, *seen[1])
    for same in (alike, functools.partial(alike_so_far, right)):
        for mistake in exercise.mistakes:
            if same(seen, expected(exercise, mistake)):
                return Verdict(False, mistake.__name__, f"this equals a known mistake: {sentence(mistake)}.")
    kept, drawn = "something is kept from an earlier call", "is a dropout left on, or something drawn anew?"
    for salt, kind, reason in ((0, "kept", kept), (1, "random", drawn)):
        for (what, value), (_, other) in zip(seen[0], observe(exercise, answer, salt)[0]):
            if not close(value, other):
                changes = f"{what} changes from call to call on the same input: {reason}."
                return Verdict(False, kind, changes.replace("?.", "?"))
    for (what, value), (_, wanted) in zip(seen[0], right[0]):
        if not close(value, wanted):
            for (other, its), (_, its_right) in zip(seen[0], right[0]):
                if value.dim() and close(value, its_right) and close(its, wanted):
                    return Verdict(False, "swapped", f"{what} and {other} are in each other's place.")
            return Verdict(False, *difference(what, value, wanted))
    changes = "what it returned is right; but it changes something that it was given"
    return Verdict(False, *(seen[1] or ("in place", f"{changes}, and the calls that follow find it changed.")))


def sentence(mistake):
    """What a mistake's docstring tells the student: its first paragraph, on one line."""
    return " ".join(mistake.__doc__.split("\n\n")[0].split())


def difference(what, value, wanted):
    """(kind, sentence): how a piece differs from what it should be."""
    axes = re.search(r"\(([A-Za-z0-9·, ]+)\)", what)
    axes = [letter.strip() for letter in axes[1].split(",")] if axes else []
    if value.shape != wanted.shape:
        swapped = ""
        if sorted(value.shape) == sorted(wanted.shape) and value.dim() == wanted.dim():
            swapped = " The sizes are right and their order is not: look at your transposes."
        return "shape", f"{what} has shape {tuple(value.shape)}; needed is {tuple(wanted.shape)}.{swapped}"
    if value.dtype != wanted.dtype:
        return "dtype", f"{what} is {value.dtype}; needed is {wanted.dtype}, the dtype of the input."
    if not value.is_floating_point():
        return "value", f"{what} is {value.tolist()}; needed is {wanted.tolist()}."
    a, b = value.double(), wanted.double()
    if a.isnan().any():
        return "value", f"{what} holds NaN: is a whole row of the softmax masked, or something divided by 0?"
    if a.dim() == 0:
        return "value", f"{what} is {a:.3g}; needed is {b:.3g}."
    if close(-value, wanted):
        return "sign", f"{what} has the wrong sign, and is right otherwise."
    if close(1 - value, wanted):
        return "value", f"{what} is 1 minus what it should be."
    if not a.any():
        return "value", f"{what} is 0 everywhere; it should not be: does anything reach it?"
    if b.any():
        factor = (a * b).sum() / (b * b).sum()
        if (a - factor * b).abs().max() <= tolerance(value) * a.abs().max():
            times = f"{factor:.4g} times what it should be, everywhere"
            return "scale", f"{what} is {times}: look for a missing or a doubled factor."
    wrong = (a - b).abs() > tolerance(value) * b.abs().max()
    for axis in range(wrong.dim()):
        name = axes[axis] if len(axes) == wrong.dim() else f"axis {axis}"
        at = wrong.flatten() if wrong.dim() == 1 else wrong.transpose(0, axis).flatten(1).any(1)
        if not at.all() and wrong.any():
            bad = at.nonzero()[:, 0].tolist()
            hint = {
                "T": " It depends on the token: look at the mask, the positions or the cache.",
                "B": " It depends on the row: look at what differs between them.",
                "H": " It depends on the head: look at their order.",
            }.get(name, "")
            good = [i for i in range(len(at)) if i not in bad]
            return "place", f"{what} is right at {name} = {good[:8]} and wrong at {name} = {bad[:8]}.{hint}"
    most, largest = (float(x.abs().max()) for x in (a - b, b))
    far = f"{what} is wrong everywhere, by up to {most:.3g} where numbers go up to {largest:.3g}"
    return "value", f"{far}; neither a sign, nor one factor, nor a known mistake explains it."


# ── what probes share ───────────────────────────────────────────────────────────────────────────────────────────────


def filled(module, draw):
    """The module frozen and with every number drawn: matrices by N(0, 1/fan_in), vectors by 1 + 0.3 · N(0, 1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = draw(*parameter.shape)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * drawn)
    return module.requires_grad_(False)


def as_function(wrapper, *options, names):
    """A wrapper class as a function of the module it wraps, the inputs, and its own parameters by these names.

    The module is kept as long as the base stays the same, so that whatever it wrongly keeps shows in the next call.
    """
    made = {}

    def function(base, *arguments):
        first = len(arguments) - len(names)
        inputs, own = arguments[:first], dict(zip(names, arguments[first:]))
        if made.get("base") is not base:
            given = [option(**own) if callable(option) else option for option in options]
            made.update(base=base, module=wrapper(base, *given))
        return torch.func.functional_call(made["module"], own, inputs)

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


@contextlib.contextmanager
def planted(module, name, mistake):
    """Within the block the module's name stands for the mistake."""
    right = getattr(module, name)
    setattr(module, name, mistake)
    try:
        yield
    finally:
        setattr(module, name, right)
