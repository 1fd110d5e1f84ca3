"""Lesson 10: adaptations to pictures, from several seeds, which head looks at which digit, and a pad to draw on.

`python -m minillama.course.lessons.sees docs/handwriting.jsonl` makes the runs that the lesson only reads, a line each;
begun again it goes on with those that are missing.
"""

import base64
import contextlib
import copy
import datetime
import functools
import html
import io
import json
import random
import sys
from pathlib import Path

import torch
from PIL import Image

from ... import data, vision
from ...adapters import adapt, adapter_parameters, gates
from ...adapters.seeing import seeing, shown_by
from ...checkpoints.files import FileError
from ...checkpoints.images import picture_of
from ...train import answers, exact_match, train
from .. import plots
from .looking import attention_inputs
from .runs import DRAWING, Adaptation, base, one_thread_each

# A canvas whose strokes reach the kernel as a PNG in a hidden text field; it draws its fields once a pen comes near.
CANVAS = """<canvas width="640" height="96" style="background: white; border: 1px solid #888; touch-action: none;
background-image: repeating-linear-gradient(90deg, #ddd 0 1px, transparent 1px 80px)"
onpointerdown="const c = this.getContext('2d'); c.lineWidth = 9; c.lineCap = c.lineJoin = 'round';
this.setPointerCapture(event.pointerId); this.pen = true; c.beginPath(); c.moveTo(event.offsetX, event.offsetY)"
onpointermove="if (this.pen) { const c = this.getContext('2d'); c.lineTo(event.offsetX, event.offsetY); c.stroke() }"
onpointerup="this.pen = false; const flat = document.createElement('canvas'); flat.width = 640; flat.height = 96;
const f = flat.getContext('2d'); f.fillStyle = 'white'; f.fillRect(0, 0, 640, 96); f.drawImage(this, 0, 0);
const field = this.closest('.minillama-pad').querySelector('input'); field.value = flat.toDataURL();
field.dispatchEvent(new Event('input', {bubbles: true})); field.dispatchEvent(new Event('change', {bubbles: true}))">
</canvas>"""
ROOT = Path(__file__).parents[3]
RATE = 0.1  # of all runs
NAMES = ("task", "way", "steps", "gate", "spread")
# (task, way, steps, gate at the start, spread of the prompts): what the stored runs compare, each from three seeds, and
# what is chosen from five
STORED = (
    ("handwriting", "places", 400, 0.0, 0.3), ("handwriting", "places", 400, 1.0, 0.3),
    ("handwriting", "global", 2000, 0.0, 0.3), ("handwriting", "global", 400, 0.0, 0.3),
    ("validation", "places", 400, 0.0, 0.3), ("validation", "places", 400, 0.0, 1.0),
    ("validation", "places", 400, 0.0, 0.1), ("handwriting", "places", 400, 0.0, 1.0),
    ("handwriting", "places", 400, 1.0, 1.0), ("calendar", "global", 400, 0.0, 0.3),
    ("calendar", "places", 400, 0.0, 0.3), ("handwriting", "places", 400, 0.0, 0.1),
    ("calendar", "global", 400, 1.0, 0.3),
)  # fmt: skip


@functools.cache
def encoder(task):
    return vision.load_encoder(task)


@functools.cache
def unseen(task, count=500):
    """(rows (prompt, answer, features), pictures) of test days, no glyph of which stands in a training picture."""
    rows, pictures = vision.examples(task, data.split_dates()[1], count, False, 1)
    return vision.see(encoder(task), rows, pictures), pictures


def sighted(task, way, *, steps=400, batch_size=32, seed=0, test_dates=500, **options):
    """An Adaptation of dates-llama to the pictures of a task, measured on its unseen ones."""
    rows = vision.examples(task, data.split_dates()[0], steps * batch_size, True, seed)
    rows, tests = vision.see(encoder(task), *rows), unseen(task, test_dates)[0]
    return bridged(task, way, rows, tests, steps=steps, batch_size=batch_size, seed=seed, **options)


