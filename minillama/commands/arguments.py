"""Arguments that several commands have, and their types: what is out of range ends in a sentence before any work."""

import argparse
import math
import re

from .. import data
from ..speed import HOW

# What the command line may leave open, by kind of base: a bundled one, whose tokens are bytes, and a real one.
LEFT_OPEN = {"steps": (300, 120), "batch_size": (16, 16), "test_dates": (500, 200)}


def whole(least, most=10**9, why=""):
    """The type of an argument that is a whole number."""

    def parse(text):
        if not re.fullmatch(r"[+-]?\d+", text.strip()):
            raise argparse.ArgumentTypeError(f"{text} is no whole number")
        number = int(text) if len(text) < 40 else (-1 if text.startswith("-") else 1) * math.inf
        if not least <= number <= most:
            shown = text if len(text) < 40 else f"{text[:9]}…"
            is_small = number < least
            needed = f"{least} or more{why}" if is_small else f"{most:,} or less"
            raise argparse.ArgumentTypeError(f"{shown} is too {'small' if is_small else 'large'}; needed is {needed}")
        return number

    return parse


def real(least, most, open_at_least=False):
    """The type of an argument that is a number from least to most."""

    def parse(text):
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no number") from None
        if not least <= number <= most or (open_at_least and number == least):
            needed = f"a number above {least}" if open_at_least else f"a number from {least} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; needed is {needed}")
        return number

    return parse


LARGEST_RATE = 1e30  # what float32 can hold, with room for a step
positive, rate, share = whole(1), real(0, LARGEST_RATE, open_at_least=True), real(0, 1)
at_least_two = whole(2, why=", room for a token of the prompt and one of the response")


def given(text):
    """The type of an argument that names something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def names(text):
    return list(dict.fromkeys(text.split(",")))


def add_machine(parser, seed=True):
    parser.add_argument(
        "--device", default="auto", help="auto takes CUDA, then the CPU; or cpu, cuda, cuda:1, mps (auto)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="float32 or bfloat16; auto takes the second where it is native (auto)"
    )
    if seed:
        parser.add_argument(
            "--seed", type=whole(0, 2**63 - 1), default=0, help="repeats a run bit for bit on one CPU machine (0)"
        )


def add_base(parser):
    parser.add_argument(
        "--base", default="dates-llama", metavar="NAME",
        help="dates-llama, dates-gpt2, smollm2, a folder in Hugging Face's layout, a hub name (owner/model), or a "
        ".gguf file (dates-llama)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=HOW, help="keep the base's layers in fewer bits: about a half or a quarter of their "
        "memory (8bit, 4bit), or products in 8-bit floats on a card that has them (float8)"
    )  # fmt: skip


# The same for the tasks of vision.py.
OF_TASKS = {"handwriting": {"steps": 400, "batch_size": 32}, "calendar": {"steps": 400, "batch_size": 32}}


def add_training(parser):
    def default(name):
        small, real = LEFT_OPEN[name]
        return f"({small})" if small == real else f"({small}; {real} with a real base)"

    parser.add_argument(
        "--languages", "--language", type=names, default=["fr"], metavar="NAMES",
        help=f"one or several, such as en,fr,fi: en, {', '.join(data.LANGUAGES)}, or any locale of CLDR (fr)",
    )  # fmt: skip
    parser.add_argument("--steps", type=positive, metavar="N", help=f"training steps {default('steps')}")
    parser.add_argument("--batch-size", type=positive, metavar="N", help=f"examples per step {default('batch_size')}")
    parser.add_argument(
        "--learning-rate", type=rate, metavar="RATE",
        help="peak of warm-up and cosine (what suits the method and base)",
    )  # fmt: skip
    parser.add_argument(
        "--test-dates", type=positive, metavar="N",
        help=f"dates per language to measure on, never seen in training {default('test_dates')}",
    )  # fmt: skip
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction,
        help="less memory for about a third more time: layers are computed again for the backward pass (for a real "
        "base in bfloat16 on the CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="layers through torch.compile: a minute at first, then faster steps"
    )


def add_keeping(parser):
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run that was interrupted there, with the options it was "
        "begun with"
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-every", type=rate, default=60.0, metavar="SECONDS",
        help="how often the run is kept, so that one that is killed can go on; Ctrl-C keeps it too (60)",
    )  # fmt: skip
