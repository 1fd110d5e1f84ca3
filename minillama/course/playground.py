"""The playground of docs/playground: a LLaMA that runs and learns in a browser's tab, put into one file.

One page with everything in it opens from a folder, from any static host and offline; a browser loads neither modules
nor workers from a folder otherwise. `python -m minillama.course.playground` makes what stands beside it again: adapters
that are missing, the story's dates and digits, and what PyTorch computes, for the tests to hold the JavaScript to.
"""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .. import data, vision
from ..adapters import adapt, load_adapter
from ..adapters.seeing import shown_by
from ..adapters.storage import WEIGHTS, fingerprint
from ..checkpoints import BASES, load
from ..generate import generate
from ..train import answer_loss, answers, train
from .lessons.looking import telling_example
from .notebooks import ROOT

FOLDER = ROOT / "docs/playground"
MODEL = ("matrix.js", "llama.js", "train.js", "dates.js", "safetensors.js")
PAGE = ("vision.js", "draw.js", "run.js", "common.js", "shown.js", "learn.js", "pad.js", "page.js")
# The adapters that the page brings, and what `python -m minillama adapt --dtype float32` made them of.
TRAINED = {
    "fr": "--language fr", "fi": "--language fi --steps 800", "de": "--language de", "es": "--language es",
    "handwriting": "--task handwriting --steps 800",
}  # fmt: skip
LANGUAGES = tuple(TRAINED)[:-1]


