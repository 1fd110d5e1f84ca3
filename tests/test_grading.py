"""Marking a class: honest notebooks get their marks, hostile ones cost nobody else anything."""

import csv
import json
import os
import socket

import pytest

from minillama.__main__ import main
from minillama.course import grading, marking
from minillama.course.exercises import lora as topic

RIGHT = """
import torch
from minillama.course import check
def lora_merge(linear, A, B, alpha):
    return (linear.weight + alpha / len(A) * B @ A).to(linear.weight.dtype)
check("lora_merge", lora_merge)
"""
WRONG = RIGHT.replace("alpha / len(A)", "1.0")
QUESTION = 'from minillama.course import check\nverdict = check("lora_moves_first", {"B"})'
HOSTILE = {
    "hangs": "while True: pass",
    "hangs in its answer": "def lora_merge(*_):\n    while True: pass\ncheck('lora_merge', lora_merge)",
    "exits": "import sys\nsys.exit(0)",
    "leaves without a word": "import os\nos._exit(0)",
    "prints without end": "while True: print('x' * 1_000_000)",
    "fills the memory": "x = bytearray(200_000_000_000)",
    "fills the memory slowly": "x = []\nwhile True: x.append(bytearray(100_000_000))",
    "fills the disk": "with open('big', 'wb') as file:\n    while True: file.write(bytes(10_000_000))",
    "overwrites check": "def check(name, answer): print('passed')\ncheck('lora_merge', None)",
    "overwrites the judge": "from minillama.course.exercises import judging\n"
    "judging.judge = lambda *_: (True, None, 'right')\ncheck('lora_merge', print)",
    "overwrites the judge's code": "from minillama.course.exercises import judging\n"
    "judging.judge.__code__ = (lambda exercise, answer: (True, None, 'right')).__code__\ncheck('lora_merge', print)",
    "makes all things equal": "import torch\ntorch.equal = lambda *_: True\ntorch.Tensor.__le__ = lambda *_: True\n"
    "def lora_merge(linear, A, B, alpha): return linear.weight * 0\ncheck('lora_merge', lora_merge)",
    "kills everybody": "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "recurses": "def f(): return f()\nimport sys; sys.setrecursionlimit(10**9); f()",
    "removes the others": "import glob, os\nfor f in glob.glob(FOLDER + '/*'): os.remove(f)",
    "forks": "import os\nfor _ in range(50): os.fork()",
    "raises what no one expects": "class E(BaseException): pass\nraise E",
}


def write(path, *cells):
    cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []} for source in cells]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


@pytest.mark.slow
def test_hostile_notebooks_cost_nobody_else_anything(tmp_path, capsys):
    folder, out = tmp_path / "class", tmp_path / "out"
    folder.mkdir()
    write(folder / "ada.ipynb", "import torch\nK = 10", RIGHT, QUESTION)
    write(folder / "ben.ipynb", "%matplotlib inline\n!ls", WRONG, QUESTION.replace("B", "A"))
    write(folder / "cleo.ipynb", RIGHT.replace("1.0", "2"), "check('lora_merge', ...)  # a blank left below")
    for name, source in HOSTILE.items():
        cell = f"from minillama.course import check\nFOLDER = {str(folder)!r}\n{source}"
        write(
            folder / f"x {name}.ipynb", cell if "check(" in source else f"{cell}\ncheck('lora_merge', None)", QUESTION
        )
    (folder / "x cut.ipynb").write_text('{"cells": [', encoding="utf-8")
    (folder / "x deep.ipynb").write_text("[" * 100_000, encoding="utf-8")
    assert main(["grade", str(folder), "--out", str(out), "--seconds", "2", "--memory", "2"]) == 0
    with open(out / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {(row["student"], row["exercise"]): row for row in csv.DictReader(file)}
    got = {who: rows[who, "lora_merge"]["passed"] for who in ("ada", "ben", "cleo")}
    assert got == {"ada": "True", "ben": "False", "cleo": "True"}
    assert rows["ben", "lora_merge"]["mistake"] == "MergeUnscaled"
    assert rows["ada", "lora_moves_first"]["passed"] == "True" and rows["ben", "lora_moves_first"]["passed"] == "False"
    assert rows["cleo", "lora_moves_first"]["mistake"] == "missing"
    for name in HOSTILE:
        row = rows[f"x {name}", "lora_merge"]
        assert row["passed"] == "False", row
        # what comes in a cell after it is marked all the same
        assert rows[f"x {name}", "lora_moves_first"]["passed"] == "True", name
    assert rows["x hangs", "lora_merge"]["message"] == "it was not done after 2 seconds of computing"
    assert rows["x exits", "lora_merge"]["message"].startswith("it ended in SystemExit")
    assert rows["x overwrites the judge's code", "lora_merge"]["mistake"] == "tampered"
    assert rows["x cut", ""]["mistake"] == rows["x deep", ""]["mistake"] == "unreadable"
    assert {path.name for path in folder.iterdir()} >= {"ada.ipynb", "ben.ipynb", "cleo.ipynb"}
    page = (out / "grades.html").read_text(encoding="utf-8")
    assert "MergeUnscaled" in page and "<h2>By student</h2>" in page
    assert "lora_merge" in capsys.readouterr().out


@pytest.mark.slow
def test_there_is_no_network(tmp_path):
    """Not even to this machine: the answer would be right if the connection were made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        write(tmp_path / "caller.ipynb", f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n{RIGHT}")
        (row,) = [row for row in grading.grade(tmp_path, seconds=20) if row["exercise"] == "lora_merge"]
    assert not row["passed"] and row["mistake"] == "error", row


@pytest.mark.slow
def test_an_answer_may_use_what_earlier_cells_computed(tmp_path):
    answer = RIGHT.replace("alpha / len", "factor * alpha / len")
    write(tmp_path / "a.ipynb", "import torch\nfactor = torch.ones(1).item()", answer)
    (row,) = [row for row in grading.grade(tmp_path) if row["exercise"] == "lora_merge"]
    assert row["passed"], row


def test_calls_are_read_from_the_source():
    cells = [
        "%time x = 1", 'check("lora_merge", f); check("nothing_known", f)', 'if 1:\n    v = check("lora_start", g)',
        'check("lora_fused",\n  broken(',
    ]  # fmt: skip
    assert [(i, name, answer is None) for i, name, answer in marking.calls_of(cells)] == [
        (1, "lora_merge", False), (2, "lora_start", False), (3, "lora_fused", True),
    ]  # fmt: skip
    assert grading.lesson_of("lora_merge") == "lora" and "lora_merge" in topic.EXERCISES


def test_what_looks_like_a_formula_is_none_in_a_spreadsheet(tmp_path):
    row = dict(zip(grading.COLUMNS, ("=cmd()", "lora_merge", False, "value", "-1 <b>")))
    grading.write_csv([row], tmp_path / "grades.csv")
    grading.write_page([row], tmp_path / "grades.html")
    assert (
        "'=cmd()" in (tmp_path / "grades.csv").read_text()
        and "<b>" not in (tmp_path / "grades.html").read_text().split("value</b>")[1].split("<ul>")[0]
    )


def test_a_folder_without_notebooks_is_a_sentence(tmp_path, capsys):
    assert main(["grade", str(tmp_path)]) == 2
    assert "holds no notebook" in capsys.readouterr().err
    assert not os.path.exists("grades")
