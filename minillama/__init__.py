"""A small LLaMA and GPT-2 in plain PyTorch, and adapters that start as the identity, bit for bit."""

import signal
import sys
from pathlib import PurePath

if "-m" in sys.argv[:1] or PurePath(*sys.argv[:1]).stem == "minillama":  # at the command line, not in a program
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the seconds of importing without a traceback

from .adapters import (
    adapt,
    delete_adapter,
    disabled,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    seeing,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from .attention import Cache
from .checkpoints import load, save
from .checkpoints.files import FileError
from .data import ByteTokenizer
from .generate import generate, left_pad
from .gpt2 import GPT2, GPT2Config
from .llama import LLaMA, LLaMAConfig
from .train import answer_loss

__all__ = [
    "GPT2", "LLaMA", "ByteTokenizer", "Cache", "FileError", "GPT2Config", "LLaMAConfig", "adapt", "answer_loss",
    "delete_adapter", "disabled", "generate", "left_pad", "load", "load_adapter", "merge", "mixed", "save",
    "save_adapter", "seeing", "set_adapter", "trainable_parameters", "unmerge",
]  # fmt: skip