def script(*names):
    """The files one behind the other, without their imports and exports: one classic script."""
    text = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)
    text = re.sub(r"^import .*?;\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return "(() => {\n" + re.sub(r"^export ", "", text, flags=re.MULTILINE) + "})();\n"


def as_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


def adapter_file(name):
    return FOLDER / f"adapters/{name}.safetensors"


def assets():
    """What page.js finds as ASSETS."""
    base = BASES / "dates-llama"
    return {
        "config": json.loads((base / "config.json").read_text(encoding="utf-8")),
        "weights": as_base64(base / "model.safetensors"),
        "fingerprint": fingerprint(load("dates-llama")[0]),
        "kernel": as_base64(FOLDER / "kernel.wasm"),
        "adapters": {name: as_base64(adapter_file(name)) for name in LANGUAGES},
        "sighted": as_base64(adapter_file("handwriting")),
        "encoder": as_base64(vision.WEIGHTS / "handwriting.safetensors"),
        "story": json.loads((FOLDER / "story.json").read_text(encoding="utf-8")),
        "worker": script(*MODEL, "worker.js"),
    }


def page():
    """The playground as one HTML file's text."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    style = f"<style>\n{(FOLDER / 'style.css').read_text(encoding='utf-8')}</style>"
    brought = json.dumps(assets()).replace("</", "<\\/")
    program = script(*MODEL, *PAGE)
    scripts = f"<script>globalThis.ASSETS = {brought};</script>\n<script>\n{program}</script>"
    for place, content in (
        ('<link rel="stylesheet" href="style.css">', style),
        ('<script src="page.js" type="module"></script>', scripts),
    ):
        before, after = html.split(place)
        html = before + content + after
    return html


# ── what is made once and kept: adapters, the story's dates, and PyTorch's numbers ───────────────────────────────────


def train_missing():
    """Trains the adapters whose files are not there."""
    for name, options in TRAINED.items():
        if adapter_file(name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "minillama", "adapt", *options.split(), "--dtype", "float32"]
            subprocess.run([*command, "--out", folder], check=True)
            shutil.copy(Path(folder) / WEIGHTS, adapter_file(name))


def adapted(name):
    """(model, tokenizer): dates-llama in float32 with the adapter that the page brings for a language; None: bare."""
    model, tokenizer = load("dates-llama", torch.float32)
    if name:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(adapter_file(name), Path(folder) / WEIGHTS)
            load_adapter(model, folder)
    return model, tokenizer


def unseen(language, count, seed=1):
    return data.examples(language, data.split_dates()[1], count, seed)


def story():
    """The dates that the page tells its story with: of each language one that is wrong at gate 0, right at 1 and wrong
    at 2, and a French one that goes wrong where one layer's gates alone are shut, the shortest."""
    telling = {}
    for name in LANGUAGES:
        model, tokenizer = adapted(name)
        telling[name] = telling_example(model, tokenizer, unseen(name, 400)).removesuffix(" = ")
    model, tokenizer = adapted("fr")
    pairs, shut = unseen("fr", 400), []
    right = answers(model, tokenizer, [prompt for prompt, _ in pairs])
    pairs = [pair for pair, text in zip(pairs, right) if text == pair[1]]
    for index, layer in enumerate(model.layers):
        gate = layer.self_attn.gate.data
        kept = gate.clone()
        gate.zero_()
        written = answers(model, tokenizer, [prompt for prompt, _ in pairs])
        gate.copy_(kept)
        shut += [(len(prompt), prompt, index) for (prompt, answer), text in zip(pairs, written) if text != answer]
    _, prompt, index = min(shut)
    others = [
        ("March 3, 2021", "fr"),
        *((text, name) for name, text in telling.items()),
        ("mercredi 14 juillet 1999", "fr"),
    ]
    return {
        "presets": [{"text": text, "adapter": name} for text, name in others],
        "telling": telling,
        "layer": {"text": prompt.removesuffix(" = "), "layer": index},
        "digits": handwritten(),
    }


def counts(pictures):
    """Pictures of digits, (n, 8, 8) from 0 to 1, as base64: 64 bytes each, counts from 0 to 16."""
    return base64.b64encode((16 * pictures).round().to(torch.uint8).contiguous().numpy().tobytes()).decode()


def handwritten(each=8):
    """Of each digit the first so many of those kept for tests, for the pad's examples and its keyboard."""
    pictures, names = vision.digits(train=False)
    return [counts(pictures[names == digit][:each]) for digit in range(10)]


def numbers(*tensors):
    """Tensors one behind the other, float32, as base64."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()


def flat(model, of=lambda parameter: parameter):
    """All prompts, then all gates: as train.js keeps an adapter."""
    attentions = [layer.self_attn for layer in model.layers]
    return [of(a.prompt) for a in attentions] + [of(a.gate) for a in attentions]


@torch.no_grad()
def greedy(name, count=50, shown=4):
    """What one adapter answers to dates of all languages; of the first few also the logits of the answer's first and
    last character."""
    model, tokenizer = adapted(name)
    pairs, rows = data.examples(("en", *LANGUAGES), data.split_dates()[1], count, 5), []
    for i, (prompt, _) in enumerate(pairs):
        ids = tokenizer.encode(prompt)
        new = generate(model, torch.tensor([ids]), 16, stop=data.STOP)[0, len(ids) :].tolist()
        row = {"prompt": prompt, "answer": tokenizer.decode(new)}
        if i < shown:
            logits = model(torch.tensor([ids + new[:-1]]))[0]
            row["logits"] = numbers(logits[len(ids) - 1], logits[-1])
        rows.append(row)
    return rows


@torch.no_grad()
def readings(count=24):
    """What is read of test pictures, with the features that the encoder makes of each."""
    model, tokenizer = adapted("handwriting")
    pairs, pictures = vision.examples("handwriting", data.split_dates()[1], count, False, 5)
    rows = vision.see(vision.load_encoder("handwriting"), pairs, pictures)
    written = answers(model, tokenizer, rows, around=shown_by(model))
    tiles = pictures.unflatten(2, (-1, 8)).transpose(1, 2)  # (n, 8 digits, 8, 8)
    return [
        {"picture": counts(picture), "features": numbers(features), "day": day, "answer": text}
        for picture, (_, day, features), text in zip(tiles, rows, written)
    ]


def fixtures():
    """What PyTorch computes, for tests/test_playground.py: greedy answers, readings of pictures, the losses of 40
    training steps on given batches, and the gradient at gates drawn from N(0, 1/4)."""
    torch.set_num_threads(1)
    made = {"answers": {name or "base": greedy(name) for name in (None, "fr", "fi")}, "readings": readings()}
    model, tokenizer = load("dates-llama", torch.float32)
    torch.manual_seed(3)
    adapt(model, "llama_adapter")
    start = numbers(*flat(model))
    pairs = data.examples("fr", data.split_dates()[0], 40 * 16, 7)
    some = list(itertools.islice(data.batches(pairs, 16, 0, 16), 40))
    history = train(model, tokenizer, pairs, steps=40, batch_size=16, learning_rate=0.1, seed=0, progress=False)
    losses = [round(record["loss"], 6) for record in history]
    made["training"] = {"start": start, "batches": some, "losses": losses}
    model.zero_grad()
    for layer in model.layers:  # half open, half learned: a gradient that is not small
        layer.self_attn.gate.data.normal_(std=0.5)
    loss = answer_loss(model, *data.collate(some[0], tokenizer))
    loss.backward()
    made["gradient"] = {"at": numbers(*flat(model)), "is": numbers(*flat(model, lambda parameter: parameter.grad))}
    return made | {"loss": loss.item()}


if __name__ == "__main__":
    train_missing()
    (FOLDER / "story.json").write_text(json.dumps(story(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (ROOT / "tests/playground.json").write_text(json.dumps(fixtures(), ensure_ascii=False) + "\n", encoding="utf-8")
