"""What the schematics are drawn of, in the visual language of style.py: a sheet, boxes, arrows, frames.

A sheet's data units are inches, so that text and boxes have their place and keep it.
"""

from collections import namedtuple

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from .style import FROZEN, GATE, INK, TRAINED


def tint(color, share):
    return tuple(1 - share * (1 - part) for part in to_rgb(color))


# Shape and edge tell the kinds apart where colours do not: frozen is square and thin, trained is round and thick,
# a gate is dark.
KINDS = {
    "flow": dict(facecolor="white", edgecolor=INK, linewidth=0.9),
    "frozen": dict(facecolor=tint(FROZEN, 0.35), edgecolor="#4d6a84", linewidth=1),
    "trained": dict(facecolor=tint(TRAINED, 0.45), edgecolor="#9c5510", linewidth=2.4),
    "gate": dict(facecolor=GATE, edgecolor=GATE, linewidth=1),
    "frame": dict(facecolor="none", edgecolor="#8a8a8a", linewidth=0.9, linestyle=(0, (4, 3))),
}
OVER = [withStroke(linewidth=6, foreground="white")]  # for an arrow that crosses another
Sides = namedtuple("Sides", "left right top bottom")  # the points where arrows start and end
WAYS = {"right": ("right", "left"), "left": ("left", "right"), "up": ("top", "bottom"), "down": ("bottom", "top")}


def sheet(width, height, title, kinds=("frozen", "trained")):
    """Axes over a whole new figure, with a title and the legend of the kinds of boxes that will stand on it."""
    axes = Figure(figsize=(width, height), facecolor="white").add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    note(axes, 0.25, height - 0.32, title, size=13, weight="bold")
    right = width - (1.3 if "gate" in kinds else 0.95)
    for i, kind in enumerate(reversed(kinds)):
        box(axes, right - 1.15 * i, height - 0.32, 0.3, 0.2, kind=kind)
        name = "trained gate" if kind == "gate" else kind
        note(axes, right + 0.23 - 1.15 * i, height - 0.37, name, size=10, va="baseline")
    return axes


def note(axes, x, y, text, size=9.5, **style):
    style = {"fontsize": size, "color": INK, "ha": "left", "va": "center", "linespacing": 1.35, **style}
    axes.text(x, y, text, **style)


def box(axes, x, y, width, height, text="", kind="flow", size=10.5):
    """A box around (x, y). Returns its sides."""
    corner, rounding = (x - width / 2, y - height / 2), 0.07 if kind in ("trained", "gate") else 0
    style = dict(boxstyle=f"round,pad=0,rounding_size={rounding}", zorder=0 if kind == "frame" else 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, **style, **KINDS[kind]))
    if text:
        note(axes, x, y, text, size, ha="center", color="white" if kind == "gate" else INK, zorder=3)
    return Sides((x - width / 2, y), (x + width / 2, y), (x, y + height / 2), (x, y - height / 2))


def point(x, y):
    """A place without a box, for an arrow that begins or ends in the open."""
    return Sides(*[(x, y)] * 4)


def funnel(axes, x, y, width, left, right, text):
    """A trained matrix that narrows or widens what flows through it from left to right. Returns its sides."""
    w, a, b = width / 2, left / 2, right / 2
    corners = [(x - w, y - a), (x - w, y + a), (x + w, y + b), (x + w, y - b)]
    axes.add_patch(Polygon(corners, joinstyle="round", **KINDS["trained"], zorder=2))
    note(axes, x, y, text, 10.5, ha="center", zorder=3)
    return Sides((x - w, y), (x + w, y), (x, y + (a + b) / 2), (x, y - (a + b) / 2))


def joint(axes, x, y, sign):
    """A circle in which what flows is added ("+") or multiplied ("x"). Returns its sides."""
    axes.add_patch(Circle((x, y), 0.16, **KINDS["flow"], zorder=2))
    axes.plot(x, y, marker=sign, markersize=9 if sign == "+" else 7, markeredgewidth=1.4, color=INK, zorder=3)
    return Sides((x - 0.16, y), (x + 0.16, y), (x, y + 0.16), (x, y - 0.16))


def strip(axes, x, y, width, values):
    """A trained vector, its features as bars: above the middle line amplified, below it inhibited.
    Returns its sides."""
    step = (width - 0.16) / len(values)
    for i, value in enumerate(values):
        left = x - width / 2 + 0.08 + step * (i + 0.18)
        axes.add_patch(Rectangle((left, y), step * 0.64, value / 4, facecolor=INK, zorder=3))
    axes.plot((x - width / 2, x + width / 2), (y, y), color=INK, linewidth=0.8, zorder=3)
    return box(axes, x, y, width, 0.5, kind="trained")


def cells(axes, left, y, count, kind):
    """A row of small squares, one for each position. Returns its sides."""
    for i in range(count):
        box(axes, left + 0.1 + 0.26 * i, y, 0.2, 0.2, kind=kind)
    right = left + 0.26 * count - 0.06
    return Sides((left, y), (right, y), ((left + right) / 2, y + 0.16), ((left + right) / 2, y - 0.16))


def arrow(axes, *points, head=True, **style):
    """Straight from point to point, a head at the last."""
    style = {"color": INK, "linewidth": 1.2, "zorder": 1, "joinstyle": "miter", "capstyle": "butt", **style}
    tip = dict(arrowstyle="-|>" if head else "-", mutation_scale=11, fill=head)
    axes.add_patch(FancyArrowPatch(path=Path(points), **tip, **style))


def chain(axes, way, *parts):
    """Arrows from each part to the next, that way."""
    leave, enter = WAYS[way]
    for a, b in zip(parts, parts[1:]):
        arrow(axes, getattr(a, leave), getattr(b, enter))


def frame(axes, left, bottom, right, top, heading, of=None):
    """A dashed frame around a part, with its heading at the upper left; of: the box to its left whose inside it is."""
    box(axes, (left + right) / 2, (bottom + top) / 2, right - left, top - bottom, kind="frame")
    note(axes, left + 0.15, top - 0.2, heading, 10.5)
    if of:
        x = of.right[0]
        zoom(axes, [(x, of.top[1]), (left, top)], [(x, of.bottom[1]), (left, bottom)])


def zoom(axes, *lines):
    """Dashed lines from a box to the frame that shows its inside."""
    for line in lines:
        arrow(axes, *line, head=False, linewidth=0.9, color="#8a8a8a", linestyle=(0, (4, 3)))
