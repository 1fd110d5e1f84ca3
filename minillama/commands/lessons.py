"""Executes the notebooks of lessons/ from clean and stores their outputs; or copies them blank, for a class."""

from pathlib import Path

from ..course import notebooks


def add_arguments(parser):
    parser.add_argument(
        "names", nargs="*", help="the lessons to execute, by the beginning of their names, such as 03 (all)"
    )
    parser.add_argument("--check", action="store_true", help="only execute: store nothing")
    parser.add_argument(
        "--blank", type=Path, metavar="FOLDER", help="execute nothing: write copies without solutions and outputs there"
    )


def run(args):
    for path in notebooks.find(args.names):
        if args.blank:
            print(notebooks.blank(path, args.blank))
            continue
        print(f"{path.name} …", end=" ", flush=True)
        notebook, seconds = notebooks.timed(path)
        if not args.check:
            notebooks.store(path, notebook, seconds)
        print(f"{seconds:.0f} s", flush=True)
