"""What an answer does, piece by piece: a probe calls it on random inputs, every gate open, and yields what came of it.

A probe is a generator, probe(answer, draw), of Pieces. `calls` makes the usual one: it calls a function at several
sizes, in float32 and in bfloat16, and yields what it returns, the gradient of that for every input, what it changed in
passing, and how often it ran a module. What an answer makes of a class is probed by hand, with the same Pieces.
"""

import contextlib
import dataclasses
import dis
import inspect
import itertools
import linecache
import re
import sys
import traceback
from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Wrong(Exception):
    """What a probe raises when it cannot go on with an answer: Wrong(mistake's name, sentence)."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One thing seen.

    what: its name with its axes, "the output (B, T, D)".  value: a tensor.
    where: at which sizes and dtype, "" for the first.  kind: "value", "gradient" (of the input `of`), "fact", or
    "count", a fact that may be smaller.
    mistake, why: for a fact, the name of the mistake and the sentence to say where it is not as it should be.
    """

    what: str
    value: torch.Tensor
    where: str = ""
    kind: str = "value"
    of: str = ""
    mistake: str = ""
    why: str = ""

    @property
    def half(self):
        return "bfloat16" in self.where

    def __str__(self):
        return f"{self.what} {self.where}".rstrip()


@dataclasses.dataclass(frozen=True)
class End:
    """How an observation ended before its end: the mistake's name and the sentence."""

    mistake: str
    why: str

    @property
    def plain(self):
        """But for where it stood and what the call was given, which do not matter."""
        given = r", at `.*?`| The dtypes: .*| It was called.*| of tensor [ab] \(\d+\)"  # a * b or b * a
        return self.mistake, re.sub(given, "", self.why)


def fact(value, mistake, why, what=None):
    """A Piece that is a number, and what to say where it is another."""
    return Piece(what or why, torch.as_tensor(value), kind="fact", mistake=mistake, why=why)


@dataclasses.dataclass(frozen=True, eq=False)
class Exercise:
    """What an answer is held against.

    call:      how the answer is called and what it returns, for messages: "rms_norm(x, weight, eps) -> (B, T, D)";
               where it ends in "-> a whole number", nothing but a whole number will do.
    right:     the right answer.
    mistakes:  wrong ones (catalogue.py).
    probe:     see above.
    hints:     what to say where an answer is wrong at some places of an axis only, {"T": sentence}.
    forbidden: {function: sentence}, what an answer is to do without: torch's, or any written in Python.
    changes:   places of the arguments that the answer is there to change: the model of a training step.
    """

    call: str
    right: Callable
    mistakes: tuple
    probe: Callable
    hints: dict = dataclasses.field(default_factory=dict)
    forbidden: dict = dataclasses.field(default_factory=dict)
    changes: tuple = ()


# ── the usual probe ─────────────────────────────────────────────────────────────────────────────────────────────────


def calls(inputs, outputs, sizes, float32=(), once=(), half=True, gradient=True, then=None, again=None):
    """A probe of a function.

    inputs:  inputs(draw, **sizes) -> {parameter's name: value}, in the order of the call.
    outputs: the name of what it returns, or a tuple of names.
    sizes:   dicts, at least two; at the first everything that can differ does, at the last what can be 1 is 1.
    float32: names of the inputs that stay float32 where the others are bfloat16.
    once:    names of modules, "layer.mlp", each of whose rows is to be computed only once.
    half: whether to ask in bfloat16 too; "told" where the task says nothing of dtypes: what fails there is only said.
    gradient: whether to ask for gradients.
    then: then(answer, draw, given) yields more Pieces, of further calls on the same inputs.
    again: what differs, {} or more, where the first size comes again with other numbers, by which a state shows.
    """
    sizes = [sizes] if isinstance(sizes, dict) else list(sizes)

    def probe(answer, draw):
        for halved in (False, True) if half else (False,):
            repeated = [] if again is None or halved else [{**sizes[0], **again}]
            for i, size in enumerate(sizes + repeated):
                given = inputs(draw, **size)
                if halved:
                    given = {name: v if name in float32 else in_bfloat16(v) for name, v in given.items()}
                where = f"for {', '.join(f'{name} = {n}' for name, n in size.items())}" if i else ""
                where = "where the first size comes again" if i == len(sizes) else where
                where = f"in bfloat16 {where}".strip() if halved else where
                more = then(answer, draw, given) if then else ()
                for piece in itertools.chain(called(answer, given, outputs, once, gradient), more):
                    yield dataclasses.replace(piece, where=where)

    probe.inputs, probe.told = lambda draw: inputs(draw, **sizes[0]), half == "told"
    return probe


