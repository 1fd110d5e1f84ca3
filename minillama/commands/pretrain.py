"""Trains a base from scratch on English dates and writes its folder with a model card."""

import time

import torch

from .. import data
from ..checkpoints import save
from ..checkpoints.files import locked, write_text
from ..device import pick_device, pick_dtype
from ..gpt2 import GPT2, GPT2Config
from ..llama import LLaMA, LLaMAConfig
from ..train import exact_match, train
from . import count, keeper, refuse_full, resumed, table, write_history
from .arguments import add_keeping, add_machine, given, positive, rate, share


def add_arguments(parser):
    parser.add_argument("--model", default="llama", choices=("llama", "gpt2"), help="architecture (llama)")
    parser.add_argument(
        "--out", type=given, metavar="FOLDER", help="for config.json, model.safetensors, README.md, metrics.jsonl"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the base that --out already holds")
    parser.add_argument("--steps", type=positive, default=1500, metavar="N", help="training steps (1500)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="dates per step (64)")
    parser.add_argument(
        "--learning-rate", type=rate, default=1e-3, metavar="RATE", help="peak of warm-up and cosine (0.001)"
    )
    parser.add_argument(
        "--test-dates", type=positive, default=1000, metavar="N",
        help="dates per language to measure on, never seen in training (1000)",
    )  # fmt: skip
    parser.add_argument(
        "--typos", type=share, default=0.1, metavar="P",
        help="probability that a letter of every second prompt is replaced (0.1)",
    )  # fmt: skip
    add_keeping(parser)
    add_machine(parser)


def run(args):
    if args.resume:
        args = resumed(args, add_arguments)
        args.out = args.resume
    elif args.out is None:
        raise ValueError("--out is missing: needed is a folder for the base, or --resume FOLDER")
    else:
        refuse_full(args, "model.safetensors")
    with locked(args.out) as out:
        pretrain_into(out, args)


def pretrain_into(out, args):
    start = time.perf_counter()
    device = pick_device(args.device)
    half = args.dtype != "float32" and pick_dtype(args.dtype, device) == torch.bfloat16
    torch.manual_seed(args.seed)
    if args.model == "llama":
        config = LLaMAConfig(256, 128, 344, 4, 4, num_key_value_heads=2, max_position_embeddings=256)
        model = LLaMA(config).to(device)
    else:
        model = GPT2(GPT2Config(256, 128, 512, 4, 4, max_position_embeddings=256)).to(device)
    tokenizer, size = data.ByteTokenizer(), count(model.parameters())
    arithmetic = "bfloat16" if half else "float32"
    print(
        f"{args.model}: {size:,} parameters from scratch on English dates · {device} · {arithmetic} · seed {args.seed}"
    )
    train_days, test_days = data.split_dates()
    pairs = data.examples("en", train_days, args.steps * args.batch_size, args.seed)
    pairs = data.with_typos(pairs, args.typos, args.seed)
    with keeper(args, out, pairs) as keeping:
        history = train(
            model, tokenizer, pairs, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate,
            seed=args.seed, autocast=torch.bfloat16 if half else None, keeper=keeping,
        )  # fmt: skip
        save(model, out)
        write_history(out, history)
        keeping.remove()
    seconds = time.perf_counter() - start
    matches = {
        language: exact_match(model, tokenizer, data.examples(language, test_days, args.test_dates, seed=1))
        for language in ("en", *data.LANGUAGES)
    }
    rows = table([(language, f"{match:.1%}") for language, match in matches.items()])
    print(f"\nExact match on {args.test_dates:,} dates never seen in training:\n\n{rows}")
    print(f"\nwritten to {out} in {seconds:.0f} s")
    write_card(args, out, matches, seconds, size)


def write_card(args, out, matches, seconds, size):
    """README.md beside the weights: what the base is, the command that made it, and what it can do."""
    command = (
        f"python -m minillama pretrain --model {args.model} --out {args.out} --steps {args.steps} "
        f"--batch-size {args.batch_size} --learning-rate {args.learning_rate} --typos {args.typos} "
        f"--seed {args.seed} --dtype {args.dtype}"
    )
    bytes_ = (out / "model.safetensors").stat().st_size
    kind = "LLaMA with grouped queries" if args.model == "llama" else "GPT-2"
    where = f"{seconds:.0f} s on {torch.get_num_threads()} threads with torch {torch.__version__}"
    lines = [
        f"# {out.name}",
        "",
        f"A {kind} of {size:,} parameters that reads English dates and writes them as ISO 8601:",
        '`"March 3, 2021 = "` → `"2021-03-03\\n"`. A token is a byte. Made to be frozen and adapted; it knows nothing '
        "else.",
        "",
        "- Text: Unicode CLDR through Babel, en_US and en_GB, formats medium, long and full, days of 1900 to 2099; "
        f"letters of every second prompt replaced with probability {args.typos}.",
        f"- Training: {args.steps} steps of {args.batch_size} examples, seed {args.seed}, {where}:",
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
    write_text(out / "README.md", "\n".join(lines))
