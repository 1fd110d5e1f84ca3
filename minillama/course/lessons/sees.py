"""Lesson 10: adaptations to pictures, from several seeds, which head looks at which digit, and a pad to draw on.

`python -m minillama.course.lessons.sees docs/handwriting.jsonl` makes the runs that the lesson only reads, a line each;
begun again it goes on with those that are missing.
"""

import copy
import functools
import json
import sys
from pathlib import Path

import torch

from ... import data, vision
from ...adapters import adapt, adapter_parameters, gates
from ...adapters.seeing import shown_by
from ...train import exact_match, train
from .runs import DRAWING, Adaptation, base, one_thread_each

ROOT = Path(__file__).parents[3]
RATE = 0.1  # of all runs
# (task, way, steps, gate at the start): what the stored runs compare, each from three seeds
STORED = (
    ("handwriting", "places", 400, 0.0), ("handwriting", "places", 400, 1.0), ("calendar", "global", 400, 0.0),
    ("calendar", "global", 400, 1.0), ("handwriting", "global", 400, 0.0), ("handwriting", "global", 2000, 0.0),
)  # fmt: skip


@functools.cache
def encoder(task):
    return vision.load_encoder(task)


@functools.cache
def unseen(task, count=500):
    """(rows (prompt, answer, features), pictures) of test days, no glyph of which stands in a training picture."""
    rows, pictures = vision.examples(task, data.split_dates()[1], count, False, 1)
    return vision.see(encoder(task), rows, pictures), pictures


def sighted(task, way, *, steps=400, batch_size=32, learning_rate=RATE, seed=0, gate=0.0, test_dates=500):
    """An Adaptation of dates-llama to the pictures of a task. gate: where tanh's argument begins."""
    model, tokenizer = copy.deepcopy(base(dtype=torch.float32)[0]), base(dtype=torch.float32)[1]
    shape = vision.TASKS[task]
    with DRAWING, torch.no_grad():
        torch.manual_seed(seed)
        adapt(model, "image_prompt", way=way, tokens=shape.tiles, features=shape.features, encoder=task)
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("gate"):
                parameter.fill_(gate)
    rows = vision.examples(task, data.split_dates()[0], steps * batch_size, True, seed)
    how = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, watch=gates, progress=False)
    around = shown_by(model)
    history = train(model, tokenizer, vision.see(encoder(task), *rows), around=around, **how)
    match = exact_match(model, tokenizer, unseen(task, test_dates)[0], around=around)
    return Adaptation(model, history, match, sum(p.numel() for p in adapter_parameters(model).values()))


def side_by_side_sighted(*settings):
    """`sighted` of each (task, way, steps), on one thread each: a list."""
    for task, *_ in settings:
        unseen(task)  # before there are threads
    with one_thread_each() as pool:
        return list(pool.map(lambda s: sighted(s[0], s[1], steps=s[2]), settings))


def stored_runs(path=ROOT / "docs/handwriting.jsonl"):
    """{(task, way, steps, gate): [one run for each seed]} of the runs made before."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found.setdefault((run["task"], run["way"], run["steps"], run["gate"]), []).append(run)
    return found


def main(path):
    path = Path(path)
    done = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {(r["task"], r["way"], r["steps"], r["gate"], r["seed"]) for r in map(json.loads, done)}
    for seed in range(3):
        for setting in STORED:
            if (*setting, seed) in done:
                continue
            task, way, steps, gate = setting
            run = sighted(task, way, steps=steps, gate=gate, seed=seed)
            losses = [round(record["loss"], 4) for record in run.history[9::10]]
            line = dict(task=task, way=way, steps=steps, gate=gate, seed=seed, parameters=run.parameters)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | dict(match=run.match, losses=losses)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
