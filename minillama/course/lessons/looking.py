"""Looking into a model while it reads: what its parts are given, where its attention looks, what its gates let in."""

import contextlib
import html

import torch

from ...adapters.llama_adapter import opening
from ...train import answers
from .. import plots


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


def attention_inputs(model, ids):
    """Every layer's attention with what enters it: [(attention, x, positions)]."""
    seen = inputs_of(model, lambda name: name.endswith("self_attn"), ids)
    return [(model.get_submodule(name), *given[:2]) for name, given in seen.items()]


@torch.no_grad()
def attention_weights(model, ids):
    """What gated prefix attention looks at, for one row of ids (1, T): {layer: (tokens, prompts, gate)} in float32.

    tokens (H, T, T): the softmax over the tokens.  prompts (H, T, K): the softmax over the prompts, before the gate.
    gate (H): what the second is multiplied by.
    """
    weights, future = {}, torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for i, (attention, x, positions) in enumerate(attention_inputs(model, ids)):
        if not hasattr(attention, "prompt"):
            continue
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
        shown = f"{html.escape(prompt)}<b>{html.escape(written)}</b>"
        note = " (the base, bit for bit)" if slider.value == 0 else ""
        answer.value = f"<span style='font-family: monospace; font-size: 120%'>{shown}</span>{note}"
        picture.outputs = ()
        picture.append_display_data(figure)

    slider.observe(update, "value")
    update()
    return ipywidgets.VBox([slider, answer, picture])


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