def in_bfloat16(value):
    if isinstance(value, nn.Module):
        return value.bfloat16()
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def called(answer, given, outputs, once=(), gradient=True):
    """Pieces of one call: what it returns, its gradients, and what it changed. given: {name: value}."""
    leaves = {n: v.requires_grad_(gradient) for n, v in given.items() if isinstance(v, torch.Tensor) and floating(v)}
    modules = {n: v for n, v in given.items() if isinstance(v, nn.Module)}
    own = {f"{n}'s {name}": p for n, module in modules.items() for name, p in module.named_parameters()}
    leaves.update({name: p for name, p in own.items() if p.requires_grad})  # of what trains
    # a copy behind each, so that what is changed in place is seen and not refused by torch
    handed = {n: v.clone() if n in leaves else v for n, v in given.items()}
    with counted(modules, once) as rows:
        result = answer(*handed.values())
    names = (outputs,) if isinstance(outputs, str) else outputs
    pieces = [Piece(outputs, result)] if isinstance(outputs, str) else [Piece(*pair) for pair in named(names, result)]
    yield from pieces
    for name, number in rows.items():
        why = f"it runs {name} twice on the same rows: keep what it returns, and use it again."
        yield Piece(f"how many rows {name} computes", torch.tensor(number), kind="count", mistake="run_twice", why=why)
    for piece in pieces if gradient else ():
        if floating(piece.value):
            short = re.sub(r" \([^)]*\)$", "", piece.what)
            of = f" of {short}" if len(pieces) > 1 else ""
            for name, found in zip(leaves, gradients(piece.value, *leaves.values())):
                yield Piece(f"the gradient{of} with respect to {name}", found, kind="gradient", of=name)


def floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def named(names, result):
    """Pairs (name, tensor) of an answer that returns several tensors."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise Wrong("shape", f"needed are {len(names)} tensors, {' and '.join(names)}; it returned {describe(result)}.")
    return list(zip(names, result))


def gradients(out, *inputs):
    """The gradient of a fixed weighting of `out` with respect to each input; zeros where none flows."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    weighting = torch.linspace(-1, 1.1, out.numel()).view(out.shape).to(out.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad((out * weighting).sum(), wanted, allow_unused=True, retain_graph=True)
    found = dict(zip(map(id, wanted), found))
    return [torch.zeros_like(x) if found.get(id(x)) is None else found[id(x)] for x in inputs]


@contextlib.contextmanager
def counted(modules, once):
    """Within the block the rows that each module of `once` computes are counted: {name: rows}."""
    rows, handles = dict.fromkeys(once, 0), []
    for name in once:
        first, _, rest = name.partition(".")

        def count(module, inputs, output, name=name):
            rows[name] += output.numel() // output.shape[-1]

        handles.append(modules[first].get_submodule(rest).register_forward_hook(count))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def frozen(module):
    """Pieces of a base that must not train."""
    number = sum(p.requires_grad for p in module.parameters())
    yield fact(number, "unfrozen", "the base's own weights train: they stay frozen, requires_grad_(False).")


def left_behind(module):
    """Pieces of a module: how many plain tensors `.to(device)` leaves where they are."""
    names = [n for part in module.modules() for n, v in vars(part).items() if isinstance(v, torch.Tensor)]
    why = f"{' and '.join(names)}: a plain tensor, which stays behind when the module moves to another device"
    yield fact(len(names), "left_behind", f"{why}; make it a parameter, register_buffer it, or do without it.")


# ── running an answer ───────────────────────────────────────────────────────────────────────────────────────────────


def observe(exercise, answer, salt=0):
    """Yields the Pieces of an answer, and an End where it ended early.

    salt: the state of torch's random numbers at each call, which a deterministic answer does not notice.
    """
    calls, generator = [], torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def begin(function, arguments):
        torch.manual_seed(salt)
        kept = [None if i in exercise.changes else state_of(x) for i, x in enumerate(arguments)]
        calls.append((function, arguments, kept))

    def end(result):
        function, arguments, before = calls[-1]
        if result is None or result is ...:
            if is_blank(function):
                raise NotImplementedError
            nothing = f"it returned nothing when called with {shapes(arguments)}: is a `return` missing?"
            raise Wrong("error", f"{nothing} Needed is {exercise.call}.")
        for i, (x, state) in enumerate(zip(arguments, before)):
            unchanged(name_of(function, i), x, state)

    def wrapped(*arguments, **names):
        begin(answer, arguments)
        result = answer(*arguments, **names)
        end(result)
        if exercise.call.endswith("-> a whole number"):
            result = whole(result)
        if isinstance(result, nn.Module):
            result.register_forward_pre_hook(lambda module, inputs: begin(module.forward, inputs))
            result.register_forward_hook(lambda module, inputs, result: end(result))
        return result

    wrapped.unseeded = answer  # for a probe that sets the random state itself
    try:
        for piece in exercise.probe(wrapped, draw):
            if not isinstance(piece.value, torch.Tensor):
                raise Wrong("shape", f"{piece} should be a tensor; it is {describe(piece.value)}.")
            yield dataclasses.replace(piece, value=piece.value.detach().clone())
    except Wrong as wrong:
        yield End(*wrong.args)
    except Exception as error:  # whatever a student's code may raise is part of the verdict
        unwritten = isinstance(error, NotImplementedError) and re.search("^$|required .forward.", str(error))
        if unwritten:
            wanted = f"not written yet: it should be {exercise.call}."
            yield End("blank", f"{wanted} Fill in the dots, then run the cell again.")
            return
        yield End(*stopped(exercise, error, *(calls[-1] if calls else (answer, (), ()))))


