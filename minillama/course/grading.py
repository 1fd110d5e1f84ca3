"""Marks a folder of students' notebooks: `python -m minillama grade FOLDER`.

Nothing of a student's code runs in this process. A second one, marking.py, holds the library and no notebook, and forks
for each exercise of each student, with limits on time and memory. So an answer that hangs, exits, fills the memory or
prints without end costs that student that exercise and nobody else anything. `check` is not taken from the notebook:
calls check("name", answer) are read from its source, and `answer` is judged after the rest of the cell has run. Where
Linux's `unshare` works there is no network, no process of others can be seen, and package and folder are read-only;
elsewhere Python's sockets are shut.
"""

import collections
import contextlib
import csv
import html
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ..checkpoints.files import FileError, replacing
from . import marking
from .exercises import exercises

COLUMNS = ("student", "exercise", "passed", "mistake", "message")
LIMITS = dict(seconds=60, memory=4)  # of one exercise: of computing, and gigabytes beyond what the library takes
LARGEST = 50e6  # bytes of a notebook that is opened


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
        path: dict.fromkeys(name for _, name, _ in marking.calls_of(cells))
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


def marked(work, seconds, memory, folder):
    """Yields the verdict of each piece of work, {"cells", "name"}; a worker that an answer has ended is begun anew."""
    root = Path(__file__).parent.parent.parent
    command = [*apart([root, sys.prefix, sys.base_prefix, folder]), sys.executable, "-m", marking.__name__]
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
                    ready, _, _ = select.select([worker.stdout], [], [], 300 + marking.PATIENCE * seconds)
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
