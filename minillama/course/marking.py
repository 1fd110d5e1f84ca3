"""Marks one answer after the other, each in a fork of its own with limits on time and memory: what grading.py starts
as `python -m minillama.course.marking`, apart from the network, from other processes and from every notebook.

An answer that hangs, exits, fills the memory or prints without end costs its exercise and nothing else, and one that
changes the library or the checker is found out.
"""

import ast
import builtins
import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from .exercises import Question, exercise, exercises, judging, predictions

PATIENCE = 5  # an answer may wait so many times as long as it may compute


def main():
    """Reads work from standard input, a line of JSON each; marks it in a fork; writes its verdict, a line of JSON."""
    work, out = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what a student prints goes nowhere
        os.dup2(nothing, stream)
    limits = json.loads(work.readline())
    for line in work:
        cells, name = json.loads(line).values()
        asked = exercise(name)  # computed here, where there is never any student's code
        asked.outcome if isinstance(asked, Question) else judging.expected(asked)
        verdict = in_a_fork(lambda cells=cells, name=name: mark(cells, name), work.fileno(), out, **limits)
        os.write(out, (json.dumps(verdict) + "\n").encode())


def in_a_fork(task, *closed, seconds, memory):
    """What task() returns, run in a fork with limits and without these files; or (False, "stopped", why)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        for file in (reading, *closed):
            os.close(file)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc/self/statm").exists() else 8e9
        limits = {"RLIMIT_AS": int(now + memory * 1e9), "RLIMIT_FSIZE": 50_000_000, "RLIMIT_CORE": 0}
        limits |= {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_NPROC": 64 if os.getppid() == 1 else 4000}
        for limit, value in limits.items():
            with contextlib.suppress(ValueError, OSError, AttributeError):
                resource.setrlimit(getattr(resource, limit), (value, value))
        if os.environ.get("MINILLAMA_SHUT"):
            socket.socket = socket.create_connection = socket.getaddrinfo = None
        try:
            verdict = task()
        except MemoryError:
            verdict = False, "stopped", f"it asked for more than {memory:g} GB of memory"
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            verdict = False, "stopped", f"it ended in {type(error).__name__}: {str(error)[:300]}"
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(verdict)[:60_000].encode())
        os._exit(0)
    os.close(writing)
    os.set_blocking(reading, False)
    answer, status, start = b"", None, time.monotonic()
    while status is None and time.monotonic() - start < PATIENCE * seconds:
        with contextlib.suppress(BlockingIOError):
            answer += os.read(reading, 65536) if len(answer) < 65536 else b""
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.005)
    with contextlib.suppress(BlockingIOError):
        answer += os.read(reading, 65536)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if os.getpid() == 1:  # of its own process namespace: whatever the answer has begun ends here
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    if status is None:
        _, status = os.waitpid(child, 0)
    os.close(reading)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) and not answer:
        return False, "stopped", f"it was not done after {seconds:g} seconds of computing"
    try:
        passed, mistake, message = json.loads(answer)
        return bool(passed), mistake and str(mistake), str(message)
    except (ValueError, TypeError):
        ended = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"with code {os.WEXITSTATUS(status)}"
        return False, "stopped", f"it ended its process {ended} before there was a verdict"


def tree_of(source):
    """A cell as a syntax tree, without IPython's magics; None where it is no Python."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def calls_of(cells):
    """(cell's number, exercise's name, the answer's expression or None where the cell is no Python) of every call of
    check in the notebook."""
    for i, source in enumerate(cells):
        tree = tree_of(source)
        if tree is None:
            yield from ((i, name, None) for name in re.findall(r"^check\(\s*[\"'](\w+)[\"']", source, re.MULTILINE))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "check" and len(node.args) == 2:
                name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                if name in exercises():
                    yield i, name, node.args[1]


def mark(cells, name):
    """The verdict on the last answer that a notebook gives to an exercise, a blank one only where there is no other."""
    verdict = False, "missing", "no answer"
    for i, asked, expression in calls_of(cells):
        if asked != name:
            continue
        found = marked_cell(cells, i, name, expression)
        if found[1] != "blank" or verdict[1] in ("missing", "blank"):
            verdict = found
    return verdict


def marked_cell(cells, i, name, expression):
    """The verdict on one call of check: the cell runs after the definitions of those before it, and where that leaves
    a name undefined, after everything before it."""
    if expression is None:
        return False, "error", "the cell is no Python: a SyntaxError"
    for whole in (False, True):
        space, sealed = {"__name__": "__main__"}, seal()  # what is changed by an earlier cell counts as well
        try:
            for source in cells[:i]:
                run(source, space, whole)
            run(cells[i], space, True, name)
            answer = eval(compile(ast.Expression(expression), "<answer>", "eval"), space)
        except Exception as error:
            if isinstance(error, NameError) and not whole:
                continue
            return False, "error", f"the cell stopped with {type(error).__name__}: {str(error)[:300]}"
        passed, mistake, message = judged(name, answer)
        if "NameError" in message and not passed and not whole:
            continue
        if broken(sealed):
            return False, "tampered", "the cell changes the library or the checker"
        return passed, mistake, message


def judged(name, answer):
    asked = exercise(name)
    if isinstance(asked, Question):
        return predictions.judge_prediction(asked, answer, [])
    return judging.judge(asked, answer)


def run(source, space, whole, name=None):
    """Runs a cell without its calls of check; where not `whole`, only what it imports, defines and names as constants.
    An error ends the statement, not the notebook, but in the exercise's own cell (`name`)."""
    tree = tree_of(source)
    for statement in tree.body if tree else ():
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        if any(getattr(call.func, "id", None) == "check" for call in calls) and not defines(statement):
            continue
        if whole or defines(statement) or is_constant(statement):
            try:
                exec(compile(ast.Module([statement], []), "<cell>", "exec"), space)
            except Exception:
                if name is not None:
                    raise


def defines(statement):
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def is_constant(statement):
    with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        ast.literal_eval(statement.value)
        return isinstance(statement, ast.Assign)
    return False


def seal():
    """Every name of the library, the checker and torch, and what it stands for: what an answer must leave as it is."""
    places = {name: module for name, module in sys.modules.items() if name.startswith("minillama")}
    places |= {f"{name}.{own}": thing for name, module in places.items() for own, thing in classes_of(module)}
    places |= {"torch": torch, "functional": torch.nn.functional, "Tensor": torch.Tensor, "builtins": builtins}
    return {
        (name, own): (id(thing), id(getattr(thing, "__code__", None)))
        for name, place in places.items() for own, thing in vars(place).items()
    }  # fmt: skip


def classes_of(module):
    return [(name, thing) for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__
            and isinstance(thing, type)]  # fmt: skip


def broken(sealed):
    """Whether a name stands for something else than when it was sealed; new ones may have come."""
    now = seal()
    return any(now.get(name) != thing for name, thing in sealed.items())


if __name__ == "__main__":
    main()
