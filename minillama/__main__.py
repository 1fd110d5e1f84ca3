"""The command line: python -m minillama [adapt | pretrain | generate | compare | lessons | check]; with no word at all, adapt.

Each command is one function that can be read from top to bottom.
"""

import argparse
import ast
import contextlib
import inspect
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import data
from .adapters import METHODS, adapt, adapter_parameters, disabled, load_adapter, openings, save_adapter
from .device import pick_device, pick_dtype
from .figures import comparison_figure, save_figure, training_figure
from .files import write_json
from .generate import stream
from .gpt2 import GPT2, GPT2Config
from .llama import LLaMA, LLaMAConfig
from .papers import counts
from .pretrained import BASES, load, save
from .train import LEARNING_RATE, exact_match, train


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def table(rows, left=(0,)):
    """Lines of columns, those in `left` flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join(f"  {'  '.join(row)}".rstrip() for row in cells)


def teach(model, tokenizer, method, options, args, seed, metrics_file=None):
    """Adapts the model (method "full": trains it whole) to args.language on dates of the training half; its history."""
    torch.manual_seed(seed)
    if method == "full":
        model.float().requires_grad_(True)
    else:
        adapt(model, method, **options)
    train_days, _ = data.split_dates()
    pairs = data.examples(args.language, train_days, args.steps * args.batch_size, seed)
    return train(
        model, tokenizer, pairs, steps=args.steps, batch_size=args.batch_size, seed=seed, metrics_file=metrics_file,
        learning_rate=args.learning_rate or LEARNING_RATE[method], watch=openings,
    )  # fmt: skip


def open_base(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer = load(args.base, dtype, device)
    if tokenizer is None:
        raise ValueError(f"the folder {args.base} has no tokenizer.json, without which text cannot become ids: copy it there")
    size = count(model.parameters())
    print(f"{args.base}: {size:,} parameters · {device} · {str(dtype).removeprefix('torch.')} · {torch.get_num_threads()} threads · seed {args.seed}")
    return model, tokenizer


def run_adapt(args):
    start = time.perf_counter()
    data.locales(args.language)  # a wrong name ends here, before any work
    options = dict(args.option)
    model, tokenizer = open_base(args)
    size = count(model.parameters())
    out = Path(args.out or f"runs/{Path(args.base).name}-{args.method}-{args.language}")
    _, test_days = data.split_dates()
    foreign, english = (data.examples(language, test_days, args.test_dates, seed=1) for language in (args.language, "en"))

    probe = data.collate(english, tokenizer)[0].to(next(model.parameters()).device)
    with torch.no_grad():
        base_logits = model(probe)
    before = exact_match(model, tokenizer, foreign), exact_match(model, tokenizer, english)

    print(f"{args.method} learns {args.language}: {args.steps} steps of {args.batch_size} dates, the base frozen")
    history = teach(model, tokenizer, args.method, options, args, args.seed, out / "metrics.jsonl")

    after = exact_match(model, tokenizer, foreign), exact_match(model, tokenizer, english)
    with disabled(model), torch.no_grad():
        identical = torch.equal(model(probe), base_logits)
        off = exact_match(model, tokenizer, english)
    trained = count(adapter_parameters(model).values())
    save_adapter(model, out)
    save_figure(training_figure(history, f"{args.method} on {args.base}, {args.language}: {trained:,} of {size:,} parameters trained"), out / "training.png")

    print(f"\nExact match on {args.test_dates} dates never seen in training, by generation:\n")
    print(table([
        ("", "base", "adapted", "adapter disabled"),
        (args.language, f"{before[0]:.1%}", f"{after[0]:.1%}", ""),
        ("en", f"{before[1]:.1%}", f"{after[1]:.1%}", f"{off:.1%} ({'logits bit-identical' if identical else 'LOGITS DIFFER'})"),
    ]))  # fmt: skip
    file = out / "adapter_model.safetensors"
    print(f"\n  trained parameters  {trained:,} ({trained / size:.2%} of the base's {size:,})")
    print(f"  seconds             {time.perf_counter() - start:.0f}")
    print(f"  adapter             {file} ({file.stat().st_size / 1024:.0f} KiB)")
    print(f"  figure              {out / 'training.png'}")
    print(f'\nTry it: python -m minillama generate --base {args.base} --adapter {out} --prompt "{foreign[0][0]}"')
    if not identical:
        raise ValueError("with the adapter disabled the logits differ from the base's: this is a bug, please report it")


def run_generate(args):
    model, tokenizer = open_base(args)
    if args.adapter:
        load_adapter(model, args.adapter)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise ValueError("the prompt is empty; the model needs at least one token to continue")
    text, written = args.prompt, list(ids)
    known = len(tokenizer.decode(ids))
    print(args.prompt, end="", flush=True)
    prompt = torch.tensor([ids], device=next(model.parameters()).device, dtype=torch.int64)
    for new in stream(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.eos_id, args.seed):
        written.append(new.item())
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for its other half
            print(text[known:], end="", flush=True)
            known = len(text)
    print(end="" if text.endswith("\n") else "\n", flush=True)


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
    data.locales(args.language)
    model, tokenizer = open_base(args)
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    size, out = count(model.parameters()), Path(args.out or f"runs/compare-{Path(args.base).name}-{args.language}")
    _, test_days = data.split_dates()
    pairs = data.examples(args.language, test_days, args.test_dates, seed=1)
    rows = [{"method": "base", "parameters": 0, "matches": [exact_match(model, tokenizer, pairs)], "seconds": [0.0]}]
    for method in [*METHODS, "full"]:
        rows.append(row := {"method": method, "matches": [], "seconds": []})
        for seed in range(args.seed, args.seed + args.seeds):
            model, _ = load(args.base, dtype, device)
            print(f"{method}, seed {seed}")
            start = time.perf_counter()
            teach(model, tokenizer, method, {}, args, seed)
            row["seconds"].append(time.perf_counter() - start)
            row["matches"].append(exact_match(model, tokenizer, pairs))
            row["parameters"] = count(parameter for parameter in model.parameters() if parameter.requires_grad)
    title = f"{args.base} learns {args.language}: {args.steps} steps of {args.batch_size}, {args.seeds} seeds"
    write_json(out / "comparison.json", {"title": title, "rows": rows})
    save_figure(comparison_figure(rows, title), out / "comparison.png")
    print(f"\n{title}; exact match on {args.test_dates} unseen dates, mean (lowest to highest):\n")
    print(table([("method", "parameters", "share", "exact match", "seconds")] + [
        (row["method"], f"{row['parameters']:,}", f"{row['parameters'] / size:.2%}",
         f"{statistics.mean(row['matches']):.1%} ({min(row['matches']):.1%} to {max(row['matches']):.1%})", f"{statistics.mean(row['seconds']):.0f}")
        for row in rows
    ]))  # fmt: skip
    print(f"\nfigure: {out / 'comparison.png'}, its numbers: {out / 'comparison.json'}")


def run_check(args):
    """Prints one line per part, 'ok' or what is wrong and how to mend it; exit status 1 when anything is wrong."""
    problems = 0

    def report(part, verdict, remedy=None):
        nonlocal problems
        problems += remedy is not None
        print(f"  {'ok     ' if remedy is None else 'PROBLEM'}  {part}: {verdict}{'' if remedy is None else f'. {remedy}'}", flush=True)

    report("python", platform.python_version(), None if sys.version_info >= (3, 11) else "Needed is 3.11 or later")
    for package in ("torch", "numpy", "safetensors", "tokenizers", "Babel", "tqdm", "matplotlib"):
        try:
            report(package, version(package))
        except PackageNotFoundError:
            report(package, "not installed", "Run: pip install -r requirements.txt")
    device = pick_device(args.device)
    report("device", f"{device}, {torch.get_num_threads()} threads")
    report("dtype", f"{pick_dtype(args.dtype, device)} (--dtype {args.dtype})".replace("torch.", ""))
    _, test_days = data.split_dates()
    for name in ("dates-llama", "dates-gpt2"):
        try:
            model, tokenizer = load(name, device=device)
        except (ValueError, OSError) as error:
            report(name, str(error), f"Restore {BASES / name} from the repository")
            continue
        match = exact_match(model, tokenizer, data.examples("en", test_days, 200, seed=1))
        report(name, f"{match:.1%} of 200 unseen English dates", None if match >= 0.99 else f"Restore {BASES / name} from the repository")
        pairs = data.examples("fr", test_days, 64)
        ids = data.collate(pairs, tokenizer)[0].to(device)
        with torch.no_grad():
            closed = torch.equal(model(ids), adapt(model, "llama_adapter")(ids))
        train(model, tokenizer, pairs, steps=2, batch_size=32, learning_rate=0.1, progress=False)
        moved = all(parameter.abs().sum() > 0 for name, parameter in adapter_parameters(model).items() if name.endswith("gate"))
        report(f"{name} adapted", f"gate 0 {'is' if closed else 'IS NOT'} the base bit for bit, two steps {'open' if moved else 'DO NOT open'} every gate", None if closed and moved else "Please report this")
    print("everything works" if not problems else f"{problems} problem{'s' * (problems > 1)}")
    return 1 if problems else 0


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


def assignment(text):
    """"rank=4" -> ("rank", 4); a value that is no Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; needed is NAME=VALUE, such as prompt_length=10")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name, value


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
            sub.add_argument("--base", default="dates-llama", help="dates-llama, dates-gpt2, or a folder in Hugging Face's layout")
        if "training" in groups:
            sub.add_argument("--language", default="fr", help=f"{', '.join(data.LANGUAGES)}, or any locale of CLDR")
            sub.add_argument("--steps", type=positive, default=300, help="training steps")
            sub.add_argument("--batch-size", type=positive, default=64, help="dates per step")
            sub.add_argument("--learning-rate", type=float, help=f"peak of warm-up and cosine; None: {LEARNING_RATE}")
            sub.add_argument("--test-dates", type=positive, default=500, help="dates to measure on, never seen in training")
            sub.add_argument("--out", help="folder for what is written; None: one under runs/")
        return sub

    sub = command("adapt", run_adapt, "Teaches a frozen base the dates of another language.", "base", "training")
    sub.add_argument("--method", default="llama_adapter", choices=list(METHODS), help="adapter method")
    sub.add_argument("--option", type=assignment, action="append", default=[], metavar="NAME=VALUE", help=f"one of the method's own, as often as needed: {OPTIONS}")
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
    command("check", run_check, "Looks whether everything is in place: versions, device, bundled files, and a ten-second self-test.")
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
