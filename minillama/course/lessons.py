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
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import data
from ..adapters import adapt, adapter_parameters, gates, merge, save_adapter, wrappers
from ..adapters import learning_rate as suits
from ..adapters.llama_adapter import opening
from ..checkpoints import load, save
from ..device import pick_dtype
from ..gpt2 import GPT2
from ..llama import LLaMA, LLaMAConfig
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


class Source:
    """Source text for a notebook to display: highlighted in one font everywhere, as Markdown where there is no HTML."""

    def __init__(self, places, sources):
        self.places, self.sources = places, sources

    def _repr_mimebundle_(self, include=None, exclude=None):
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        font = "font-family: monospace; font-size: 90%; line-height: 1.35; white-space: pre; overflow-x: auto"
        style = HtmlFormatter(noclasses=True, nobackground=True, prestyles=font)
        pages = [f"<code>{p}</code>{highlight(s, PythonLexer(), style)}" for p, s in zip(self.places, self.sources)]
        plain = [f"`{p}`\n\n```python\n{s}\n```" for p, s in zip(self.places, self.sources)]
        plain = "\n\n".join(plain)
        return {"text/html": "\n".join(pages), "text/markdown": plain, "text/plain": plain}


def show(*things):
    """The source of functions, classes or modules, as it stands in the file, for a notebook to display."""
    root, places, sources = Path(__file__).parent.parent.parent, [], []
    for thing in things:
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing)).relative_to(root)
        places.append(f"{path}{f', line {first}' if first else ''}")
        sources.append("".join(lines).rstrip())
    return Source(places, sources)


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
    tanh = all(layer.self_attn.tanh for layer in model.layers if hasattr(layer.self_attn, "tanh"))
    return plots.attention_figure(prompts, tokens, characters, rows, title, tanh)


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


# ── lesson 02 ────────────────────────────────────────────────────────────────────────────────────────────────────────


def attention_inputs(model, ids):
    """Every layer's attention with what enters it: [(attention, x, positions)]."""
    found, keep = [], lambda attention, given: found.append((attention, *given[:2]))
    handles = [block.self_attn.register_forward_pre_hook(keep) for block in model.layers]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def scaled(factor, own=""):
    """A change of a fresh adapter: its parameters whose names end in `own`, times factor."""
    return lambda model: [p.mul_(factor) for name, p in adapter_parameters(model).items() if name.endswith(own)]


def begun(method, change=None, **options):
    """A way to adapt a model and change its fresh adapter."""
    return lambda model: (adapt(model, method, **options), change and change(model))


def starts_table(begins, ids, share_of, english):
    """(table, {name: (distance of the logits, share of the softmax or None, English dates right)}) of fresh adapters.

    begins: {name: function that adapts the fresh copy it is given}.  share_of(model): what a prefix takes.
    """
    _, tokenizer = base()
    found = {}
    for name, distance, _ in distances(begins, ids):
        model = copy.deepcopy(base()[0]).float()
        torch.manual_seed(0)
        with torch.no_grad():
            begins[name](model)
        share = share_of(model).mean().item() if name.startswith("prefix") else None
        found[name] = distance, share, exact_match(model, tokenizer, english)
    rows = [(n, d, "–" if s is None else f"{s:.0%}", f"{right:.0%}") for n, (d, s, right) in found.items()]
    return table(["start", "largest difference of logits", "average share", "English dates right"], rows), found


def mean_match(runs):
    """Exact match averaged over the runs' seeds."""
    return sum(run.match for run in runs) / len(runs)


def loss_curve(runs):
    """The losses of runs of equal length, for plots.curve_figure."""
    steps = range(len(runs[0].history))
    return range(1, len(steps) + 1), [[run.history[i]["loss"] for run in runs] for i in steps]


def matches_table(header, rows):
    """A table of rows (…, runs), the last as exact match over the seeds."""
    return table([*header, "exact match"], [(*row, percent([run.match for run in runs])) for *row, runs in rows])


def counted(make, attach, **options):
    """(trained, all) parameters of a model built without its numbers, on the meta device, and adapted."""
    with torch.device("meta"):
        model = make().requires_grad_(False)
    everything = sum(p.numel() for p in model.parameters())
    attach(model, **options)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), everything


# ── lesson 07: all methods ───────────────────────────────────────────────────────────────────────────────────────────


