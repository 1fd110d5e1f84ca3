"""Executes the notebooks of lessons/ from clean and stores their outputs."""

from ..course import notebooks


def add_arguments(parser):
    parser.add_argument(
        "names", nargs="*", help="the lessons to execute, by the beginning of their names, such as 03 (all)"
    )
    parser.add_argument("--check", action="store_true", help="only execute: store nothing")


def run(args):
    for path in notebooks.find(args.names):
        print(f"{path.name} …", end=" ", flush=True)
        notebook, seconds = notebooks.execute(path)
        if not args.check:
            notebooks.store(path, notebook, seconds)
        print(f"{seconds:.0f} s", flush=True)
