"""The command line: python -m minillama [adapt | pretrain | generate | compare | lessons | check]; with no word at all, adapt.

Each command is one function that can be read from top to bottom.
"""

import argparse
import ast
import contextlib
import inspect
import statistics
import sys
import time
from pathlib import Path

import torch

from . import data
from .adapters import METHODS, adapt, adapter_parameters, disabled, load_adapter, openings, save_adapter
from .check import check
from .device import peak_memory, pick_device, pick_dtype
from .figures import comparison_figure, save_figure, training_figure
from .files import FileError, write_json
from .generate import stream
from .gpt2 import GPT2, GPT2Config
from .llama import LLaMA, LLaMAConfig
from .papers import counts
from .pretrained import load, save
from .tokenizer import pieces
from .train import LEARNING_RATE, LEARNING_RATE_OF_WORDS, exact_match, mean_loss, train


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def table(rows, left=(0,)):
    """Lines of columns, those in `left` flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join(f"  {'  '.join(row)}".rstrip() for row in cells)


def teach(model, tokenizer, method, options, pairs, args, seed, metrics_file=None):
    """Adapts the model (method "full": trains it whole) on pairs; the history."""
    words = data.form(tokenizer) is data.WORDS
    torch.manual_seed(seed)
    if method == "full":
        model.float().requires_grad_(True)
    else:
        adapt(model, method, **({"init": "input"} if words and method == "llama_adapter" else {}) | options)
    rate = args.learning_rate or (LEARNING_RATE_OF_WORDS if words else LEARNING_RATE)[method]
    return train(
        model, tokenizer, pairs, steps=args.steps, batch_size=args.batch_size, learning_rate=rate, seed=seed,
        checkpointing=args.checkpointing, stretch=1 if words else 16, metrics_file=metrics_file, watch=openings,
    )  # fmt: skip


def settle(args, model, tokenizer):
    """Fills in what the command line left open: a small base of bytes and a real one of words differ."""
    words, weight = data.form(tokenizer) is data.WORDS, model.embed_tokens.weight
    for name, values in UNSETTLED.items():
        if getattr(args, name) is None:
            setattr(args, name, values[words])
    if args.checkpointing is None:  # where memory is dear and arithmetic cheap
        args.checkpointing = words and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def train_dates(args, tokenizer, seed):
    return data.examples(args.languages, data.split_dates()[0], args.steps * args.batch_size, seed, data.form(tokenizer))


def test_dates(args, tokenizer, languages):
    """{language: unseen pairs}"""
    return {language: data.examples(language, data.split_dates()[1], args.test_dates, 1, data.form(tokenizer)) for language in languages}


def own_pairs(args, tokenizer):
    """(training pairs, {"held out": unseen pairs}) of args.data as ids, after a line on what is there."""
    pairs, empty = data.read_pairs(args.data)
    kept, held = data.hold_out(pairs, args.test_dates)
    lengths = sorted(len(prompt) + len(answer) for prompt, answer in data.encode(pairs, tokenizer, chat=args.chat))
    print(
        f"{args.data}: {len(pairs):,} pairs, {len(held):,} of them held out; median {statistics.median_low(lengths)} tokens, longest {lengths[-1]:,}; "
        f"{sum(length > args.max_length for length in lengths):,} cut to {args.max_length:,} tokens; {empty:,} left out, their prompt or response empty"
    )
    train_on, test_on = (data.encode(part, tokenizer, args.max_length, args.chat) for part in (kept, held))
    return train_on, {"held out": test_on}


def open_base(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer = load(args.base, dtype, device)
    if tokenizer is None:
        raise ValueError(f"{args.base} has no tokenizer, without which text cannot become ids: copy its tokenizer.json into the folder")
    size = count(model.parameters())
    print(f"{args.base}: {size:,} parameters · {device} · {str(dtype).removeprefix('torch.')} · {torch.get_num_threads()} threads · seed {args.seed}")
    return model, tokenizer


def run_adapt(args):
    start = time.perf_counter()
    for language in args.languages:
        data.locales(language)  # a wrong name ends here, before any work
    if args.data is not None and not Path(args.data).exists():
        raise FileError(f"{args.data} is missing: needed is a .jsonl file or a folder of them")
    model, tokenizer = open_base(args)
    if args.chat and (args.data is None or getattr(tokenizer, "template", None) is None):
        raise ValueError(f"--chat puts the prompts of --data into a chat template, and {'there is no --data' if args.data is None else f'{args.base} has none'}: leave --chat out")
    settle(args, model, tokenizer)
    with torch.device("meta"):
        shapes = type(model)(model.config)
    adapt(shapes, args.method, **dict(args.option))  # a wrong option ends here, before any work
    size, device = count(model.parameters()), next(model.parameters()).device
    if args.data is None:
        subject, pairs = ", ".join(args.languages), train_dates(args, tokenizer, args.seed)
        tests = test_dates(args, tokenizer, dict.fromkeys([*args.languages, "en"]))
    else:
        subject, (pairs, tests) = Path(args.data).stem, own_pairs(args, tokenizer)
    out = Path(args.out or f"runs/{Path(args.base).name}-{args.method}-{subject.replace(', ', '-')}")
    kept, at_once = ("en", 64) if args.data is None else ("held out", args.batch_size)  # kept: measured with the adapter disabled too

    def measure():
        matches = {name: exact_match(model, tokenizer, unseen, at_once) for name, unseen in tests.items()}
        return matches, mean_loss(model, tokenizer, tests[kept], at_once) if args.data is not None else None

    probe = data.collate(tests[kept][:at_once], tokenizer)[0].to(device)

    @torch.no_grad()
    def last_logits():
        return model.lm_head(model.hidden(probe)[:, -1])

    base_logits = last_logits()
    print(f"the base answers {sum(map(len, tests.values())):,} unseen prompts", flush=True)
    before, loss_before = measure()

    print(f"{args.method} learns {subject}: {args.steps} steps of {args.batch_size}, the base frozen")
    history = teach(model, tokenizer, args.method, dict(args.option), pairs, args, args.seed, out / "metrics.jsonl")

    after, loss_after = measure()
    with disabled(model):
        identical = torch.equal(last_logits(), base_logits)
        off = exact_match(model, tokenizer, tests[kept], at_once)
    trained = count(adapter_parameters(model).values())
    save_adapter(model, out)
    save_figure(training_figure(history, f"{args.method} on {args.base}, {subject}: {trained:,} of {size:,} parameters trained"), out / "training.png")

    verdict = f"{off:.1%} ({'logits bit-identical' if identical else 'LOGITS DIFFER'})"
    rows = [(name, f"{before[name]:.1%}", f"{after[name]:.1%}", verdict if name == kept else "") for name in tests]
    if args.data is None and len(args.languages) > 1:
        rows.append((f"mean of {len(args.languages)}", *(f"{statistics.mean(matches[name] for name in args.languages):.1%}" for matches in (before, after)), ""))
    print(f"\nExact match on {len(tests[kept]):,} {'dates' if args.data is None else 'prompts'} never seen in training, by generation:\n")
    print(table([("", "base", "adapted", "adapter disabled"), *rows]))
    file, peak = out / "adapter_model.safetensors", peak_memory(device)
    if args.data is not None:
        print(f"\n  answer loss         {loss_before:.3f} nats per token before, {loss_after:.3f} after", end="")
    print(f"\n  trained parameters  {trained:,} ({trained / size:.2%} of the base's {size:,})")
    print(f"  seconds             {time.perf_counter() - start:.0f} ({history[-1]['seconds']:.0f} of training)")
    if peak is not None:
        print(f"  peak memory         {peak / 1e9:.2f} GB {'on the GPU' if device.type == 'cuda' else 'for the whole process'}")
    print(f"  adapter             {file} ({file.stat().st_size / 1024:.0f} KiB)")
    print(f"  figure              {out / 'training.png'}")
    if args.data is None:
        print(f'\nTry it: python -m minillama generate --base {args.base} --adapter {out} --prompt "{next(iter(tests.values()))[0][0]}"')
    if not identical:
        raise ValueError("with the adapter disabled the logits differ from the base's: this is a bug, please report it")


def run_generate(args):
    model, tokenizer = open_base(args)
    if args.adapter:
        load_adapter(model, args.adapter)
    if args.chat:
        if getattr(tokenizer, "template", None) is None:
            raise ValueError(f"{args.base} has no chat template, since it was not taught to answer: leave --chat out, and it continues the prompt")
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": args.prompt}]), special=True)
    else:
        ids = tokenizer.encode(args.prompt)
    if not ids:
        raise ValueError("the prompt is empty; the model needs at least one token to continue")
    print("" if args.chat else args.prompt, end="", flush=True)
    prompt = torch.tensor([ids], device=next(model.parameters()).device, dtype=torch.int64)
    start, drawn = time.perf_counter(), []

    def shown():
        for id in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.eos_id, args.seed):
            drawn.append(id.item())
            if drawn[-1] != tokenizer.eos_id:
                yield drawn[-1]

    for piece in pieces(tokenizer, ids, shown()):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"{len(drawn)} tokens in {seconds:.1f} s: {len(drawn) / seconds:.1f} tokens/s", file=sys.stderr)


def run_pretrain(args):
    start = time.perf_counter()
    device, out = pick_device(args.device), Path(args.out)
    autocast = torch.bfloat16 if args.dtype != "float32" and pick_dtype(args.dtype, device) == torch.bfloat16 else None
    torch.manual_seed(args.seed)
    if args.model == "llama":
        config = LLaMAConfig(256, 128, 344, 4, 4, num_key_value_heads=2, max_position_embeddings=256)
    else:
        config = GPT2Config(256, 128, 512, 4, 4, max_position_embeddings=256)
    model, tokenizer = (LLaMA if args.model == "llama" else GPT2)(config).to(device), data.ByteTokenizer()
    print(f"{args.model}: {count(model.parameters()):,} parameters from scratch on English dates · {device} · {autocast or torch.float32} · seed {args.seed}")
    train_days, test_days = data.split_dates()
    pairs = data.with_typos(data.examples("en", train_days, args.steps * args.batch_size, args.seed), args.typos, args.seed)
    train(
        model, tokenizer, pairs, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate,
        seed=args.seed, autocast=autocast, metrics_file=out / "metrics.jsonl",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    matches = {language: exact_match(model, tokenizer, data.examples(language, test_days, args.test_dates, seed=1)) for language in ("en", *data.LANGUAGES)}
    save(model, out)
    rows = [(language, f"{match:.1%}") for language, match in matches.items()]
    print(f"\nExact match on {args.test_dates:,} dates never seen in training:\n\n{table(rows)}\n\nwritten to {out} in {seconds:.0f} s")
    write_card(args, out, matches, seconds, count(model.parameters()))


def write_card(args, out, matches, seconds, size):
    """README.md beside the weights: what the base is, the command that made it, and what it can do."""
    command = f"python -m minillama pretrain --model {args.model} --out {args.out} --steps {args.steps} --batch-size {args.batch_size} --learning-rate {args.learning_rate} --typos {args.typos} --seed {args.seed} --dtype {args.dtype}"
    bytes_ = (out / "model.safetensors").stat().st_size
    lines = [
        f"# {out.name}",
        "",
        f"A {'LLaMA with grouped queries' if args.model == 'llama' else 'GPT-2'} of {size:,} parameters that reads English dates and writes them as ISO 8601:",
        '`"March 3, 2021 = "` → `"2021-03-03\\n"`. A token is a byte. Made to be frozen and adapted; it knows nothing else.',
        "",
        f"- Text: Unicode CLDR through Babel, en_US and en_GB, formats medium, long and full, days of 1900 to 2099; letters of every second prompt replaced with probability {args.typos}.",
        f"- Training: {args.steps} steps of {args.batch_size} examples, seed {args.seed}, {seconds:.0f} s on {torch.get_num_threads()} threads with torch {torch.__version__}:",
        f"  `{command}`",
        f"- Size: {bytes_:,} bytes, float32. Licence: MIT, as the project.",
        "",
        f"Exact match on {args.test_dates:,} dates never seen in training, by greedy generation:",
        "",
        "| language | exact match |",
        "|---|---|",
        *(f"| {language} | {match:.1%} |" for language, match in matches.items()),
        "",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def run_compare(args):
    if args.papers:
        print("Trained parameters, computed from the real shapes, beside the papers' words:\n")
        print(table([("method", "options", "model", "computed", "paper")] + [(*row[:3], f"{row[3]:,}", row[4]) for row in counts()], left=(0, 1, 2, 4)))
        return
    for language in args.languages:
        data.locales(language)
    model, tokenizer = open_base(args)
    settle(args, model, tokenizer)
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    size, out = count(model.parameters()), Path(args.out or f"runs/compare-{Path(args.base).name}-{'-'.join(args.languages)}")

    def mean_match():
        return statistics.mean(exact_match(model, tokenizer, unseen, 64) for unseen in test_dates(args, tokenizer, args.languages).values())

    rows = [{"method": "base", "parameters": 0, "matches": [mean_match()], "seconds": [0.0]}]
    for method in [*METHODS, "full"]:
        rows.append(row := {"method": method, "matches": [], "seconds": []})
        for seed in range(args.seed, args.seed + args.seeds):
            model, _ = load(args.base, dtype, device)
            print(f"{method}, seed {seed}")
            start = time.perf_counter()
            teach(model, tokenizer, method, {}, train_dates(args, tokenizer, seed), args, seed)
            row["seconds"].append(time.perf_counter() - start)
            row["matches"].append(mean_match())
            row["parameters"] = count(parameter for parameter in model.parameters() if parameter.requires_grad)
    title = f"{Path(args.base).name} learns {', '.join(args.languages)}: {args.steps} steps of {args.batch_size}, {args.seeds} seeds"
    write_json(out / "comparison.json", {"title": title, "rows": rows})
    save_figure(comparison_figure(rows, title), out / "comparison.png")
    print(f"\n{title}; exact match on {args.test_dates} unseen dates each, mean (lowest to highest):\n")
    print(table([("method", "parameters", "share", "exact match", "seconds")] + [
        (row["method"], f"{row['parameters']:,}", f"{row['parameters'] / size:.2%}",
         f"{statistics.mean(row['matches']):.1%} ({min(row['matches']):.1%} to {max(row['matches']):.1%})", f"{statistics.mean(row['seconds']):.0f}")
        for row in rows
    ]))  # fmt: skip
    print(f"\nfigure: {out / 'comparison.png'}, its numbers: {out / 'comparison.json'}")


def run_lessons(args):
    from . import notebooks  # needs jupyter, which nothing else here does

    for path in notebooks.find(args.names):
        print(f"{path.name} …", end=" ", flush=True)
        notebook, seconds = notebooks.execute(path)
        if not args.check:
            notebooks.store(path, notebook, seconds)
        print(f"{seconds:.0f} s", flush=True)


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; needed is 1 or more")
    return number


def at_least_two(text):
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("1 is too small; needed is room for a token of the prompt and one of the response")
    return int(text)


def names(text):
    return list(dict.fromkeys(text.split(",")))


def assignment(text):
    """"rank=4" -> ("rank", 4); a value that is no Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; needed is NAME=VALUE, such as prompt_length=10")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name, value


