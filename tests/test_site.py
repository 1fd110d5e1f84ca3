"""The website: built from this repository, every page looked at in a real browser, from a folder, with no network."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import urllib.parse

import pytest
from test_browser import CHROMIUM
from test_command_line import inside, sentence

import minillama
from minillama.commands.site import PACKAGES
from minillama.course import site
from minillama.course.notebooks import find

ROOT = pathlib.Path(__file__).parent.parent


def missing():
    """The first package of the site's own requirements that is not installed."""
    try:
        return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), None)
    except ModuleNotFoundError as error:
        return error.name


def test_without_its_requirements_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.commands.site.PACKAGES", ("no_such_package",))
    code, out, err = inside("site", "out", cwd=tmp_path)
    assert code == 2 and "pip install -r" in sentence(err) and "docs/site/requirements.txt" in sentence(err)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(minillama.FileError, match="something else than a site"):
        site.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(missing() is not None, reason=f"{missing()} is not installed: docs/site/requirements.txt")
def test_what_sphinx_leaves_behind_does_not_hold_the_build_up(tmp_path, monkeypatch):
    """The formulas' server, slow to begin on a busy machine, outlived a Sphinx that had given it up."""
    sphinx = tmp_path / "sphinx"
    sphinx.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/left\necho a WARNING of it >&2\nexit 1\n")
    sphinx.chmod(0o755)
    monkeypatch.setattr(site.sys, "executable", str(sphinx))
    with pytest.raises(minillama.FileError, match="Sphinx: a WARNING of it"):
        site.build(tmp_path / "out")
    os.kill(int((tmp_path / "left").read_text()), signal.SIGTERM)  # raises where it has ended already


@pytest.mark.parametrize(
    "log, said",
    [
        ("reading\nx.md:3: WARNING: no such page\nat last", "x.md:3: WARNING: no such page"),
        (
            "Traceback\n  File x\n    ConnectionRefusedError: refused\n\nPlease report",
            "ConnectionRefusedError: refused",
        ),
        ("no theme", "no theme"),
        ("", "it failed"),
    ],
)
def test_what_is_wrong_is_found_in_sphinxs_log(log, said):
    assert site.complaint(log) == said


