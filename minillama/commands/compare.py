"""Trains every method beside full fine-tuning on one language or several: a table and a picture."""

import statistics
import time
from pathlib import Path

from .. import data
from ..adapters import TEXT_METHODS
from ..checkpoints import load
from ..checkpoints.files import write_json
from ..train import exact_match
from . import count, open_base, prepare, settle, table, teach, test_dates, train_dates
from .arguments import add_base, add_machine, add_training, given, positive


def add_arguments(parser):
    add_base(parser)
    add_training(parser)
    parser.add_argument(
        "--papers", action="store_true", help="instead: the papers' parameter counts from the real shapes"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs per method (3)")
    parser.add_argument("--out", type=given, metavar="FOLDER", help="for what is written (one under runs/)")
    add_machine(parser)


def run(args):
    if args.papers:
        return print_counts()
    from ..course.plots import comparison_figure  # late: matplotlib is slow to import
    from ..course.style import save_figure

    if args.quantize:
        raise ValueError("compare trains all weights too, which must then be whole: leave --quantize out")
    for language in args.languages:
        data.locales(language)
    model, tokenizer = open_base(args)
    settle(args, model, tokenizer)
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    name = Path(args.base).name
    size, out = count(model.parameters()), Path(args.out or f"runs/compare-{name}-{'-'.join(args.languages)}")

    def mean_match():
        unseen = test_dates(args, tokenizer, args.languages)
        return statistics.mean(exact_match(model, tokenizer, pairs, 64) for pairs in unseen.values())

    rows = [{"method": "base", "parameters": 0, "matches": [mean_match()], "seconds": [0.0]}]
    for method in [*TEXT_METHODS, "full"]:
        rows.append(row := {"method": method, "matches": [], "seconds": []})
        for seed in range(args.seed, args.seed + args.seeds):
            model, _ = load(args.base, dtype, device)
            print(f"{method}, seed {seed}")
            start = time.perf_counter()
            prepare(model, tokenizer, method, {}, args, seed)
            teach(model, tokenizer, method, train_dates(args, tokenizer, seed), args, seed)
            row["seconds"].append(time.perf_counter() - start)
            row["matches"].append(mean_match())
            row["parameters"] = count(parameter for parameter in model.parameters() if parameter.requires_grad)
    languages = ", ".join(args.languages)
    title = f"{name} learns {languages}: {args.steps} steps of {args.batch_size}, {args.seeds} seeds"
    write_json(out / "comparison.json", {"title": title, "rows": rows})
    save_figure(comparison_figure(rows, title), out / "comparison.png")
    print(f"\n{title}; exact match on {args.test_dates} unseen dates each, mean (lowest to highest):\n")
    cells = [
        (
            row["method"], f"{row['parameters']:,}", f"{row['parameters'] / size:.2%}",
            f"{statistics.mean(row['matches']):.1%} ({min(row['matches']):.1%} to {max(row['matches']):.1%})",
            f"{statistics.mean(row['seconds']):.0f}",
        )
        for row in rows
    ]  # fmt: skip
    print(table([("method", "parameters", "share", "exact match", "seconds"), *cells]))
    print(f"\nfigure: {out / 'comparison.png'}, its numbers: {out / 'comparison.json'}")


def print_counts():
    from ..course.papers import counts

    print("Trained parameters, computed from the real shapes, beside what the papers say:\n")
    rows = [(*row[:3], f"{row[3]:,}", row[4]) for row in counts()]
    print(table([("method", "options", "model", "computed", "paper"), *rows], left=(0, 1, 2, 4)))