def stopped(exercise, error, function, arguments, before):
    """(kind, sentence) of an answer that raised an error."""
    if isinstance(error, RuntimeError) and re.search("in-?place operation", str(error)):
        for i, (x, state) in enumerate(zip(arguments, before)):
            with contextlib.suppress(RuntimeError):
                unchanged(name_of(function, i), x, state)
        needed = f"an assignment like `y += …` overwrites y, which the backward pass still needs{place_of(error)}"
        return "error", f"{needed}: write y = y + …, a new tensor."
    what = f"it stopped with {type(error).__name__}: {str(error).rstrip('.')}{place_of(error)}."
    given = f"It was called with {shapes(arguments) or 'nothing'}; needed is {exercise.call}."
    return "error", f"{what}{advice(error, function, arguments)} {given}"


def state_of(x):
    """What an argument holds, to be compared afterwards."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, tuple | list):
        return [state_of(part) for part in x]
    if isinstance(x, nn.Module):
        tensors = {name: tensor.detach().clone() for name, tensor in x.state_dict().items()}
        return tensors, [p.requires_grad for p in x.parameters()], x.training, attributes(x)
    return None


def unchanged(name, x, state):
    """Raises Wrong where an argument is no longer what it was."""
    if state is None:
        return
    if isinstance(x, torch.Tensor) and not same(x.detach(), state):
        instead = f"write {name} = {name} * … (or + …), a new tensor, instead of {name} *= …"
        raise Wrong("in place", f"your function changes its input {name} in place; {instead}.")
    if isinstance(x, tuple | list) and not all(same(part, old) for part, old in zip(x, state) if floating(part)):
        raise Wrong("in place", f"your function changes the tensors in {name} in place; make new ones.")
    if isinstance(x, nn.Module):
        tensors, trained, training, own = state
        now = x.state_dict()
        changed = [n for n, tensor in tensors.items() if n in now and not same(now[n], tensor)]
        if changed:
            left = "multiply and add what flows, or make a new tensor, and leave the frozen weights as they are"
            raise Wrong("in place", f"your function changes {name}'s own {' and '.join(changed)} in place; {left}.")
        if now.keys() != tensors.keys():
            names = " and ".join(sorted(now.keys() ^ tensors.keys()))
            raise Wrong("in place", f"your function changes what {name} is made of ({names}); leave it as it is.")
        if attributes(x) != own:
            names = " and ".join(sorted(attributes(x) ^ own))
            raise Wrong("in place", f"your function sets {names} on {name}, which the next call meets: use a variable.")
        if [p.requires_grad for p in x.parameters()] > trained and not hasattr(x, "may_train"):  # a probe's own mark
            raise Wrong("unfrozen", f"your function makes {name}'s own weights trainable; the base stays frozen.")
        if x.training != training:
            raise Wrong("in place", f"your function calls {name}.{'train' if x.training else 'eval'}(); leave it.")


def attributes(module):
    """The names of all that its parts hold."""
    return {f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in vars(part)}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def whole(result):
    """A whole number as a tensor, from whatever holds one."""
    if hasattr(result, "item") and getattr(result, "ndim", 0) == 0:  # of numpy, or a tensor of one number
        result = result.item()
    if isinstance(result, float) and not result.is_integer():
        raise Wrong("form", f"needed is a whole number; it returned {result!r}, which has a fraction.")
    if isinstance(result, bool) or not isinstance(result, int | float):
        raise Wrong("form", f"needed is a whole number, an int; it returned {result!r}, {describe(result)}.")
    return torch.tensor(int(result))


def is_blank(function):
    """Whether its body is a docstring, dots, `pass` or a bare `return`."""
    steps = {step.opname for step in dis.get_instructions(function)} if hasattr(function, "__code__") else set()
    idle = "RESUME COPY_FREE_VARS NOP LOAD_CONST LOAD_SMALL_INT POP_TOP RETURN_VALUE RETURN_CONST"
    return bool(steps) and steps <= set(idle.split())


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
        tensors = [next(x.parameters(), None) if isinstance(x, nn.Module) else x for x in arguments]
        dtypes = {name_of(function, i): x.dtype for i, x in enumerate(tensors) if isinstance(x, torch.Tensor)}
        return f" The dtypes: {', '.join(f'{name} {str(dtype)[6:]}' for name, dtype in dtypes.items())}."
    return ""


def place_of(error):
    """The last line of the student's own code on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not re.search(r"[/\\](minillama|torch)[/\\]", frame.filename)]
    line = linecache.getline(own[-1].filename, own[-1].lineno).strip() if own else ""
    return f", at `{line}`" if line else ""


