"""Sphinx's configuration; the pages that it finds beside this file are staged by minillama/course/site.py."""

import sys

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
# By a port, which is tried until it answers; a socket's file is there a moment before anybody listens.
katex.KaTeXServer.start_server_process = katex.KaTeXServer.start_network_socket
katex_css_path = "katex/katex.min.css"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
toc_object_entries = False
