"""The command line: `python -m minillama COMMAND`, or `minillama COMMAND`; with no command at all, adapt.

A command is a module of commands/ with `add_arguments(parser)` and `run(arguments)`; only the one asked for is
imported.
"""

import argparse
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

from .checkpoints.progress import Stopped

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
            sub.set_defaults(run=module.run)
    return top


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["adapt", *argv]
    try:
        args = parser(argv).parse_args(argv)
        return args.run(args) or 0
    except Stopped as error:
        print(f"minillama: {error}", file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"minillama: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"minillama: this needs the package {error.name!r}: pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminillama: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
