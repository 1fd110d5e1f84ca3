"""What the lessons share: a short adaptation with its result, a function's source on the page, tables.

from minillama import lessons
run = lessons.adaptation("ia3", "fr", steps=100)      # a fresh base, adapted and measured
runs = lessons.over_seeds("ia3", "fr", steps=100)     # the same from two seeds, side by side
lessons.show(minillama.adapters.ia3.IA3Linear)        # its source, from the file
"""

import contextlib
import copy
import functools
import inspect
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import data
from ..adapters import adapt, gates
from ..adapters import learning_rate as suits
from ..adapters.llama_adapter import opening
from ..checkpoints import load
from ..device import pick_dtype
from ..train import answers, exact_match, train
from . import plots

DRAWING = threading.Lock()  # PyTorch's random numbers are one sequence for all threads


@dataclass(frozen=True)
class Adaptation:
    """One run: the model as it was left, train's history, exact match on unseen dates (0 to 1), trained parameters."""

    model: torch.nn.Module
    history: list
    match: float
    parameters: int


@functools.cache
def base(name="dates-llama", dtype=None):
    """(model, tokenizer) of a bundled base, loaded once; in bfloat16 where the machine multiplies it natively.
    Copy before changing."""
    return load(name, dtype or pick_dtype("auto", torch.device("cpu")))