def side_by_side(trials, seeds=(0, 1)):
    """`over_seeds` for several trials at once, {name: (method, options)} -> {name: a run per seed}; Finnish, 150 steps
    of 16, where the options say nothing else. An option `seeds` asks for others."""
    threads, done = torch.get_num_threads(), {name: [] for name in trials}
    base()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, (method, options) in trials.items():
                how = dict(steps=150, batch_size=16) | options
                for seed in how.pop("seeds", seeds):
                    done[name].append(pool.submit(adaptation, method, "fi", seed=seed, **how))
            return {name: [run.result() for run in runs] for name, runs in done.items()}
    finally:
        torch.set_num_threads(threads)


def facts(method, text="March 3, 2021 = 2021-"):
    """(trained parameters, starts as the base bit for bit, merges, bytes of the file) of a method at its defaults."""
    plain, tokenizer = base()
    ids = torch.tensor([tokenizer.encode(text)])
    model = adapt(copy.deepcopy(plain), method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        closed = torch.equal(model(ids), plain(ids))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    try:
        merge(model)
    except ValueError:
        return trained, closed, False, size
    return trained, closed, True, size


def long_runs(column=4):
    """Exact match after 300 steps from the first table of docs/results.md, {method: text}: column 3 French, 4 Finnish,
    5 Hungarian."""
    found = {}
    for line in (Path(__file__).parent.parent.parent / "docs/results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")]
        if len(cells) == 7 and "%" in cells[column]:
            found[{"the frozen base": "base", "all weights": "full"}.get(cells[1], cells[1])] = cells[column]
    return found


# ── lesson 05 ────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(std):
    """For `adaptation`'s prepare: draws both matrices of every bottleneck with this deviation, cut at two of it."""

    def prepare(model):
        for _, wrapper in wrappers(model):
            for linear in (wrapper.bottleneck.down, wrapper.bottleneck.up):
                torch.nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)

    return prepare


def judged(starts):
    """Rows of `distances` with a verdict in the place of bit for bit or not."""
    said = ["exact" if same else "only near" if distance < 0.5 else "another model" for _, distance, same in starts]
    return [(name, distance, verdict) for (name, distance, _), verdict in zip(starts, said)]


def only(*parts):
    """For `adaptation`'s prepare: takes off every wrapper but those whose place begins with one of these."""

    def prepare(model):
        for name, wrapper in wrappers(model):
            if not name.startswith(parts):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, wrapper.base)

    return prepare


@torch.no_grad()
def seen_by_bottlenecks(model, texts):
    """{place: (what its bottleneck read (N, D), what it added (N, D))} over all tokens of the texts."""
    seen = {name: ([], []) for name, _ in wrappers(model)}

    def keep(name):
        def hook(_, inputs, out):
            seen[name][0].append(inputs[0][0].float())
            seen[name][1].append(out[0].float())

        return hook

    handles = [wrapper.bottleneck.register_forward_hook(keep(name)) for name, wrapper in wrappers(model)]
    for text in texts:
        model(torch.tensor([base()[1].encode(text)]))
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(read), torch.cat(added)) for name, (read, added) in seen.items()}


@torch.no_grad()
def fastest(models, ids, tries=60):
    """{name: seconds of one forward pass, the fastest of many}; the models {name: model} take turns."""
    found = dict.fromkeys(models, float("inf"))
    for _ in range(tries):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            found[name] = min(found[name], time.perf_counter() - start)
    return found


# ── lesson 01 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def inputs_of(model, chosen, ids):
    """What the parts whose names `chosen(name)` picks were given while the model read ids: {name: inputs}."""
    seen = {}
    handles = [
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs}))
        for name, part in model.named_modules()
        if chosen(name)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def shares_of_the_mean(model, ids):
    """How much of the mean square LayerNorm would subtract as the mean: a share for each norm, averaged over tokens."""
    seen = inputs_of(model, lambda name: name.endswith("norm"), ids)
    return [(x.mean(-1) ** 2 / x.pow(2).mean(-1)).mean().item() for (x,) in seen.values()]


def parameters_of(config):
    """The number of parameters of a model that is made of shapes alone."""
    with torch.device("meta"):
        model = (LLaMA if isinstance(config, LLaMAConfig) else GPT2)(config)
    return sum(p.numel() for p in model.parameters())


def fresh_llama(deviation=None, layers=2):
    """A random LLaMA as wide as dates-llama. deviation: of every weight; None draws them as minillama does."""
    torch.manual_seed(2)
    model = LLaMA(LLaMAConfig(256, 128, 344, layers, 4, num_key_value_heads=2))
    if deviation is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=deviation)
    return model


