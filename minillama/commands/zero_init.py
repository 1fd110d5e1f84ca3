"""The LLaMA-Adapter paper's ablation (Fig. 7; 83.85 against 40.77 % on ScienceQA) on a real model: gated prefix
attention begun at a gate of 0 and at a gate of 1, either at every learning rate, from several seeds. Lesson 08 draws
the result.

    python -m minillama zero-init --base smollm2 --out docs/smollm2_zero_init.jsonl
"""

import json

import torch
from tqdm import tqdm

from .. import data
from ..adapters import adapt, adapter_parameters, learning_rate
from ..checkpoints import load
from ..checkpoints.files import replacing
from ..device import pick_device, pick_dtype
from ..train import exact_match, train
from . import is_real
from .arguments import add_machine, positive

LANGUAGES = ("en", "fr", "de", "es", "fi")
FACTORS = (0.1, 0.25, 0.5, 1, 2.5)  # of the method's learning rate


def learn(model, tokenizer, gate, init, rate, seed, steps, batch_size, test_dates):
    """Adapts the model to five languages at once; the loss of every step, and exact match on unseen dates by
    language."""
    torch.manual_seed(seed)
    adapt(model, "llama_adapter", tanh=False, init=init)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("gate"):
            parameter.data.fill_(gate)
    train_days, test_days = data.split_dates()
    pairs = data.examples(LANGUAGES, train_days, steps * batch_size, seed, data.form(tokenizer))
    history = train(
        model, tokenizer, pairs, steps=steps, batch_size=batch_size, learning_rate=rate, seed=seed, bucket=1,
        progress=False,
    )  # fmt: skip
    form = data.form(tokenizer)
    unseen = {language: data.examples(language, test_days, test_dates, 1, form) for language in LANGUAGES}
    matches = {language: exact_match(model, tokenizer, pairs) for language, pairs in unseen.items()}
    return [round(record["loss"], 4) for record in history], matches


def add_arguments(parser):
    parser.add_argument("--base", default="smollm2", metavar="NAME", help="whatever minillama.load opens (smollm2)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write, one run a line")
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="runs for each gate, start of the prompts and rate (3)"
    )
    parser.add_argument("--steps", type=positive, default=120, metavar="N", help="training steps (120)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="dates per step (16)")
    parser.add_argument(
        "--test-dates", type=positive, default=200, metavar="N", help="dates per language to measure on (200)"
    )
    add_machine(parser, seed=False)


def run(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    _, tokenizer = load(args.base, dtype, device)
    peak = learning_rate("llama_adapter", is_real(tokenizer))
    plan = [
        (gate, init, factor * peak, seed)
        for init in ("normal", "input")
        for gate in (0.0, 1.0)
        for factor in FACTORS
        for seed in range(args.seeds)
    ]
    runs = []
    for gate, init, rate, seed in tqdm(plan, unit="run"):
        model, _ = load(args.base, dtype, device)
        sizes = args.steps, args.batch_size, args.test_dates
        losses, matches = learn(model, tokenizer, gate, init, rate, seed, *sizes)
        settings = {"gate": gate, "init": init, "learning_rate": rate, "seed": seed}
        runs.append(settings | {"losses": losses, "matches": matches})
    with replacing(args.out) as temporary:
        temporary.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    for settings in dict.fromkeys(row[:3] for row in plan):
        alike = [run for run in runs if (run["gate"], run["init"], run["learning_rate"]) == settings]
        means = [sum(run["matches"].values()) / len(LANGUAGES) for run in alike]
        gate, init, rate = settings
        shown = f"{sum(means) / len(means):6.1%} ({min(means):.1%} to {max(means):.1%})"
        print(f"gate {gate:.0f}, prompts {init:6}, learning rate {rate:.4f}: {shown}")
