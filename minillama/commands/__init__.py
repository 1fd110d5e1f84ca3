"""What each word of the command line does, a module each: `add_arguments(parser)` and `run(arguments)`; and what they
share."""

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import torch

from .. import adapters, data, distributed
from ..checkpoints import load
from ..checkpoints.files import FileError, write_text
from ..checkpoints.progress import CHECKPOINT, Keeper, read_settings
from ..device import pick_device, pick_dtype, shapes_only
from ..train import train
from .arguments import LEFT_OPEN, OF_TASKS


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def table(rows, left=(0,)):
    """Lines of columns, those in `left` flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    ]
    return "\n".join(f"  {'  '.join(row)}".rstrip() for row in cells)


def is_real(tokenizer):
    """Whether a base is a real one, in contrast to the small ones of bytes."""
    return data.form(tokenizer) is data.LABELLED


def open_base(args):
    """(model, tokenizer) of args.base, after a line on what was opened."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer = load(args.base, dtype, device, args.quantize)
    if tokenizer is None:
        raise ValueError(
            f"{args.base} has no tokenizer, without which text cannot become ids: copy its tokenizer.json there"
        )
    with shapes_only():
        size = count(type(model)(model.config).parameters())  # in however many bits
    shown = f"{size:,} parameters · {device} · {str(dtype).removeprefix('torch.')}"
    if args.quantize:
        shown += f" · layers in {args.quantize}"
    several = f" · {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"{args.base}: {shown} · {torch.get_num_threads()} threads{several} · seed {args.seed}")
    return model, tokenizer


def settle(args, model, tokenizer):
    """Fills in what the command line left open."""
    real, weight = is_real(tokenizer), model.embed_tokens.weight
    for name, values in LEFT_OPEN.items():
        if getattr(args, name) is None:
            setattr(args, name, OF_TASKS.get(getattr(args, "task", None), {}).get(name, values[real]))
    if args.checkpointing is None:  # where memory is dear and arithmetic cheap
        args.checkpointing = real and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


ELSEWHERE = {"run", "command", "debug", "resume", "checkpoint_every", "out", "overwrite"}  # say where and how, not what


def resumed(args, add_arguments):
    """The arguments that the run in the folder args.resume was begun with.

    Raises ValueError where others are given beside it, FileError where no run is kept there.
    """
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for action in defaults._actions:
        action.required = False
    defaults = vars(defaults.parse_args([]))
    free = ELSEWHERE - {"out", "overwrite"}
    if given := [name for name, value in vars(args).items() if name not in free and value != defaults[name]]:
        raise ValueError(
            f"--resume goes on with the options that the run was begun with: leave --{given[0].replace('_', '-')} out"
        )
    settings = read_settings(args.resume)
    begun = settings.get("command")
    if begun != args.command:
        raise ValueError(f"the run in {args.resume} was begun by {begun!r}: minillama {begun} --resume {args.resume}")
    return argparse.Namespace(**vars(args) | {name: settings[name] for name in defaults if name not in ELSEWHERE})


def refuse_full(args, weights):
    """Refuses a folder --out that holds weights or an interrupted run, unless that may be overwritten."""
    if args.overwrite:
        return
    if (Path(args.out) / weights).exists():
        what = "an adapter" if weights == adapters.storage.WEIGHTS else "a base"
        raise FileError(f"{args.out} holds {what} already: give another --out, or --overwrite to replace it")
    if (Path(args.out) / CHECKPOINT).exists():
        raise FileError(
            f"{args.out} holds an interrupted run: --resume {args.out} goes on with it, --overwrite begins anew"
        )


def keeper(args, out, pairs, **settings):
    """A Keeper of what a command was asked to do."""
    settings |= {name: value for name, value in vars(args).items() if name not in ELSEWHERE}
    settings |= {"command": args.command, "pairs_sha256": hashlib.sha256(repr(pairs).encode()).hexdigest()}
    go_on = f"python -m minillama {args.command} --resume {out}"
    return Keeper(out, settings, args.checkpoint_every, resume=args.resume is not None, go_on=go_on)


def write_history(out, history):
    write_text(out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def prepare(model, tokenizer, method, options, args, seed):
    """Attaches the method to the model (method "full": all of it is to train), and cuts its weights with --shard."""
    torch.manual_seed(seed)
    if method == "full":
        model.float().requires_grad_(True)
    else:
        normed = hasattr(model.layers[0].input_layernorm, "weight")
        own = {"init": "input"} if is_real(tokenizer) and method == "llama_adapter" and normed else {}
        adapters.adapt(model, method, **own | options)
    if getattr(args, "shard", False):
        distributed.shard(model)


def teach(model, tokenizer, method, pairs, args, seed, keeping=None, around=contextlib.nullcontext):
    """Trains a prepared model on pairs; the history."""
    real = is_real(tokenizer)
    rate = adapters.learning_rate(method, real) if args.learning_rate is None else args.learning_rate
    return train(
        model, tokenizer, pairs, steps=args.steps, batch_size=args.batch_size, learning_rate=rate, seed=seed,
        checkpointing=args.checkpointing, compiled=args.compile, bucket=1 if real else 16,
        pack=getattr(args, "pack", None), watch=adapters.gates, keeper=keeping, around=around,
    )  # fmt: skip


def train_dates(args, tokenizer, seed):
    days, form = data.split_dates()[0], data.form(tokenizer)
    return data.examples(args.languages, days, args.steps * args.batch_size, seed, form)


def test_dates(args, tokenizer, languages):
    """{language: unseen pairs}"""
    days, form = data.split_dates()[1], data.form(tokenizer)
    return {language: data.examples(language, days, args.test_dates, 1, form) for language in languages}