# ── lesson 03 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def telling_example(model, tokenizer, pairs):
    """The prompt that shows best what gates do, of pairs (prompt, answer): read wrongly with the gates at 0, rightly as
    they were trained, wrongly at twice that. Where no pair does all three: one that is right as trained and wrong at
    0; where there is none either, one that is right as trained; else any. Of equals the shortest."""
    right = {}
    for factor in (0, 1, 2):
        with turned(model, factor):
            written = answers(model, tokenizer, [prompt for prompt, _ in pairs])
        right[factor] = [text == answer for text, (_, answer) in zip(written, pairs)]
    best = max(range(len(pairs)), key=lambda i: (right[1][i], not right[0][i], not right[2][i], -len(pairs[i][0])))
    return pairs[best][0]


def gates_at(value):
    """A change of a fresh adapter: every gate at this value."""
    return lambda model: [p.fill_(value) for name, p in adapter_parameters(model).items() if name.endswith("gate")]


@torch.no_grad()
def versions(presets, ids):
    """Rows (preset, gate, tanh, join, distance to the base at gate 0, distance to the paper's at gate 0.5) of a small
    LLaMA with biases, adapted as each of those codes would, with the same prompts."""
    rows, first = [], None
    for preset, options in presets.items():
        torch.manual_seed(0)
        model = LLaMA(LLaMAConfig(256, 64, 160, 2, 4, attention_bias=True))
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)  # biases that are not 0
        untouched = model(ids)
        torch.manual_seed(1)
        adapt(model, "llama_adapter", **options)
        closed = (model(ids) - untouched).abs().max().item()
        gates_at(0.5)(model)
        first = model(ids) if first is None else first
        rows.append((preset, *options.values(), closed, (model(ids) - first).abs().max().item()))
    return rows


def movement(pairs, steps=3):
    """How far gates and prompts of a fresh llama_adapter move in so many steps, summed over the layers."""
    model, tokenizer = copy.deepcopy(base()[0]).float(), base()[1]
    torch.manual_seed(0)
    adapt(model, "llama_adapter")
    answers(model, tokenizer, [pairs[0][0]])  # a look at the model before training, without gradients
    start = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    train(model, tokenizer, pairs, steps=steps, batch_size=16, learning_rate=0.1, progress=False)
    moved = {name: (p - start[name]).abs().max().item() for name, p in adapter_parameters(model).items()}
    return [sum(far for name, far in moved.items() if name.endswith(kind)) for kind in ("gate", "prompt")]


def projections_run(run):
    """How often each of the four projections of one layer of the base runs within run(attention)."""
    attention = copy.deepcopy(base()[0].layers[0].self_attn).float()
    count = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0)
    for name in count:
        getattr(attention, name).register_forward_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
    run(attention)
    return count


# ── lesson 04 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ia3_vectors(model, name="default"):
    """An IA3 adapter's own parameters: {layer: {"l_k": (G·d), "l_v": (G·d), "l_ff": (F)}}."""
    own, places = adapter_parameters(model, name), ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    names = dict(zip(("l_k", "l_v", "l_ff"), places))
    return {
        i: {vector: own[f"layers.{i}.{place}.ia3.scale"] for vector, place in names.items()}
        for i in range(len(model.layers))
    }


def starts_of_ia3(begins, ids):
    """A table of how far vectors stand from the base before a step; the first two of `begins` are the base."""
    rows = distances(begins, ids)
    assert [same for _, _, same in rows] == [True, True] + [False] * (len(rows) - 2)
    said = lambda distance, same: "bit for bit" if same else "only near" if distance < 0.5 else "another model"  # noqa: E731
    rows = [(name, distance, said(distance, same)) for name, distance, same in rows]
    return table(["start", "largest difference of logits", ""], rows)


def shares_of_factors(vectors):
    """(table, the last row's shares) of factors below 0, to 0.5, to 1.5 and above. vectors: {name: (features,)}."""
    rows, bounds = [], torch.tensor((0, 0.5, 1.5))
    for name, vector in vectors.items():
        shares = torch.bincount(torch.bucketize(vector, bounds), minlength=4) / len(vector)
        rows.append((name, len(vector), *(f"{100 * share:.0f} %" for share in shares)))
    return table(["", "numbers", "turned round: below 0", "0 to 0.5", "0.5 to 1.5", "above 1.5"], rows), shares.tolist()


