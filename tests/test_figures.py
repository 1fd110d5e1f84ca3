"""The figures: nothing overlaps, nothing leaves the canvas, a method keeps its colour, and a notebook shows them."""

import io
import itertools
import re
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from PIL import Image

from minillama.adapters import METHODS
from minillama.course import boxes, plots, schematics, style


def faults(figure, dpi=200):
    """What is wrong with a figure as it is drawn, in sentences; the tolerance is one pixel."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page, found = figure.bbox.padded(1), []

    def inside(extent):
        return page.x0 <= extent.x0 and page.y0 <= extent.y0 and extent.x1 <= page.x1 and extent.y1 <= page.y1

    if not inside(figure.get_tightbbox(canvas.get_renderer()).transformed(figure.dpi_scale_trans)):
        found.append("the figure leaves the canvas")
    for axes in figure.axes:
        texts = {text: text.get_window_extent() for text in axes.texts}
        arrows = [(patch, drawn(patch)) for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
        boxes = [(patch, drawn(patch)) for patch in axes.patches if not isinstance(patch, FancyArrowPatch)]
        for patch, path in arrows + boxes:
            if not inside(path.get_extents()):
                found.append(f"{patch} leaves the canvas")
        for (a, extent), (b, other) in itertools.combinations(texts.items(), 2):
            if extent.padded(-1).overlaps(other.padded(-1)):
                found.append(f"{a.get_text()!r} overlaps {b.get_text()!r}")
        for text, extent in texts.items():
            if not inside(extent):
                found.append(f"{text.get_text()!r} leaves the canvas")
            if text.get_fontsize() < 9:
                found.append(f"{text.get_text()!r} is too small to read")
            if any(path.intersects_bbox(extent.padded(-1), filled=False) for _, path in boxes):
                found.append(f"{text.get_text()!r} crosses the edge of a box")
            if any(path.intersects_bbox(extent.padded(-1), filled=False) for _, path in arrows):
                found.append(f"{text.get_text()!r} is crossed by an arrow")
        for (_, path), (b, other) in itertools.combinations(boxes, 2):
            if path.intersects_path(other, filled=False):
                found.append(f"{b} crosses the edge of another box")
        for patch, path in boxes:  # a frame has no face and may be crossed
            within = path.get_extents().padded(-3)
            if patch.get_facecolor()[3] and any(line.intersects_bbox(within, filled=False) for _, line in arrows):
                found.append(f"an arrow runs into {patch}")
    return found


def drawn(patch):
    """A patch's outline in pixels, as straight lines."""
    return Path.make_compound_path(*map(Path, patch.get_path().to_polygons(patch.get_transform(), closed_only=False)))


@pytest.mark.slow
@pytest.mark.parametrize("name", schematics.SCHEMATICS)
def test_schematic_is_tidy(name):
    figure = schematics.SCHEMATICS[name]()
    assert len(figure.axes[0].texts) > 15 < len(figure.axes[0].patches)
    assert 9 <= figure.get_figwidth() <= 11 and 3.5 <= figure.get_figheight() <= 5.5
    assert faults(figure) == []


def two_texts(axes):
    boxes.note(axes, 1, 1, "one text")
    boxes.note(axes, 1.3, 1.05, "another")


def over_the_page(axes):
    boxes.note(axes, 3.5, 1, "a text that is too long")


def too_long_for_its_box(axes):
    boxes.box(axes, 2, 1, 0.8, 0.4, "scaled attention")


def larger_than_its_box(axes):
    boxes.box(axes, 2, 1, 0.1, 0.05, "attention")


def struck_through(axes):
    boxes.note(axes, 1, 1, "a text")
    boxes.arrow(axes, (0.5, 1), (3, 1))


def under_a_box(axes):
    boxes.box(axes, 2, 1, 0.8, 0.4)
    boxes.arrow(axes, (0.5, 1), (2, 1))


def two_boxes(axes):
    boxes.box(axes, 2, 1, 0.8, 0.4)
    boxes.box(axes, 2.5, 1, 0.8, 0.4, kind="trained")


def box_over_the_page(axes):
    boxes.box(axes, 3.9, 1, 0.8, 0.4)


