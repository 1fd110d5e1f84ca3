"""The command line: `python -m minillama COMMAND`, or `minillama COMMAND`; with no command at all, adapt.

A command is a module of commands/ with `add_arguments(parser)` and `run(arguments)`; only the one asked for is
imported.
"""

import argparse
import contextlib
import gc
import importlib
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version

from . import distributed
from .checkpoints.files import first_line, printable
from .checkpoints.progress import Stopped

gc.freeze()  # what is loaded by now stays: no search for garbage walks through it again

COMMANDS = {
    "adapt": "teach a frozen base the dates of other languages, or a task of your own (the default)",
    "generate": "continue a prompt, token by token",
    "pretrain": "train a base from scratch on English dates",
    "compare": "train every method beside full fine-tuning: a table and a picture",
    "mistakes": "show what the checker knows of an exercise, mistake by mistake",
    "grade": "mark a folder of students' notebooks",
    "lessons": "execute the notebooks of lessons/ and store their outputs",
    "bench": "time a training step beside the PEFT library's",
    "zero-init": "run the paper's ablation, a gate begun at 0 and at 1, on a real model",
    "models": "list what can be opened: sizes, memory, licences, and what is on this machine",
    "site": "build the course as a website",
    "check": "look whether everything is in place",
}


def parser(argv):
    """The parser of all commands; the one that argv asks for has its arguments."""
    top = argparse.ArgumentParser(prog="minillama", description=importlib.import_module("minillama").__doc__)
    try:
        top.add_argument("--version", action="version", version=f"minillama {version('minillama')}")
    except PackageNotFoundError:  # run from a folder, not installed
        top.add_argument("--version", action="version", version="minillama, not installed")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv and argv[0] == name:
            module = importlib.import_module(f"minillama.commands.{name.replace('-', '_')}")
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show where in the code an error arose")
            sub.set_defaults(run=module.run)
    return top


def main(argv=None):
    """Runs the command that argv names; its exit status. Whatever goes wrong in it ends here, in one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--debug"]:  # it belongs to every command, and may stand in front of one
        argv = [*argv[1:], "--debug"]
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["adapt", *argv]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone shows \xb7 for ·
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # which the package set while it was imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        args = parser(argv).parse_args(argv)
        with distributed.joined(getattr(args, "device", "cpu")) as args.device, one_voice():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv and not isinstance(error, Stopped):
            raise
        code, sentence = ending(error)
        with contextlib.suppress(OSError):
            print(printable(f"minillama: {sentence}"), file=sys.stderr)
        return code
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, or a reader who has gone: at exit it would be tried again, with a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def one_voice():
    """Of several processes the first alone prints; errors are everyone's."""
    with open(os.devnull, "w") as nothing:
        with contextlib.redirect_stdout(nothing) if distributed.rank() else contextlib.nullcontext():
            yield


def ending(error):
    """(exit status, sentence) of what ended a command."""
    if isinstance(error, Stopped):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return 2, f"this needs the package {error.name!r}: pip install -r requirements.txt"
    if isinstance(error, ValueError | OSError):
        return 2, str(error)
    if isinstance(error, MemoryError) or "memory" in str(error):
        return 2, f"not enough memory ({first_line(error)}): take a smaller --batch-size, or --checkpointing"
    return 1, f"{type(error).__name__}: {first_line(error)}; this is a fault of minillama's: --debug shows where"


if __name__ == "__main__":
    sys.exit(main())