def shapes(arguments):
    """What a call was given, short: tensors by their shapes, others by their values or types."""
    plain = [x if isinstance(x, int | float) else type(x).__name__ for x in arguments]
    return ", ".join(f"{tuple(x.shape) if isinstance(x, torch.Tensor) else y}" for x, y in zip(arguments, plain))


def describe(value):
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{'an' if name[0] == 'i' else 'a'} {name} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(describe, value))}"
    return f"{value!r}" if value is None else f"{'an' if type(value) is int else 'a'} {type(value).__name__}"


class Used(TorchFunctionMode):
    """Within the block: which of the named functions are called, torch's or any written in Python."""

    def __init__(self, functions):
        super().__init__()
        self.functions, self.found, self.outer = functions, [], None
        self.written = {f.__code__: f for f in functions if hasattr(f, "__code__")}

    def note(self, function):
        if function in self.functions and function not in self.found:
            self.found.append(function)

    def watch(self, frame, event, argument):
        if event == "call":
            self.note(self.written.get(frame.f_code))

    def __enter__(self):
        self.outer = sys.getprofile()
        if self.written:
            sys.setprofile(self.watch)
        return super().__enter__()

    def __exit__(self, *error):
        sys.setprofile(self.outer)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.note(function)
        return function(*args, **(kwargs or {}))


# ── what probes share ───────────────────────────────────────────────────────────────────────────────────────────────


def filled(module, draw):
    """The module frozen, in eval mode, every number drawn: matrices by N(0, 1/fan_in), vectors by 1 + 0.3 · N(0, 1)."""
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = draw(*parameter.shape)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * drawn)
    return module.requires_grad_(False).eval()


def as_function(build, names):
    """A wrapper class as a function of what it wraps, the inputs, and its own parameters by these names.

    build(base, **own) makes the module, given its parameters by name. It is kept as long as the base stays the same,
    so that whatever it wrongly keeps shows in the next call.
    """
    made = {}

    def function(base, *arguments):
        first = len(arguments) - len(names)
        inputs, own = arguments[:first], dict(zip(names, arguments[first:]))
        if made.get("base") is not base:
            made.update(base=base, module=build(base, **own))
        return torch.func.functional_call(made["module"], own, inputs)

    return function


def normal(numbers, mistake, what, deviation=1.0):
    """Pieces of numbers that should be N(0, deviation²), to a tenth; needs some thousand of them."""
    numbers = numbers.detach().double() / deviation
    mean, found = numbers.mean().item(), numbers.std().item()
    uniform = found > 0 and ((numbers - mean) / found).pow(4).mean().item() < 2.1  # 1.8 of uniform, 3 of normal ones
    shown = f"N(0, {deviation:g}²)" if deviation != 1 else "N(0, 1)"
    yield fact(
        uniform, f"uniform_{mistake}", f"{what}'s numbers are uniform, as torch.rand draws them; needed are normal "
        f"ones, {shown}, from torch.randn."
    )  # fmt: skip
    yield fact(
        abs(mean) < 0.1, f"mean_of_{mistake}", f"{what}'s mean is {mean * deviation:.2g}; needed is 0: {shown}, from "
        "torch.randn."
    )  # fmt: skip
    yield fact(
        abs(found - 1) < 0.1, f"deviation_of_{mistake}", f"{what}'s standard deviation is {found * deviation:.2g}; "
        f"needed is {deviation:g}: {shown}."
    )  # fmt: skip
    if numbers.dim() > 1:
        alike = len(torch.unique(numbers.round(decimals=9), dim=0)) < len(numbers)
        why = f"{what} has equal rows: equal rows get equal gradients and stay equal; draw each number by itself."
        yield fact(alike, f"equal_rows_of_{mistake}", why)


@contextlib.contextmanager
def planted(module, name, mistake):
    """Within the block the module's name stands for the mistake."""
    right = getattr(module, name)
    setattr(module, name, mistake)
    try:
        yield
    finally:
        setattr(module, name, right)