def test_its_requirements_are_pinned_with_a_reason():
    lines = [line for line in (site.SITE / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+\s+# .{5,}", line) for line in lines) and len(lines) == len(PACKAGES)


def test_a_docstring_becomes_markdown():
    """Prose stays prose, though it holds what Markdown or HTML take for theirs; drawings and examples are code."""
    text = "ids -> <end>, a * b, $x$.\n\n    x ──▶ y\n\n>>> 1 + 1\n2\n\nEnd."
    shown = site.as_markdown(text)
    assert shown.startswith(r"ids -> \<end>, a \* b, \$x\$.") and "\n    x ──▶ y\n" in shown
    assert "```python\n>>> 1 + 1\n2\n```" in shown and shown.endswith("End.")


def test_a_dead_link_is_named(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a><a href="https://example.org/x">out</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="a.html">a</a>')
    assert site.follow(tmp_path) == (2, 2)
    (tmp_path / "c.html").write_text('<a href="b.html#elsewhere">b</a><img src="none.png">')
    with pytest.raises(minillama.FileError, match=r"2 dead links.*c.html to b.html#elsewhere"):
        site.follow(tmp_path)


def figures(path):
    """How many pictures the outputs of a notebook hold."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return sum(not shown.keys().isdisjoint({"image/svg+xml", "image/png"}) for shown in outputs)


def formulas(path):
    """How many lines of a notebook's prose hold a formula."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return len(re.findall(r"^[^`\n]*\$[^$`\n]+\$", prose, re.MULTILINE))


LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    formulas: document.querySelectorAll("article .katex").length,
    broken: document.querySelectorAll(".katex-error").length,
    dollars: [...document.querySelectorAll("article p, article li, article td")].flatMap((e) => [...e.childNodes])
        .filter((n) => n.nodeType === 3 && /\\$[^$]+\\$/.test(n.data)).map((n) => n.data.trim().slice(0, 80)),
    bars: [...document.querySelectorAll("article p")].map((e) => e.textContent)
        .filter((text) => /^\\|.*\\|\\s*\\|/.test(text)),
    figures: document.querySelectorAll("article img").length,
    ground: getComputedStyle(document.body).backgroundColor,
})"""
# A frame's height, the same thirty pictures later, and its width: one that grows by what it says of itself never ends.
SETTLED = """async frame => {
    const pictures = (n) => new Promise((done) => (function next() { n-- ? requestAnimationFrame(next) : done(); })());
    await pictures(10);
    const height = frame.clientHeight;
    await pictures(30);
    return [height, frame.clientHeight, frame.clientWidth];
}"""
DECODE = """Promise.race([
    Promise.all([...document.images].map((image) => (image.loading = 'eager', image.decode()))),
    new Promise((_, fail) => setTimeout(() => fail(new Error("a picture was not decoded within 30 s")), 30_000)),
])"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")
@pytest.mark.skipif(missing() is not None, reason=f"{missing()} is not installed: docs/site/requirements.txt")
def test_every_page_in_a_browser(tmp_path):
    """At the width of a phone, light and dark: no errors, nothing fetched, nothing wider than the screen, every figure
    and formula there; the search finds; the playground stands in lessons 00 and 03 and follows the page's theme."""
    from playwright.sync_api import sync_playwright

    out = tmp_path / "site"
    try:
        pages, links = site.build(out)
    except minillama.FileError as error:
        if "npm could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
    assert pages > 50 and links > 5000
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, wrong = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light"), []
        local = ("file:", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

        for path in sorted(out.rglob("*.html")):
            page.goto(path.as_uri(), wait_until="load")
            if path.name == "playground.html":
                page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
            else:
                page.evaluate(DECODE)
            grounds = []
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                if path.name == "playground.html":
                    page.wait_for_selector(f"html[data-theme={scheme}]", timeout=30_000)
                seen = page.evaluate(LOOK)
                grounds.append(seen["ground"])
                assert seen["width"] <= 390, f"{path.relative_to(out)} is {seen['width']} wide, {scheme}"
            assert grounds[0] != grounds[1], path
            assert not seen["broken"] and not seen["dollars"] and not seen["bars"], (path, seen)
            source = ROOT / "lessons" / f"{path.stem}.ipynb"
            if source.exists():
                assert 'style="color: #' not in path.read_text(encoding="utf-8"), f"{path}: a colour for light alone"
                assert seen["figures"] == figures(source) and seen["formulas"] >= formulas(source), (path, seen)
            assert not wrong, (path, wrong)

        for word, place in (("ScienceQA", "lessons/03_llama_adapter.html"), ("load_adapter", "storage.load_adapter")):
            page.goto((out / "search.html").as_uri() + "?" + urllib.parse.urlencode({"q": word}))
            finished = "document.querySelector('.search-summary')?.textContent.includes('finished')"
            page.wait_for_function(finished, timeout=60_000)
            assert place in page.locator("#search-results").inner_html()

        page.emulate_media(color_scheme="light")
        for path, least in zip(find(("00", "03", "10")), (1000, 1000, 400)):
            page.goto((out / "lessons" / f"{path.stem}.html").as_uri())
            page.locator("iframe.playground").scroll_into_view_if_needed()
            frame = page.frame_locator("iframe.playground")
            frame.locator("html[data-ready=yes][data-theme=light]").wait_for(state="attached", timeout=60_000)
            page.evaluate("document.body.dataset.theme = 'dark'")  # what the theme's button does
            frame.locator("html[data-theme=dark]").wait_for(state="attached", timeout=10_000)
            height, later, width = page.locator("iframe.playground").evaluate(SETTLED)
            assert height == later > least and width <= 390, path
            link = page.locator(f'a[download][href="{path.name}"]')
            assert link.count() == 1
        assert not wrong
        browser.close()
