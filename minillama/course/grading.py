"""Marks a folder of students' notebooks: `python -m minillama grade FOLDER`.

Nothing of a student's code runs in this process. A second one (`python -m minillama.course.grading`, this file's other
half) holds the library and no notebook, and forks for each exercise of each student, with limits on time and memory. So
an answer that hangs, exits, fills the memory or prints without end costs that student that exercise and nobody else
anything. `check` is not taken from the notebook: calls check("name", answer) are read from its source, and `answer` is
judged after the rest of the cell has run. Where Linux's `unshare` works there is no network, no process of others can
be seen, and package and folder are read-only; elsewhere Python's sockets are shut.
"""

import ast
import builtins
import collections
import contextlib
import csv
import html
import io
import json
import math
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..checkpoints.files import FileError, replacing
from .exercises import Question, exercise, exercises, judging, predictions

COLUMNS = ("student", "exercise", "passed", "mistake", "message")
LIMITS = dict(seconds=60, memory=4)  # of one exercise: of computing, and gigabytes beyond what the library takes
PATIENCE = 5  # an answer may wait so many times as long as it may compute
LARGEST = 50e6  # bytes of a notebook that is opened


# ── the folder, in the process that runs no student's code ────────────────────────────────────────────────────────────


def grade(folder, seconds=LIMITS["seconds"], memory=LIMITS["memory"], progress=lambda verdicts, total: verdicts):
    """Rows (dicts of COLUMNS) for every exercise of every notebook in a folder, subfolders too.

    A student is named by the notebook's path in the folder. Every exercise of a lesson counts of which a notebook
    answers at least one: those it lacks are "missing".
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    if not paths:
        raise FileError(f"{folder} holds no notebook: name the folder into which the students' .ipynb files were put")
    read = {path: read_cells(path) for path in paths}  # all of them, before any of their code runs
    lessons = collections.defaultdict(list)
    for name in exercises():
        lessons[lesson_of(name)].append(name)
    called = {
        path: dict.fromkeys(name for _, name, _ in calls_of(cells))
        for path, cells in read.items()
        if type(cells) is list
    }
    tasks = [(path, name) for path in called for name in called[path]]
    work = [{"cells": read[path], "name": name} for path, name in tasks]
    verdicts = dict(zip(tasks, progress(marked(work, seconds, memory, folder), len(tasks))))
    rows = []
    for path in paths:
        student = str(path.relative_to(folder).with_suffix(""))
        if path not in called:
            rows.append(dict(zip(COLUMNS, (student, "", False, "unreadable", read[path]))))
            continue
        wanted = dict.fromkeys(called[path])
        for names in lessons.values():
            wanted.update(dict.fromkeys(names) if called[path].keys() & set(names) else {})
        for name in wanted:
            absent = (False, "missing", f'no cell calls check("{name}", …)')
            rows.append(dict(zip(COLUMNS, (student, name, *verdicts.get((path, name), absent)))))
    return rows


def lesson_of(name):
    """The topic that an exercise belongs to, by the module in which it is defined."""
    from . import exercises as package

    for topic in package.TOPICS:
        if name in sys.modules[f"{package.__name__}.{topic}"].EXERCISES:
            return topic


def read_cells(path):
    """The sources of a notebook's code cells; a sentence where it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return f"not a file of at most {LARGEST / 1e6:.0f} MB"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        return [source if isinstance(source, str) else "".join(source) for source in sources]
    except RecursionError:
        return "not a notebook: its JSON is nested too deep"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"not a notebook: {type(error).__name__}: {error}"


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