def tiny(axes):
    boxes.note(axes, 1, 1, "a text", size=8)


@pytest.mark.parametrize(
    "plant, fault",
    [
        (two_texts, "'one text' overlaps 'another'"),
        (over_the_page, "too long' leaves the canvas"),
        (too_long_for_its_box, "crosses the edge of a box"),
        (larger_than_its_box, "crosses the edge of a box"),
        (struck_through, "is crossed by an arrow"),
        (under_a_box, "an arrow runs into"),
        (two_boxes, "crosses the edge of another box"),
        (box_over_the_page, "leaves the canvas"),
        (tiny, "too small to read"),
    ],
)
def test_a_planted_fault_is_found(plant, fault):
    axes = boxes.sheet(4, 2, "", kinds=())
    boxes.box(axes, 0.7, 0.4, 0.8, 0.4, "tidy")
    assert faults(axes.figure) == []
    plant(axes)
    assert any(fault in sentence for sentence in faults(axes.figure))


def history(gated, layers=4):
    records = [{"step": step, "loss": 3.0 / step, "accuracy": 1 - 1 / step} for step in range(1, 30)]
    gates = {str(layer): [0.1, -0.2] for layer in range(layers)}
    return [record | {"gates": gates} for record in records] if gated else records


@pytest.mark.slow
def test_plots_stay_on_the_canvas():
    methods = ("base", "llama_adapter_v2", "ia3", "full")
    rows = [
        {"method": method, "parameters": 10**i, "matches": [0.1 * i, 0.1 * i + 0.05]}
        for i, method in enumerate(methods, 1)
    ]
    for gated, layers in ((False, 4), (True, 4), (True, 30)):
        assert faults(plots.training_figure(history(gated, layers), "A title"), dpi=100) == []
    assert faults(plots.comparison_figure(rows, "A title"), dpi=100) == []
    crowded = [{"method": method, "parameters": 10**i, "matches": [0.97]} for i, method in enumerate(METHODS, 1)]
    near, whole = plots.comparison_figure(crowded, "A title").axes
    assert near.get_ylim()[0] > 90 and whole.get_ylim()[0] == 0
    for ceiling, bandwidth in ((6e10, 8e9), (8e14, 4e12)):
        points = {f"work {i}": (10**i * 1e9, 1e9, [10**i / 9, 10**i / 5]) for i in range(6)}
        roof = plots.roofline_figure(points, ceiling, bandwidth, "A title")
        assert faults(roof, dpi=100) == [] and len(roof.axes[0].containers) == 6
    many = {method: (range(3), [[0.1, 0.2]] * 3) for method in METHODS}
    for curves in (many, dict(list(many.items())[:3])):
        assert faults(plots.curve_figure(curves, "step", "loss", "A title"), dpi=100) == []


@pytest.mark.parametrize(
    "label, method",
    [
        ("lora, rank 1", "lora"),
        ("LLaMA-Adapter V2", "llama_adapter_v2"),
        ("gated (LLaMA-Adapter)", "llama_adapter"),
        ("prefix, zeros", "prefix_tuning"),
        ("Prompt tuning", "prompt_tuning"),
        ("IA3, on q and o too", "ia3"),
        ("full fine-tuning", "full"),
        ("the fullest", None),
        ("gate starts at 1", None),
        ("French", None),
    ],
)
def test_a_label_names_its_method(label, method):
    assert style.method_of(label) == method


def test_a_method_has_one_colour_in_every_figure():
    """And none has another's; where one returns in a figure it is told apart by a darker shade."""
    colours = {method: style.METHOD_COLOURS[method] for method in METHODS}
    assert len(set(colours.values())) == len(colours) == len({style.METHOD_MARKERS[method] for method in METHODS})
    curves = plots.curve_figure({method: (range(3), [[1.0]] * 3) for method in METHODS}, "x", "y", "").axes[0]
    assert {line.get_label(): to_hex(line.get_color()) for line in curves.lines} == colours
    rows = [{"method": method, "parameters": i, "matches": [0.5]} for i, method in enumerate(METHODS, 1)]
    containers = plots.comparison_figure(rows, "").axes[0].containers
    assert [to_hex(points.lines[0].get_markerfacecolor()) for points in containers] == list(colours.values())
    loss = plots.training_figure(history(False), "", method="ia3").axes[0].lines[0]
    assert to_hex(loss.get_color()) == colours["ia3"]
    first, again, other = (color for color, _ in style.looks(["ia3", "ia3, on q", "French"]))
    assert first == style.looks(["French"], "ia3")[0][0] == colours["ia3"] != again and other == style.SHADES[2]


