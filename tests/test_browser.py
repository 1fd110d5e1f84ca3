"""Lesson 03 as a student meets it: JupyterLab in a real browser runs every cell, and the slider changes the answer."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from minillama.course.notebooks import LESSONS

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a copy of the lessons, so that its saving changes nothing here."""
    shutil.copytree(LESSONS, tmp_path / "lessons")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--port={port}",
        f"--ServerApp.root_dir={tmp_path}",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        "--allow-root",
    ]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "OMP_NUM_THREADS": "1",  # the other core is for the browser
    }
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", *options], stdout=log, stderr=log, env=environment
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "lab.log").read_text()
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")
def test_the_slider_changes_the_answer(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab}/lab/tree/lessons/03_llama_adapter.ipynb")
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady", timeout=120_000)
        shown = "jupyterapp.shell.currentWidget"
        page.wait_for_function(f"{shown}.sessionContext.session?.kernel?.status === 'idle'", timeout=120_000)
        image = "'.jp-RenderedImage img[src^=\"data:image/png\"]'"
        figures = f"{shown}.content.node.querySelectorAll({image}).length"
        # stored ones, though nobody has trusted this notebook yet
        page.wait_for_function(f"{figures} > 0", timeout=30_000)
        page.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')", None)
        source = "w.model.sharedModel.getSource()"
        cells = f"{shown}.content.widgets.filter(w => w.model.type === 'code' && {source}.trim())"
        page.wait_for_function(f"{cells}.every(w => w.model.executionCount)", timeout=1_500_000)
        outputs = page.evaluate(f"{cells}.map(w => w.model.outputs.toJSON()).flat()")
        assert not [output for output in outputs if output["output_type"] == "error"], outputs
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0

        place = page.evaluate(f"{shown}.content.widgets.findIndex(w => {source}.includes('gate_slider'))")
        page.evaluate(f"place => {shown}.content.scrollToItem(place, 'start')", place)
        handle = page.locator(".jupyter-widgets .noUi-handle").first
        answer = page.locator(".jupyter-widgets.widget-html-content, .widget-html-content").first
        handle.wait_for(timeout=30_000)
        said = "document.querySelector('.widget-html-content').innerText"  # empty while it is drawn anew
        page.wait_for_function(f"{said}.includes(' = ')", timeout=60_000)
        adapted = answer.inner_text()
        handle.focus()
        page.keyboard.press("Home")  # the gate at 0
        page.wait_for_function(f"before => {said}.includes(' = ') && {said} !== before", arg=adapted, timeout=60_000)
        (question, right), (again, guess) = (
            re.search(r"^(.*) = (\S+)", text).groups() for text in (adapted, answer.inner_text())
        )
        assert question == again and right != guess and "bit for bit" in answer.inner_text()
        handle.focus()
        page.keyboard.press("End")
        page.wait_for_function(f"{said}.includes('bit for bit') === false", timeout=30_000)
        browser.close()
