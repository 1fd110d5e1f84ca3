"""Continues a prompt, token by token."""

import contextlib
import sys
import time

import torch

from ..adapters import adapters, load_adapter, seeing
from ..checkpoints.files import printable
from ..checkpoints.tokenizers import pieces
from ..generate import check_sampling, stream
from . import open_base
from .arguments import add_base, add_machine, given, positive, whole
from .pictures import features_of


def add_arguments(parser):
    add_base(parser)
    parser.add_argument("--prompt", help='the text to continue, such as "3 mars 2021 = "; with --image: (? = )')
    parser.add_argument(
        "--image", type=given, metavar="FILE", help="what a ? in the prompt stands for: eight digits, YYYYMMDD, "
        "written apart, or a calendar's page, as the adapter has learned"
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a question to a model with a chat template; print its answer"
    )
    parser.add_argument(
        "--adapter", type=given, metavar="FOLDER", help="that adapt has written, or one of the PEFT library"
    )
    parser.add_argument(
        "--any-base", action="store_true", help="open the adapter even where its base had another fingerprint"
    )
    parser.add_argument(
        "--max-new-tokens", type=whole(0), default=40, metavar="N", help="stops there, or at the end token (40)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time (0)"
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="draw from the k likeliest tokens (all)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest likeliest tokens whose probabilities reach p (all)",
    )
    parser.add_argument(
        "--static", action="store_true", help="a cache of fixed size, and on a GPU each step recorded once: sooner"
    )
    add_machine(parser)


def run(args):
    check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)  # before the base is opened
    model, tokenizer = open_base(args)
    if args.adapter:
        load_adapter(model, args.adapter, check_base=not args.any_base)
    features, task = features_of(args.image, adapters(model)) if args.image else (None, None)
    args.prompt = "? = " if args.prompt is None and task == "handwriting" else args.prompt
    if args.prompt is None:
        raise ValueError('there is no prompt: --prompt "3 mars 2021 = ", or "March ?, 2021 = " with a calendar\'s page')
    if args.chat:
        if getattr(tokenizer, "template", None) is None:
            raise ValueError(
                f"{args.base} has no chat template, since it was not taught to answer: leave --chat out, and it "
                "continues the prompt"
            )
        ids = tokenizer.question(args.prompt)
    else:
        ids = tokenizer.encode(args.prompt)
    if not ids:
        raise ValueError("the prompt is empty; the model needs at least one token to continue")
    print("" if args.chat else args.prompt, end="", flush=True)
    prompt = torch.tensor([ids], device=next(model.parameters()).device, dtype=torch.int64)
    start, drawn = time.perf_counter(), []
    sampling = (args.temperature, args.top_k, args.top_p, tokenizer.eos_id, args.seed)

    def shown():
        for id in stream(model, prompt, args.max_new_tokens, *sampling, static=args.static):
            drawn.append(id.item())
            if drawn[-1] != tokenizer.eos_id:
                yield drawn[-1]

    with seeing(model, features) if args.image else contextlib.nullcontext():
        for piece in pieces(tokenizer, ids, shown()):
            print(printable(piece), end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"{len(drawn)} tokens in {seconds:.1f} s: {len(drawn) / seconds:.1f} tokens/s", file=sys.stderr)
