"""How an answer is run: what its probe sees, and where it ends early or changes what it was given."""

import contextlib
import dataclasses
import dis
import inspect
import linecache
import re
import sys
import traceback

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .observing import End, Wrong, describe, floating


def observe(exercise, answer, salt=0):
    """Yields the Pieces of an answer, and an End where it ended early.

    salt: the state of torch's random numbers at each call, which a deterministic answer does not notice.
    """
    calls, generator = [], torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def begin(function, arguments):
        torch.default_generator.manual_seed(salt)  # torch.manual_seed asks every kind of GPU too, for milliseconds
        kept = [None if i in exercise.changes else state_of(x) for i, x in enumerate(arguments)]
        calls.append((function, arguments, kept))

    def end(result):
        function, arguments, before = calls[-1]
        if result is None or result is ...:
            if is_blank(function):
                raise NotImplementedError
            nothing = f"it returned nothing when called with {shapes(arguments)}: is a `return` missing?"
            raise Wrong("error", f"{nothing} Needed is {exercise.call}.")
        unchanged(function, arguments, before)

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
        yield End(*stopped(exercise, error, *(calls[-1][:2] if calls else (answer, ()))))


def stopped(exercise, error, function, arguments):
    """(mistake, sentence) of an answer that raised an error."""
    if isinstance(error, NotImplementedError) and re.search("^$|required .forward.", str(error)):
        return "blank", f"not written yet: it should be {exercise.call}. Fill in the dots, then run the cell again."
    if isinstance(error, RuntimeError) and re.search("in-?place operation", str(error)):
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


def unchanged(function, arguments, before):
    """Raises Wrong where an argument is no longer what it was before the call."""
    for i, (x, state) in enumerate(zip(arguments, before)):
        mistake, how = "in place", None
        if isinstance(x, nn.Module) and state:
            mistake, how = changed_module(x, *state)
        elif isinstance(x, tuple | list) and not all(same(a, b) for a, b in zip(x, state or ()) if floating(a)):
            how = "changes the tensors in {name} in place; make new ones"
        elif isinstance(x, torch.Tensor) and state is not None and not same(x.detach(), state):
            instead = "write {name} = {name} * … (or + …), a new tensor, instead of {name} *= …"
            how = f"changes its input {{name}} in place; {instead}"
        if how:
            raise Wrong(mistake, f"your function {how.replace('{name}', name_of(function, i))}.")


def changed_module(module, tensors, trained, training, own):
    """(mistake, what was done to {name}, the module), or ("", None)."""
    now, names = module.state_dict(), " and ".join
    if changed := [n for n, tensor in tensors.items() if n in now and not same(now[n], tensor)]:
        left = "multiply and add what flows, or make a new tensor, and leave the frozen weights as they are"
        return "in place", f"changes {{name}}'s own {names(changed)} in place; {left}"
    if changed := sorted(now.keys() ^ tensors.keys()):
        return "in place", f"changes what {{name}} is made of ({names(changed)}); leave it as it is"
    if changed := sorted(attributes(module) ^ own):
        if any(attribute.rpartition(".")[2] == "requires_grad" for attribute in changed):
            freeze = "where it is a mere attribute and freezes nothing: set that of each parameter"
            return "nothing_frozen", f"sets requires_grad on a module, {freeze}"
        return "in place", f"sets {names(changed[:3])} on {{name}}, which the next call meets: use a variable"
    if [p.requires_grad for p in module.parameters()] > trained and not hasattr(module, "may_train"):  # a probe's mark
        return "unfrozen", "makes {name}'s own weights trainable; the base stays frozen"
    if module.training != training:
        return "in place", f"calls {{name}}.{'train' if module.training else 'eval'}(); leave it"
    return "", None


def attributes(module):
    """The names of all that its parts hold."""
    return {f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in vars(part)}


def same(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


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


class Used(TorchFunctionMode):
    """Within the block: which of the named functions are called, torch's or any written in Python. Where none is
    named, nothing is looked at."""

    def __init__(self, functions):
        super().__init__()
        self.functions, self.found, self.outer = functions, [], sys.getprofile()
        self.written = {f.__code__: f for f in functions if hasattr(f, "__code__")}

    def note(self, function):
        if function in self.functions and function not in self.found:
            self.found.append(function)

    def __enter__(self):
        if self.written:
            sys.setprofile(lambda frame, event, _: event == "call" and self.note(self.written.get(frame.f_code)))
        return super().__enter__() if self.functions else self

    def __exit__(self, *error):
        if self.written:
            sys.setprofile(self.outer if callable(self.outer) else None)  # a profiler in C cannot be put back
        return super().__exit__(*error) if self.functions else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.note(function)
        return function(*args, **(kwargs or {}))