@torch.no_grad()
def ia3_opened(start, attach, ids, merged=False):
    """The logits of a copy of a base with such a layer in every block, each block's l_k, l_v and l_ff drawn from the
    same numbers, 1 + N(0, 0.3), whatever they multiply; merged: with the vectors folded into the weights."""
    model = copy.deepcopy(start).float()
    attach(model)
    for i, layer in enumerate(model.layers):
        kinds = {"q_proj": 0, "k_proj": 0, "v_proj": 1}
        for name, part in layer.named_modules():
            if hasattr(part, "scale"):
                draw = torch.Generator().manual_seed(3 * i + kinds.get(name.rpartition(".")[2], 2))
                part.scale.copy_(1 + 0.3 * torch.randn(part.scale.shape, generator=draw))
    return (merge(model) if merged else model)(ids)


# ── lesson 08 ────────────────────────────────────────────────────────────────────────────────────────────────────────

HELD_TEXTS = {
    "English": """The ferry was late again. On the quay an old man sold smoked fish out of the boot of his car,
and the gulls knew him by name. We bought two, ate them with our fingers, and watched the mainland fold itself
into the fog. Nobody asked when the boat would come; on the island a timetable is a kind of poem, read for its
sound.""",
    "French": """Le boulanger de notre rue ne parle presque pas. Chaque matin il pose le pain sur la table, compte
la monnaie sans regarder, et retourne à son four. Un jour de neige, pourtant, il m'a raconté toute sa vie, et
j'ai oublié mon pain.""",
    "Python": '''def longest_run(values):
    """The longest stretch of equal neighbours: (value, length)."""
    best, start = (None, 0), 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[start]:
            if i - start > best[1]:
                best = (values[start], i - start)
            start = i
    return best
''',
}
GOOD = (
    "I love this song.", "Our team won the cup.", "The nurse was kind and patient.",
    "Grandmother's cake tastes like heaven.", "The sun came out for the wedding.", "You did a brilliant job.",
    "The library gave me a warm welcome.", "The view from the tower is splendid.",
)  # fmt: skip
BAD = (
    "The coffee was burnt.", "The heating broke in January.", "I have been waiting for two hours.",
    "The dog ate my homework and was sick.", "They lost the match and the bus home.", "My new shoes hurt.",
    "He forgot our birthday.", "The milk has gone sour.",
)  # fmt: skip


def zero_init_runs():
    """The stored runs of the zero-init ablation: {(how the prompts are drawn, gate): {learning rate: [a run a seed]}};
    to each run "match" is added, its exact match over all languages."""
    runs = {}
    with open(Path(__file__).parent.parent.parent / "docs/smollm2_zero_init.jsonl", encoding="utf-8") as file:
        for run in map(json.loads, file):
            run["match"] = sum(run["matches"].values()) / len(run["matches"])
            runs.setdefault((run["init"], run["gate"]), {}).setdefault(run["learning_rate"], []).append(run)
    return runs


def peft_answers(base, adapted, tokenizer, prompts):
    """What PEFT makes of an adapter, on transformers' own model with the base's weights: its answers to the prompts."""
    import warnings

    import peft
    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # transformers and PEFT among themselves
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(copy.deepcopy(base).float(), f"{folder}/base")
        save_adapter(adapted, f"{folder}/adapter")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, f"{folder}/adapter").eval()
    how, written = dict(max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
        written.append(tokenizer.decode(new.tolist()))
    return written


# ── lesson 06 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def lora_started(a=None, b=None):
    """A function that adapts the model it is given by LoRA of rank 8, and draws every A and B anew by a(A) and b(B)."""

    def change(model):
        adapt(model, "lora", rank=8)
        for name, p in adapter_parameters(model).items():
            draw = a if name.endswith("A") else b
            if draw is not None:
                draw(p)
        return model

    return change


def first_steps(change, pairs, steps):
    """Trains a copy of the base that `change` has adapted: (largest movement of a number, mean loss of the last 5)."""
    torch.manual_seed(0)
    model, tokenizer = copy.deepcopy(base()[0]).float(), base()[1]
    with torch.no_grad():
        change(model)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    history = train(model, tokenizer, pairs, steps=steps, batch_size=16, progress=False)
    moved = max((p - before[name]).abs().max().item() for name, p in adapter_parameters(model).items())
    return moved, sum(record["loss"] for record in history[-5:]) / 5


def multiplications(model, ids):
    """Multiply-adds of one forward pass over ids (B, T), counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids)
    return counter.get_total_flops() // 2
