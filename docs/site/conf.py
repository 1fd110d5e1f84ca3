"""Sphinx's configuration; the pages that it finds beside this file are staged by minillama/course/site.py."""

import socket
import subprocess
import sys
import time

from sphinxcontrib import katex

# jsonschema, behind nbformat, would build 38 grammars of web addresses, for seconds; no notebook's schema has one
sys.modules.setdefault("rfc3987_syntax", None)
project = html_title = "minillama"
extensions = ["myst_nb", "sphinx_copybutton", "sphinxcontrib.katex"]
html_theme = "furo"
html_static_path = ["_static"]
html_extra_path = ["_extra"]  # the playground and the notebooks, as they are
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_search_summary = False  # it would be fetched, which a page in a folder may not
html_show_sphinx = False
html_show_copyright = False
pygments_style, pygments_dark_style = "tango", "github-dark"
exclude_patterns = ["_extra/**"]
nb_execution_mode = "off"  # the stored outputs are shown: the tests keep them fresh
nb_render_markdown_format = "myst"  # in outputs too; the default has no tables
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
katex_prerender = True
katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = 120  # seconds: on a busy machine it is slow to begin
katex_css_path = "katex/katex.min.css"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
toc_object_entries = False


def start_server(rundir, timeout):
    """The formulas' server and a connection to it, as soon as somebody listens: its socket's file, for which
    sphinxcontrib-katex waits, is there a moment earlier. (By a port, each formula would take 40 ms more.)"""
    path, end = str(rundir / "katex.sock"), time.monotonic() + timeout
    command = katex.KaTeXServer.build_command(socket=path)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=rundir)
    connection = socket.socket(socket.AF_UNIX)
    while connection.connect_ex(path):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise katex.KaTeXServer.timeout_error(timeout)
        time.sleep(0.01)
    return process, connection


katex.KaTeXServer.start_server_process = start_server