@functools.cache
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct, in bfloat16 where the machine multiplies it natively; says on the
    page where it comes from and under which licence. FileError, one sentence, where it cannot be had."""
    with contextlib.redirect_stderr(io.StringIO()) as notices:
        opened = load("smollm2", pick_dtype("auto", torch.device("cpu")))
    print(notices.getvalue().strip().splitlines()[-1])
    return opened


def adaptation(
    method, language="fr", *, of="dates-llama", steps=100, batch_size=32, learning_rate=None, seed=0, prepare=None,
    test_dates=200, **options,
):  # fmt: skip
    """Adapts a copy of a base to a language and measures it; seconds, not minutes, at these defaults.

    method: one of adapters.METHODS, with its options; or "full", which trains every weight, in float32.
    prepare: called with the adapted model before the first step.  learning_rate: None takes the method's own.
    """
    model, tokenizer = base(of)
    model = copy.deepcopy(model)
    with DRAWING:
        torch.manual_seed(seed)
        if method == "full":
            model.float().requires_grad_(True)
        else:
            adapt(model, method, **options)
        if prepare is not None:
            with torch.no_grad():
                prepare(model)
    train_days, test_days = data.split_dates()
    pairs = data.examples(language, train_days, steps * batch_size, seed)
    rate = suits(method) if learning_rate is None else learning_rate
    how = dict(batch_size=batch_size, learning_rate=rate, seed=seed, watch=gates, progress=False)
    history = train(model, tokenizer, pairs, steps=steps, **how)
    match = exact_match(model, tokenizer, data.examples(language, test_days, test_dates, seed=1))
    return Adaptation(model, history, match, sum(p.numel() for p in model.parameters() if p.requires_grad))


def over_seeds(method, language="fr", *, seeds=(0, 1), **options):
    """`adaptation` from each seed: a list. They run side by side, each on one thread, since two threads cannot help one
    another with models as small as these; on two cores that takes about two thirds of the time."""
    threads = torch.get_num_threads()
    base(options.get("of", "dates-llama"))  # opened once, before there are threads
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda seed: adaptation(method, language, seed=seed, **options), seeds))
    finally:
        torch.set_num_threads(threads)


def distances(build, ids):
    """How far adapted models stand from the base at the start:
    rows (name, largest difference of logits, bit for bit or not).

    build: {name: function that adapts the fresh copy it is given}.  ids (B, T).
    """
    rows = []
    for name, adapted in build.items():
        model = copy.deepcopy(base()[0]).float()
        with torch.no_grad():
            expected = model(ids)
            torch.manual_seed(0)
            adapted(model)
            logits = model(ids)
        rows.append((name, (logits - expected).abs().max().item(), torch.equal(logits, expected)))
    return rows


def show(*things):
    """The source of functions, classes or modules, as it stands in the file, for a notebook to display."""
    from IPython.display import Markdown

    root, parts = Path(__file__).parent.parent.parent, []
    for thing in things:
        path = Path(inspect.getsourcefile(thing)).relative_to(root)
        lines, first = inspect.getsourcelines(thing)
        parts.append(f"`{path}`{f', line {first}' if first else ''}\n\n```python\n{''.join(lines).rstrip()}\n```")
    return Markdown("\n\n".join(parts))


def table(header, rows):
    """Rows under a header as a Markdown table, numbers flush right, for a notebook to display.
    Cells are text or numbers."""
    from IPython.display import Markdown

    def text(cell):
        if isinstance(cell, int) and not isinstance(cell, bool):
            return f"{cell:,}"
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell).strip().replace("|", "\\|").replace("\n", " ")

    rows = [[text(cell) for cell in row] for row in rows]
    rule = [
        "---:" if all(cell[:1].isdigit() or cell[:1] in "-–" for cell in column) else "---" for column in zip(*rows)
    ]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *rows]))


def percent(matches):
    """Exact matches over seeds as text: mean (lowest to highest) in percent."""
    matches = [100 * match for match in matches]
    return f"{sum(matches) / len(matches):.1f} % ({min(matches):.1f} to {max(matches):.1f})"


@torch.no_grad()
def attention_weights(model, ids):
    """What gated prefix attention looks at, for one row of ids (1, T): {layer: (tokens, prompts, gate)} in float32.

    tokens (H, T, T): the softmax over the tokens.  prompts (H, T, K): the softmax over the prompts, before the gate.
    gate (H): what the second is multiplied by.
    """
    adapted = {i: layer.self_attn for i, layer in enumerate(model.layers) if hasattr(layer.self_attn, "prompt")}
    seen, weights = {}, {}
    handles = [
        attention.register_forward_pre_hook(lambda _, inputs, i=i: seen.update({i: inputs}))
        for i, attention in adapted.items()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for i, attention in adapted.items():
        x, positions = seen[i][:2]
        q, k, _ = (z[0].float() for z in attention.project(x, positions))  # (H, T, d), (G, T, d)
        pk = attention.prefix(x.dtype)[0].float()  # (G, K, d)
        k, pk = (z.repeat_interleave(len(q) // len(z), 0) / q.shape[-1] ** 0.5 for z in (k, pk))
        gate = opening(attention.gate, attention.tanh).reshape(len(attention.gate), -1).mean(1).expand(len(q))
        weights[i] = (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1), (q @ pk.mT).softmax(-1), gate
    return weights


@contextlib.contextmanager
def turned(model, factor):
    """Within the block every gate of the model is `factor` times what it was:
    0 is the base, 1 the adapter as it stands."""
    gates = {name: p for name, p in model.named_parameters() if name.endswith(".gate")}
    before = {name: p.detach().clone() for name, p in gates.items()}
    with torch.no_grad():
        for p in gates.values():
            p.mul_(factor)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, p in gates.items():
                p.copy_(before[name])


def attention_figure(model, tokenizer, prompt, place=6):
    """What the model looks at while it writes the character of its answer at `place` (6: the month's second digit),
    every layer and head a row: on the left the gated prompts, on the right the tokens."""
    written = answers(model, tokenizer, [prompt])[0]
    text = tokenizer.encode(prompt + written)[: len(tokenizer.encode(prompt)) + place]
    weights = attention_weights(model, torch.tensor([text]))
    prompts = torch.cat([gate[:, None] * on_prompts[:, -1] for _, on_prompts, gate in weights.values()])  # (L·H, K)
    tokens = torch.cat([on_tokens[:, -1] for on_tokens, _, _ in weights.values()])  # (L·H, T)
    characters = [chr(i) if 32 < i < 127 else {32: "␣", 10: "⏎"}.get(i, "·") for i in text]
    rows = [
        f"layer {i}" if head == 0 else "" for i, (on_tokens, _, _) in weights.items() for head in range(len(on_tokens))
    ]
    title = f"“{prompt}{written.strip()}”: where each head looks while it writes character {place + 1} of the answer"
    return plots.attention_figure(prompts, tokens, characters, rows, title)


def gate_slider(model, tokenizer, prompt):
    """A slider that turns every gate by hand, from 0 (the base) to twice what was learned; the answer and the attention
    below it follow. For a notebook with a kernel."""
    import ipywidgets

    slider = ipywidgets.FloatSlider(
        value=1.0, min=0.0, max=2.0, step=0.05, description="gate ×", continuous_update=False
    )
    answer, picture = ipywidgets.HTML(), ipywidgets.Output()

    def update(change=None):
        with turned(model, slider.value):
            written, figure = answers(model, tokenizer, [prompt])[0].strip(), attention_figure(model, tokenizer, prompt)
        note = " (the base, bit for bit)" if slider.value == 0 else ""
        answer.value = f"<span style='font-family: monospace; font-size: 120%'>{prompt}<b>{written}</b></span>{note}"
        picture.outputs = ()
        picture.append_display_data(figure)

    slider.observe(update, "value")
    update()
    return ipywidgets.VBox([slider, answer, picture])
