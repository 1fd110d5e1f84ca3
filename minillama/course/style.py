"""One visual language for all figures: frozen is grey-blue, trained is warm, a gate is crimson, a method keeps its
colour; each also differs in shape or label, so that nothing rests on colour alone. And how a notebook shows a figure.
"""

import io
import re

import matplotlib
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ..checkpoints.files import replacing

FROZEN, TRAINED, GATE, INK = "#7f9bb3", "#d9822b", "#b3224a", "#2b2b2b"
# One colour and one marker for each method in every figure; the families share a hue: prompts warm, factors green, low
# rank blue, bottlenecks brown.
METHOD_COLOURS = {
    "llama_adapter": "#d9822b", "llama_adapter_v2": "#b3224a", "prefix_tuning": "#e3b505", "prompt_tuning": "#8c6bb1",
    "ia3": "#2e8b57", "bottleneck": "#8c564b", "lora": "#1f6fb4", "dora": "#56b4e9", "image_prompt": "#cc79a7",
    "full": INK, "base": FROZEN,
}  # fmt: skip
METHOD_MARKERS = dict(zip(METHOD_COLOURS, "osD^vP*Xh"))
SHADES, DASHES, MARKERS = (TRAINED, FROZEN, GATE, INK), ("-", "--", "-.", ":"), "osD^vP*X"  # of what is no method
PAGE = 690  # points: what a notebook shows beside its margins
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 10.5,
    "figure.facecolor": "white",
    "legend.frameon": False,
}
PLAIN = {**STYLE, "axes.grid": False}  # for heat maps


def method_of(label):
    """The method that a label names first, "lora, rank 1", "prefix tuning", "gated (LLaMA-Adapter)"; or None."""
    words, found = re.sub(r"[\s-]+", "_", label.lower()), []
    for name in METHOD_COLOURS:
        anywhere = "^" if name in ("full", "base") else "(?<![a-z0-9])"  # words that also mean other things
        match = re.search(anywhere + name.replace("_tuning", "(_tuning)?") + "(?![a-z0-9])", words)
        if match:
            found.append((match.start(), -match.end(), name))
    return min(found)[2] if found else None


def looks(labels, method=None):
    """A colour and a marker for each label: its method's, darker at each return of the same method; for a label that
    names none those of `method`, or where that is None too, the next of a row of others."""
    seen, found = [], []
    for i, label in enumerate(labels):
        name = method_of(label) or method
        ink = min(0.8, 0.4 * seen.count(name))
        seen.append(name)
        parts = zip(to_rgb(METHOD_COLOURS.get(name, INK)), to_rgb(INK))
        color = SHADES[i % 4] if name is None else to_hex([(1 - ink) * part + ink * dark for part, dark in parts])
        found.append((color, METHOD_MARKERS.get(name, MARKERS[i % 8])))
    return found


def use():
    """For a notebook's first cell: figures show as SVG, no wider than the page and the same bytes each time, with a PNG
    beside it for JupyterLab, which draws no stored SVG until it is told to trust the notebook. Elsewhere only the style
    is set."""
    matplotlib.rcParams.update({**STYLE, "svg.hashsalt": "minillama"})
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if get_ipython() is not None:
        formatters = get_ipython().display_formatter.formatters
        formatters["image/svg+xml"].for_type(Figure, svg)
        formatters["image/png"].for_type(Figure, png)


def svg(figure):
    """A figure as SVG text, shrunk to a page's width where it is wider."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', buffer.getvalue())
    share = min(1, PAGE / float(size[1]))
    shrunk = f'width="{share * float(size[1]):.1f}pt" height="{share * float(size[2]):.1f}pt"'
    return buffer.getvalue().replace(size[0], shrunk, 1)


def png(figure):
    """A figure as PNG, as wide on the page as its SVG: (bytes, {"width": pixels}). In 256 colours, to keep the file
    small, chosen so that the rarest shade of a heat map keeps its own: to about 10 of 255 levels."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=144)
    image = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(small, format="png", optimize=True)
    return small.getvalue(), {"width": round(min(PAGE * 96 / 72, image.width * 96 / 144))}


def save_figure(figure, path):
    """Writes a figure (PNG, SVG or PDF by the ending), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