def test_a_gate_is_called_what_it_is():
    """tanh(gate) where the numbers have passed through one."""
    for tanh, name in ((True, "tanh(gate)"), (False, "gate")):
        gates = plots.training_figure(history(True), "", tanh=tanh).axes[1]
        assert gates.get_ylabel().startswith(f"{name} (")
        heat = plots.attention_figure(torch.rand(2, 3), torch.rand(2, 4), "abcd", ["layer 0", ""], "", tanh=tanh)
        assert heat.axes[0].get_title(loc="left") == f"{name} · softmax"


@pytest.mark.slow
def test_a_png_keeps_the_colours_of_a_heat_map():
    """No channel of any pixel is off by more than 12 of 255 levels; with the palette that Pillow makes by itself some
    are off by 92."""
    torch.manual_seed(0)
    maps = plots.heat_figure(torch.rand(16, 24).tolist(), range(16), range(24), "x", "y", "A title", "s", write=None)
    characters, rows = "3 mars 2021 = 2021-0", [f"layer {i // 4}" if i % 4 == 0 else "" for i in range(16)]
    heads = 0.2 * torch.randn(16, 10), torch.rand(16, 20).softmax(-1)
    for figure in (maps, plots.attention_figure(*heads, characters, rows, "A title"), schematics.ia3_schematic()):
        style.png(figure)  # once before, since the layout settles at the first drawing
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", dpi=144)
        exact, stored = (Image.open(file).convert("RGB") for file in (buffer, io.BytesIO(style.png(figure)[0])))
        assert np.abs(np.asarray(exact).astype(int) - np.asarray(stored)).max() <= 12


def test_greyscale_tells_the_kinds_apart():
    """By their edges and, the gate, by its darkness: colour is not needed."""
    weights, kinds = (0.299, 0.587, 0.114), ("flow", "frozen", "trained", "gate")
    grey = {kind: sum(w * part for w, part in zip(weights, to_rgb(boxes.KINDS[kind]["facecolor"]))) for kind in kinds}
    assert grey["gate"] < 0.4 and min(grey["flow"], grey["frozen"], grey["trained"]) > 0.65
    assert boxes.KINDS["trained"]["linewidth"] >= 2 * boxes.KINDS["frozen"]["linewidth"]


def test_use_sets_the_style_and_svg_is_the_same_each_time(tmp_path):
    with matplotlib.rc_context():
        plots.use()  # no notebook here: quiet
        assert matplotlib.rcParams["axes.spines.top"] is False
        for name in ("a.svg", "b.svg"):
            schematics.lora_schematic().savefig(tmp_path / name, metadata={"Date": None})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.slow
def test_a_notebook_shows_svg_and_png():
    """As the last expression of a cell, a figure made without pyplot becomes one SVG, without a date,
    and a PNG as wide."""
    shells = pytest.importorskip("IPython.core.interactiveshell")
    pytest.importorskip("matplotlib_inline")
    shell = shells.InteractiveShell.instance()
    try:
        with matplotlib.rc_context():
            plots.use()
            shown, metadata = shell.display_formatter.format(schematics.lora_schematic())
            again, _ = shell.display_formatter.format(schematics.lora_schematic())
    finally:
        shells.InteractiveShell.clear_instance()
    assert "dc:date" not in shown["image/svg+xml"] and shown["image/png"].startswith(b"\x89PNG")
    assert shown["image/svg+xml"] == again["image/svg+xml"] and shown["image/png"] == again["image/png"]
    points = float(re.search(r'width="([\d.]+)pt"', shown["image/svg+xml"])[1])
    assert abs(metadata["image/png"]["width"] - points * 96 / 72) < 5
    assert xml.etree.ElementTree.fromstring(shown["image/svg+xml"]).tag.endswith("svg")
