"""The LLaMA-Adapter paper's ablation (Fig. 7; 83.85 against 40.77 % on ScienceQA) on a real model: gated prefix attention
begun at a gate of 0 and at a gate of 1, either at every learning rate, from several seeds. Lesson 08 draws the result.

    python -m minillama.zero_init --base smollm2 --out docs/smollm2_zero_init.jsonl
"""

import argparse
import json
import sys

import torch
from tqdm import tqdm

from . import data
from .adapters import adapt, adapter_parameters
from .device import pick_device, pick_dtype
from .files import replacing
from .pretrained import load
from .train import LEARNING_RATE, LEARNING_RATE_OF_WORDS, exact_match, train

LANGUAGES = ("en", "fr", "de", "es", "fi")
FACTORS = (0.1, 0.25, 0.5, 1, 2.5)  # of the method's learning rate


def learn(model, tokenizer, gate, init, rate, seed, steps, batch_size, test_dates):
    """Adapts the model to five languages at once; the loss of every step, and exact match on unseen dates by language."""
    torch.manual_seed(seed)
    adapt(model, "llama_adapter", tanh=False, init=init)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("gate"):
            parameter.data.fill_(gate)
    train_days, test_days = data.split_dates()
    pairs = data.examples(LANGUAGES, train_days, steps * batch_size, seed, data.form(tokenizer))
    history = train(model, tokenizer, pairs, steps=steps, batch_size=batch_size, learning_rate=rate, seed=seed, stretch=1, progress=False)
    unseen = {language: data.examples(language, test_days, test_dates, 1, data.form(tokenizer)) for language in LANGUAGES}
    return [round(record["loss"], 4) for record in history], {language: exact_match(model, tokenizer, unseen[language]) for language in LANGUAGES}


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m minillama.zero_init", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="whatever minillama.load opens")
    parser.add_argument("--out", required=True, help="the .jsonl file to write, one run a line")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each gate, start of the prompts and learning rate")
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument("--batch-size", type=int, default=16, help="dates per step")
    parser.add_argument("--test-dates", type=int, default=200, help="dates per language to measure on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    _, tokenizer = load(args.base, dtype, device)
    peak = (LEARNING_RATE if data.form(tokenizer) is data.LINE else LEARNING_RATE_OF_WORDS)["llama_adapter"]
    plan = [(gate, init, factor * peak, seed) for init in ("normal", "input") for gate in (0.0, 1.0) for factor in FACTORS for seed in range(args.seeds)]
    runs = []
    for gate, init, rate, seed in tqdm(plan, unit="run"):
        model, _ = load(args.base, dtype, device)
        losses, matches = learn(model, tokenizer, gate, init, rate, seed, args.steps, args.batch_size, args.test_dates)
        runs.append({"gate": gate, "init": init, "learning_rate": rate, "seed": seed, "losses": losses, "matches": matches})
    with replacing(args.out) as temporary:
        temporary.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    for gate, init, rate in dict.fromkeys(row[:3] for row in plan):
        means = [sum(run["matches"].values()) / len(LANGUAGES) for run in runs if (run["gate"], run["init"], run["learning_rate"]) == (gate, init, rate)]
        print(f"gate {gate:.0f}, prompts {init:6}, learning rate {rate:.4f}: {sum(means) / len(means):6.1%} ({min(means):.1%} to {max(means):.1%})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