# What the command line may leave open: with a small base of bytes, and with a real one of words.
UNSETTLED = {"steps": (300, 120), "batch_size": (64, 16), "test_dates": (500, 200)}
OPTIONS = "; ".join(f"{method}: {', '.join(list(inspect.signature(module.attach).parameters)[1:])}" for method, module in METHODS.items())


def parser():
    top = argparse.ArgumentParser(prog="python -m minillama", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", metavar="command")

    def command(name, run, help_, *groups):
        sub = commands.add_parser(name, help=help_, description=help_, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="auto", help="auto takes CUDA, then the CPU; or cpu, cuda, cuda:1, mps")
        sub.add_argument("--dtype", default="auto", help="auto takes bfloat16 where the hardware multiplies it natively; or float32, bfloat16")
        sub.add_argument("--seed", type=int, default=0, help="repeats a run bit for bit on one CPU machine")
        if "base" in groups:
            sub.add_argument("--base", default="dates-llama", help="dates-llama, dates-gpt2, smollm2, a folder in Hugging Face's layout, a hub name (owner/model), or a .gguf file")
        if "training" in groups:
            sub.add_argument("--languages", "--language", type=names, default="fr", help=f"one or several, such as en,fr,fi: en, {', '.join(data.LANGUAGES)}, or any locale of CLDR")
            left_open = {name: f"None: {small}, with a base of words {real}" for name, (small, real) in UNSETTLED.items()}
            sub.add_argument("--steps", type=positive, help=f"training steps; {left_open['steps']}")
            sub.add_argument("--batch-size", type=positive, help=f"examples per step; {left_open['batch_size']}")
            sub.add_argument("--learning-rate", type=float, help=f"peak of warm-up and cosine; None: {LEARNING_RATE}, with a base of words {LEARNING_RATE_OF_WORDS}")
            sub.add_argument("--test-dates", type=positive, help=f"dates per language to measure on, never seen in training; {left_open['test_dates']}")
            sub.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="less memory for about a third more time: layers are computed again for the backward pass; None: for a base of words in bfloat16 on the CPU")
            sub.add_argument("--out", help="folder for what is written; None: one under runs/")
        return sub

    sub = command("adapt", run_adapt, "Teaches a frozen base the dates of other languages, or a task of your own (--data).", "base", "training")
    sub.add_argument("--method", default="llama_adapter", choices=list(METHODS), help="adapter method")
    sub.add_argument("--option", type=assignment, action="append", default=[], metavar="NAME=VALUE", help=f"one of the method's own, as often as needed: {OPTIONS}")
    sub.add_argument("--data", help='instead of dates: a .jsonl file, or a folder of them, of lines {"prompt": "...", "response": "..."}; a tenth is held out')
    sub.add_argument("--max-length", type=at_least_two, default=512, help="tokens of prompt and response together; where there are more, the prompt loses its beginning")
    sub.add_argument("--chat", action="store_true", help="prompts of --data are questions, put into the base's chat template; else prompt and response stand side by side as they are")
    sub = command("pretrain", run_pretrain, "Trains a base from scratch on English dates and writes its folder with a model card.")
    sub.add_argument("--model", default="llama", choices=("llama", "gpt2"), help="architecture")
    sub.add_argument("--out", required=True, help="folder for config.json, model.safetensors, README.md and metrics.jsonl")
    sub.add_argument("--steps", type=positive, default=1500, help="training steps")
    sub.add_argument("--batch-size", type=positive, default=64, help="dates per step")
    sub.add_argument("--learning-rate", type=float, default=1e-3, help="peak of warm-up and cosine")
    sub.add_argument("--test-dates", type=positive, default=1000, help="dates per language to measure on, never seen in training")
    sub.add_argument("--typos", type=float, default=0.1, help="probability that a letter of every second prompt is replaced")
    sub = command("generate", run_generate, "Continues a prompt, token by token.", "base")
    sub.add_argument("--prompt", required=True, help='the text to continue, such as "3 mars 2021 = "')
    sub.add_argument("--chat", action="store_true", help="the prompt is a question to a model with a chat template; print its answer")
    sub.add_argument("--adapter", help="folder that adapt has written, or one of the PEFT library")
    sub.add_argument("--max-new-tokens", type=int, default=40, help="stops there, or at the end token")
    sub.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    sub.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    sub.add_argument("--top-p", type=float, help="draw from the fewest likeliest tokens whose probabilities reach p")
    sub = command("compare", run_compare, "Trains every method beside full fine-tuning on one language: a table and a picture.", "base", "training")
    sub.add_argument("--papers", action="store_true", help="instead: the papers' parameter counts, computed from the real shapes")
    sub.add_argument("--seeds", type=positive, default=3, help="runs per method")
    sub = command("lessons", run_lessons, "Executes the notebooks of lessons/ from clean and stores their outputs.")
    sub.add_argument("names", nargs="*", help='the lessons to execute, by the beginning of their names, such as 03; none: all')
    sub.add_argument("--check", action="store_true", help="only execute: store nothing")
    command("check", check, "Looks whether everything is in place: versions, device, bundled files, and a ten-second self-test.")
    return top


def main(argv):
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["adapt", *argv]
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"minillama: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminillama: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