def marked(work, seconds, memory, folder):
    """Yields the verdict of each piece of work, {"cells", "name"}; a worker that an answer has ended is begun anew."""
    root = Path(__file__).parent.parent.parent
    command = [*apart([root, sys.prefix, sys.base_prefix, folder]), sys.executable, "-m", __name__]
    done = 0
    while done < len(work):
        with tempfile.TemporaryDirectory() as home:
            environment = {**os.environ, "HOME": home, "OMP_NUM_THREADS": "1", "MINILLAMA_SHUT": "" if apart() else "1"}
            environment["PYTHONPATH"] = f"{root}{os.pathsep}{environment.get('PYTHONPATH', '')}".rstrip(os.pathsep)
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=home,
                env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                worker.stdin.write(json.dumps({"seconds": seconds, "memory": memory}).encode() + b"\n")
                while done < len(work):
                    worker.stdin.write(json.dumps(work[done]).encode() + b"\n")
                    worker.stdin.flush()
                    ready, _, _ = select.select([worker.stdout], [], [], 300 + PATIENCE * seconds)
                    verdict = json.loads(worker.stdout.readline(100_000)) if ready else None
                    yield tuple(verdict or (False, "stopped", "it stopped the process that marks it"))
                    done += 1
                    if not ready:
                        break
            except (OSError, ValueError):
                yield False, "stopped", "it ended the process that marks it"
                done += 1
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.stdin = None
                worker.wait()


def apart(read_only=None):
    """The words before a command that take its network, its sight of other processes and its right to write to these
    folders; without an argument, whether that works here."""
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--mount", "--fork", "--kill-child"]
    if read_only is None:
        with contextlib.suppress(OSError):
            return subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
        return False
    if not apart():
        return []
    lock = 'while [ "$1" != -- ]; do mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"; shift; done; shift'
    folders = [str(Path(folder).resolve()) for folder in dict.fromkeys(map(str, read_only))]
    return [*unshare, "sh", "-c", f'{lock}; exec "$@"', "sh", *folders, "--"]


# ── the other half: one notebook, in a process of its own ─────────────────────────────────────────────────────────────


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


# ── what comes of it ──────────────────────────────────────────────────────────────────────────────────────────────────


def write_csv(rows, path):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        # a cell that begins like a formula would be one in a spreadsheet
        writer.writerows(
            {k: f"'{v}" if str(v).startswith(("=", "+", "-", "@")) else v for k, v in row.items()} for row in rows
        )


def most_wrong(rows):
    """Per exercise: (name, answered, passed, [(mistake, how many students, one of its messages), …] most first)."""
    for name in dict.fromkeys(row["exercise"] for row in rows if row["exercise"]):
        own = [row for row in rows if row["exercise"] == name]
        mistakes = collections.Counter(row["mistake"] for row in own if not row["passed"])
        message = {row["mistake"]: row["message"] for row in own}
        listed = [(mistake, count, message[mistake]) for mistake, count in mistakes.most_common()]
        yield name, len(own), sum(row["passed"] for row in own), listed


def write_page(rows, path):
    """One page for the teacher: what the class got wrong most, by mistake, and who has how much."""
    text = lambda value: html.escape(str(value))  # noqa: E731
    students = dict.fromkeys(row["student"] for row in rows)
    parts = [
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Grades</title>",
        "<style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}",
        "table{border-collapse:collapse}"
        "td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}</style>",
        f"<h1>{len(students)} notebooks</h1><h2>By exercise, hardest first</h2><table>",
        "<tr><th>exercise<th>right<th>mistakes",
    ]
    for name, answered, passed, mistakes in sorted(most_wrong(rows), key=lambda row: row[2] / row[1]):
        listed = "".join(f"<li>{count} × <b>{text(m)}</b>: {text(message)}" for m, count, message in mistakes)
        parts.append(f"<tr><td>{text(name)}<td>{passed} of {answered}<td><ul>{listed}</ul>")
    parts.append("</table><h2>By student</h2><table><tr><th>notebook<th>right<th>not right")
    for student in students:
        own = [row for row in rows if row["student"] == student]
        wrong = ", ".join(f"{row['exercise']} ({row['mistake']})" for row in own if not row["passed"])
        parts.append(f"<tr><td>{text(student)}<td>{sum(row['passed'] for row in own)} of {len(own)}<td>{text(wrong)}")
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*parts, "</table>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