def bridged(task, way, rows, tests, *, steps, batch_size, seed, learning_rate=RATE, gate=0.0, spread=0.3):
    """An Adaptation of dates-llama to rows (prompt, answer, features). gate: where tanh's argument begins."""
    model, tokenizer = copy.deepcopy(base(dtype=torch.float32)[0]), base(dtype=torch.float32)[1]
    shape = vision.TASKS[task]
    with DRAWING, torch.no_grad():
        torch.manual_seed(seed)
        adapt(model, "image_prompt", way=way, tokens=shape.tiles, features=shape.features, spread=spread, encoder=task)
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("gate"):
                parameter.fill_(gate)
    how = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, watch=gates, progress=False)
    around = shown_by(model)
    history = train(model, tokenizer, rows, around=around, **how)
    match = exact_match(model, tokenizer, tests, around=around)
    return Adaptation(model, history, match, sum(p.numel() for p in adapter_parameters(model).values()))


@functools.cache
def held_out():
    """(encoder, days and digits to train with, days and digits to validate with): the training part of handwriting
    split once more, for choices that no test date may decide. The encoder has seen only what is trained with."""
    days, glyphs = data.split_dates()[0], vision.digits(True)
    cut, mine = len(days) // 10, vision.digits(True, of=glyphs)
    eye = vision.train_encoder("handwriting", tiles=mine)
    return eye, (days[cut:], mine), (days[:cut], vision.digits(False, of=glyphs))


def validated(way, *, steps=400, batch_size=32, seed=0, **options):
    """An Adaptation as `sighted` makes it, trained on a part of the training days and digits, measured on the rest."""
    eye, mine, theirs = held_out()

    def drawn(days, glyphs, count, seed):
        chosen = random.Random(seed).choices(days, k=count)
        rows = [(vision.TASKS["handwriting"].prompt, f"{day.isoformat()}\n") for day in chosen]
        return vision.see(eye, rows, vision.write_by_hand(chosen, glyphs, seed))

    rows, tests = drawn(*mine, steps * batch_size, seed), drawn(*theirs, 500, 1)
    return bridged("handwriting", way, rows, tests, steps=steps, batch_size=batch_size, seed=seed, **options)


def side_by_side_sighted(*settings):
    """`sighted` of each (task, way, steps), on one thread each: a list."""
    for task, *_ in settings:
        unseen(task)  # before there are threads
    with one_thread_each() as pool:
        return list(pool.map(lambda s: sighted(s[0], s[1], steps=s[2]), settings))


def stored_runs(path=ROOT / "docs/handwriting.jsonl"):
    """{(task, way, steps, gate, spread): [one run for each seed]} of the runs made before."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found.setdefault(tuple(run[name] for name in NAMES), []).append(run)
    return found


@torch.no_grad()
def glances(model, tokenizer, row):
    """(weights (L·H, T, N), the T characters) of an answer to a row (prompt, answer, features): the softmax over the
    visual tokens when each character is written, for every head of every layer."""
    prompt, _, features = row
    with seeing(model, features[None]):
        written = answers(model, tokenizer, [row], around=shown_by(model))[0].strip()
        ids, start = torch.tensor([tokenizer.encode(prompt + written)]), len(tokenizer.encode(prompt))
        found = []
        for attention, x, positions in attention_inputs(model, ids):
            q, keys = attention.project(x, positions)[0][0], attention.prefix(x.dtype)[0][0]  # (H, T, d), (G, K, d)
            keys = keys.repeat_interleave(len(q) // len(keys), 0)
            found.append((q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)[:, start - 1 : -1])
    return torch.cat(found), written


def own_digit(weights, written):
    """The weight (R,) that each head has on the digit that is written, on average over an answer's eight digits."""
    places = [t for t, c in enumerate(written) if c.isdigit()]
    return sum(weights[:, t, n] for n, t in enumerate(places)) / len(places)


