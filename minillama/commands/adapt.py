"""Teaches a frozen base the dates of other languages, or a task of your own: before and after, the adapter's file, a
picture."""

import argparse
import ast
import contextlib
import statistics
import time
from pathlib import Path

import torch

from .. import data, distributed
from ..adapters import METHODS, adapt, adapter_parameters, disabled, save_adapter
from ..adapters.options import accepted, known_options
from ..adapters.seeing import shown_by
from ..adapters.storage import WEIGHTS, fingerprint
from ..checkpoints.files import FileError, locked
from ..checkpoints.pairs import read_pairs
from ..checkpoints.progress import CHECKPOINT
from ..device import peak_memory, shapes_only
from ..train import exact_match, mean_loss
from . import (
    count,
    is_real,
    keeper,
    open_base,
    prepare,
    refuse_full,
    resumed,
    settle,
    table,
    teach,
    test_dates,
    train_dates,
    write_history,
)
from .arguments import OF_TASKS, add_base, add_keeping, add_machine, add_training, at_least_two, given
from .pictures import draw_answers, options_of, picture_rows


def assignment(text):
    """ "rank=4" -> ("rank", 4); a value that is no Python literal stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='; needed is NAME=VALUE, such as prompt_length=10")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name, value


def add_arguments(parser):
    add_base(parser)
    add_training(parser)
    options = "; ".join(f"{name}: {', '.join(known_options(method.attach))}" for name, method in METHODS.items())
    parser.add_argument("--method", choices=list(METHODS), help="(llama_adapter; image_prompt with --task)")
    parser.add_argument(
        "--task", choices=list(OF_TASKS), help="instead of dates in other languages: dates in pictures, of eight "
        "handwritten digits or of a calendar's page"
    )  # fmt: skip
    parser.add_argument(
        "--option", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help=f"one of the method's own, as often as needed: {options}",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="PATH",
        help='instead of dates: a .jsonl file, or a folder of them, of lines {"prompt": "...", "response": "..."}; a '
        "tenth is held out",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=at_least_two, default=512, metavar="N",
        help="tokens of prompt and response together; where there are more, the prompt loses its beginning (512)",
    )  # fmt: skip
    parser.add_argument(
        "--pack", type=at_least_two, metavar="N",
        help="fill rows of N tokens with several examples, none of which sees another; --batch-size counts rows then. "
        "Worth it where lengths differ much",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true",
        help="prompts of --data are questions, put into the base's chat template; else prompt and response stand side "
        "by side as they are",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=given, metavar="FOLDER", help="for what is written (the next free one under runs/)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that --out already holds")
    parser.add_argument(
        "--shard", action="store_true", help="cut the base's weights among the processes that torchrun started"
    )
    add_keeping(parser)
    add_machine(parser)


def pick_folder(args, subject):
    """The folder to write to: --resume, --out, or the first under runs/ that holds neither an adapter nor a run."""
    if args.resume:
        return Path(args.resume)
    if args.out is not None:
        refuse_full(args, WEIGHTS)
        return Path(args.out)
    first = Path(f"runs/{Path(args.base).name}-{args.method}-{subject.replace(', ', '-')}")
    folder, number = first, 1
    while (folder / WEIGHTS).exists() or (folder / CHECKPOINT).exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def own_pairs(args, tokenizer):
    """(training pairs, {"held out": unseen pairs}) of args.data as ids, after a line on what is there."""
    pairs, empty = read_pairs(args.data)
    kept, held = data.hold_out(pairs, args.test_dates)
    lengths = sorted(len(prompt) + len(answer) for prompt, answer in data.encode(pairs, tokenizer, chat=args.chat))
    cut = sum(length > args.max_length for length in lengths)
    print(
        f"{args.data}: {len(pairs):,} pairs, {len(held):,} of them held out; "
        f"median {statistics.median_low(lengths)} tokens, longest {lengths[-1]:,}; "
        f"{cut:,} cut to {args.max_length:,} tokens; {empty:,} left out, their prompt or response empty"
    )
    train_on, test_on = (data.encode(part, tokenizer, args.max_length, args.chat) for part in (kept, held))
    return train_on, {"held out": test_on}


def refuse_early(args):
    """What is wrong with the arguments alone ends here, before any work."""
    for language in args.languages:
        data.locales(language)
    if (args.task is None) == (args.method == "image_prompt"):
        raise ValueError(
            f"the method is {args.method} and the task {args.task}: image_prompt takes pictures, which --task "
            f"{' or '.join(OF_TASKS)} has, and no other method does"
        )
    if args.task is not None and args.data is not None:
        raise ValueError("--task and --data say two things to learn: leave one of them out")
    if args.data is not None and not Path(args.data).exists():
        raise FileError(f"{args.data} is missing: needed is a .jsonl file or a folder of them")
    attach = METHODS[args.method].attach
    if unknown := [name for name, _ in args.option if name not in known_options(attach)]:
        raise ValueError(f"{args.method} has no option {unknown[0]!r}; it has {', '.join(known_options(attach))}")
    accepted(attach, dict(args.option))
    if args.chat and args.data is None:
        raise ValueError(
            "--chat puts the prompts of --data into a chat template, and there is no --data: leave --chat out"
        )


def run(args):
    start = time.perf_counter()
    if args.resume:
        args = resumed(args, add_arguments)
    args.method = args.method or ("llama_adapter" if args.task is None else "image_prompt")
    refuse_early(args)
    subject = args.task or (", ".join(args.languages) if args.data is None else Path(args.data).stem)
    folder = distributed.same(pick_folder(args, subject))
    with locked(folder) if distributed.rank() == 0 else contextlib.nullcontext(folder) as out:
        adapt_into(out, args, subject, start)


def adapt_into(out, args, subject, start):
    model, tokenizer = open_base(args)
    if args.chat and getattr(tokenizer, "template", None) is None:
        raise ValueError(
            f"--chat puts the prompts of --data into a chat template, and {args.base} has none: leave --chat out"
        )
    settle(args, model, tokenizer)
    with shapes_only():
        shapes = type(model)(model.config)
    size = count(shapes.parameters())
    options = options_of(args.task, dict(args.option)) if args.task else dict(args.option)
    adapt(shapes, args.method, **options)  # a wrong option ends here, before any work
    device = next(model.parameters()).device
    around, pictures = contextlib.nullcontext, None
    if args.task is not None:
        pairs, seen, pictures = picture_rows(args)
        tests = {args.task: seen} | test_dates(args, tokenizer, ["en"])
    elif args.data is None:
        pairs = train_dates(args, tokenizer, args.seed)
        tests = test_dates(args, tokenizer, dict.fromkeys([*args.languages, "en"]))
    else:
        pairs, tests = own_pairs(args, tokenizer)
    if args.pack is not None:
        next(
            data.packed_batches(data.encode(pairs, tokenizer), args.batch_size, args.pack)
        )  # a row too short ends here
    # what is measured with the adapter disabled too, and how many prompts are answered at once
    kept, at_once = ("en", 128) if args.data is None else ("held out", args.batch_size)

    def measure():
        matches = {name: exact_match(model, tokenizer, unseen, at_once, around) for name, unseen in tests.items()}
        return matches, mean_loss(model, tokenizer, tests[kept], at_once) if args.data is not None else None

    probe = data.collate(tests[kept][:at_once], tokenizer)[0].to(device)

    @torch.no_grad()
    def last_logits():
        return model.lm_head(model.hidden(probe)[:, -1])

    base_logits = last_logits()
    print(f"the base answers {sum(map(len, tests.values())):,} unseen prompts", flush=True)
    before, loss_before = measure()

    rows = "" if args.pack is None else f" rows of {args.pack} tokens"
    print(f"{args.method} learns {subject}: {args.steps} steps of {args.batch_size}{rows}, the base frozen", flush=True)
    model.base_fingerprint = fingerprint(model)  # while the weights are whole
    prepare(model, tokenizer, args.method, options, args, args.seed)
    around = shown_by(model) if args.task else around
    if args.shard:  # the weights lie elsewhere in memory now, where a product may round otherwise
        with disabled(model):
            base_logits = last_logits()
    with keeper(args, out, [row[:2] for row in pairs], base_fingerprint=model.base_fingerprint) as keeping:
        history = teach(model, tokenizer, args.method, pairs, args, args.seed, keeping, around)
        if distributed.rank() == 0:
            save_adapter(model, out)
            write_history(out, history)
            keeping.remove()

    after, loss_after = measure()
    unseeing = torch.equal(last_logits(), base_logits)  # to text alone, for a method that takes pictures
    with disabled(model):
        identical = torch.equal(last_logits(), base_logits)
        off = exact_match(model, tokenizer, tests[kept], at_once)
    trained = count(adapter_parameters(model).values())
    if distributed.rank() > 0:
        return
    draw(history, f"{args.method} on {args.base}, {subject}: {trained:,} of {size:,} parameters trained", out)

    verdict = f"{off:.1%} ({'logits bit-identical' if identical else 'LOGITS DIFFER'})"
    rows = [(name, f"{before[name]:.1%}", f"{after[name]:.1%}", verdict if name == kept else "") for name in tests]
    if pictures is not None:
        title = f"{after[args.task]:.1%} of unseen dates read exactly: ten of them"
        draw_answers(model, tokenizer, tests[args.task], pictures, title, out)
    elif args.data is None and len(args.languages) > 1:
        means = (f"{statistics.mean(matches[name] for name in args.languages):.1%}" for matches in (before, after))
        rows.append((f"mean of {len(args.languages)}", *means, ""))
    what = "dates" if args.data is None else "prompts"
    print(f"\nExact match on {len(tests[kept]):,} {what} never seen in training, by generation:\n")
    print(table([("", "base", "adapted", "adapter disabled"), *rows]))
    file, peak = out / WEIGHTS, peak_memory(device)
    if args.data is not None:
        print(f"\n  answer loss         {loss_before:.3f} nats per token before, {loss_after:.3f} after", end="")
    print(f"\n  trained parameters  {trained:,} ({trained / size:.2%} of the base's {size:,})")
    print(f"  seconds             {time.perf_counter() - start:.0f} ({history[-1]['seconds']:.0f} of training)")
    if peak is not None:
        where = "on the GPU" if device.type == "cuda" else "for the whole process"
        print(f"  peak memory         {peak / 1e9:.2f} GB {where}")
    print(f"  adapter             {file} ({file.stat().st_size / 1024:.0f} KiB)")
    print(f"  figure              {out / 'training.png'}")
    if pictures is not None:
        print(f"  ten test images     {out / 'pictures.png'}")
        print(f"  text alone          logits {'bit-identical to' if unseeing else 'DIFFER from'} the base's")
    if args.data is None:
        prompt, real = next(iter(tests.values()))[0][0], is_real(tokenizer)
        base = f" --base {args.base}" if real or args.base != "dates-llama" else ""
        image = f" --image {out / 'example.png'}" if args.task else ""
        print(f'\nTry it: python -m minillama generate{base} --adapter {out}{image} --prompt "{prompt}"')
    if not identical:
        raise ValueError("with the adapter disabled the logits differ from the base's: this is a bug, please report it")


def draw(history, title, out):
    from ..course.plots import training_figure  # late: matplotlib is slow to import
    from ..course.style import save_figure

    save_figure(training_figure(history, title), out / "training.png")