@torch.no_grad()
def exchanged(model, tokenizer, row, others, tries=16):
    """What each character of an answer loses in probability, (T, N), when one visual token of the row is exchanged for
    that of another row at the same place: the mean over so many others."""
    prompt, _, features = row
    written = answers(model, tokenizer, [row], around=shown_by(model))[0].strip()
    ids, start = tokenizer.encode(prompt + written), len(tokenizer.encode(prompt))

    def probability(seen):
        with seeing(model, seen):
            logits = model(torch.tensor([ids]).expand(len(seen), -1))[:, start - 1 : -1]
        return logits.softmax(-1)[:, range(len(ids) - start), ids[start:]]  # (B, T)

    columns = []
    for n in range(len(features)):
        seen = features.repeat(tries, 1, 1)
        seen[:, n] = torch.stack([other[2][n] for other in others[:tries]])
        columns.append((probability(features[None]) - probability(seen)).mean(0))
    return torch.stack(columns, 1), written


def reading_figure(model, tokenizer, row, picture, others):
    effect, written = exchanged(model, tokenizer, row, others)
    weights, _ = glances(model, tokenizer, row)
    heads = len(weights) // len(model.layers)
    names = [f"layer {i // heads}, head {i % heads}" for i in range(len(weights))]
    title = f"A handwritten date becomes “{written}”"
    return plots.reading_figure(picture, effect, weights, list(written), names, title)


@torch.no_grad()
def read_alone(task="handwriting", count=500):
    """What the encoder's own head reads, digit by digit, without a language model: answers of the unseen rows."""
    digits = [encoder(task).head(features).argmax(-1).tolist() for _, _, features in unseen(task, count)[0]]
    return ["{}{}{}{}-{}{}-{}{}\n".format(*digit) for digit in digits]


def is_date(text):
    with contextlib.suppress(ValueError):
        return bool(datetime.date.fromisoformat(text.strip()))
    return False


def pad(model, tokenizer):
    """Something to draw a date on: eight fields, and below them what the model reads once all have ink. For a notebook
    with a kernel."""
    import ipywidgets

    text = ipywidgets.Text(layout=ipywidgets.Layout(width="1px", height="1px", visibility="hidden"))
    answer, clear = (
        ipywidgets.HTML("write eight digits, YYYYMMDD, one in each field, a 7 with its bar"),
        ipywidgets.Button(description="clear"),
    )
    canvas = ipywidgets.HTML(CANVAS)

    def read(change):
        if not change["new"]:
            return
        with Image.open(io.BytesIO(base64.b64decode(change["new"].partition(",")[2]))) as image:
            ink = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
            grey = ink.view(image.height, image.width) / 255
        try:
            seen = encoder("handwriting")(picture_of(grey, "handwriting", "the pad"))
        except FileError as error:
            answer.value = html.escape(str(error))
            return
        written = answers(model, tokenizer, [("? = ", "", seen[0])], around=shown_by(model))[0].strip()
        answer.value = f"<span style='font-family: monospace; font-size: 140%'>? = <b>{html.escape(written)}</b></span>"

    def empty(_):
        canvas.value, text.value = "", ""
        canvas.value = CANVAS

    text.observe(read, "value")
    clear.on_click(empty)
    whole = ipywidgets.VBox([canvas, answer, clear, text])
    whole.add_class("minillama-pad")  # by which the canvas finds its field
    return whole


def main(path, *seeds):
    path = Path(path)
    done = stored_runs(path) if path.exists() else {}
    for setting in STORED:
        for seed in map(int, seeds or range(5 if setting[0] == "validation" else 3)):
            if any(run["seed"] == seed for run in done.get(setting, ())):
                continue
            task, way, steps, gate, spread = setting
            how = dict(steps=steps, gate=gate, spread=spread, seed=seed)
            run = validated(way, **how) if task == "validation" else sighted(task, way, **how)
            losses = [round(record["loss"], 4) for record in run.history[9::10]]
            line = dict(zip(NAMES, setting)) | dict(seed=seed, parameters=run.parameters, match=run.match)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | dict(losses=losses)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
