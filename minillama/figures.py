"""The figures that the command line and the lessons share, in one visual language: frozen is grey-blue, trained is warm,
a gate is crimson; each also differs in shape or label, so that nothing rests on colour alone."""

import matplotlib
from matplotlib.figure import Figure

from .files import replacing

FROZEN, TRAINED, GATE, INK = "#7f9bb3", "#d9822b", "#b3224a", "#2b2b2b"
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


def save_figure(figure, path):
    """Writes a figure (PNG, SVG or PDF by the ending), whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def training_figure(history, title):
    """Loss and accuracy over the steps, and where there are gates, each opening from zero. history: what `train` returned."""
    steps = [record["step"] for record in history]
    with matplotlib.rc_context(STYLE):
        gated = "gates" in history[0]
        figure = Figure(figsize=(11 if gated else 6.5, 3.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        left, *right = figure.subplots(1, 1 + gated, squeeze=False)[0]
        left.plot(steps, [record["loss"] for record in history], color=TRAINED)
        left.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None), title="Loss and accuracy on the training batches")
        accuracy = left.twinx()
        accuracy.plot(steps, [100 * record["accuracy"] for record in history], color=FROZEN, linewidth=1, linestyle="--")
        accuracy.set(ylabel="whole answers right (%)", ylim=(0, 101))
        accuracy.spines["right"].set_visible(True)
        accuracy.grid(False)
        left.plot([], [], color=FROZEN, linewidth=1, linestyle="--", label="accuracy (right axis)")
        left.lines[0].set_label("loss (left axis)")
        left.legend(loc="center right")

        if gated:
            draw_gates(right[0], history)
    return figure


def draw_gates(axes, history):
    """One line per head (or layer), coloured and dashed by layer, from the 0 before the first step."""
    layers, shades, dashes = list(history[0]["gates"]), matplotlib.colormaps["YlOrRd"], ("-", "--", "-.", ":")
    for i, layer in enumerate(layers):
        color = shades(0.4 + 0.55 * i / max(1, len(layers) - 1))
        rows = [[0.0] * len(history[0]["gates"][layer])] + [record["gates"][layer] for record in history]
        for head, line in enumerate(zip(*rows)):
            axes.plot(range(len(line)), line, color=color, linestyle=dashes[i % 4], linewidth=1.2, label=f"layer {layer}" if head == 0 else None)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="step", ylabel="gate (0: the base, bit for bit)", title="The gates open from zero, one line per head")
    if len(layers) <= 12:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def comparison_figure(rows, title):
    """Exact match against trained parameters, one shape for each method with its spread over seeds; names in the legend.

    rows: dicts with method, parameters, matches (a share per seed). The methods "full" and "base" are drawn as lines.
    """
    shapes, warm = "osD^vP*X", matplotlib.colormaps["YlOrRd"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.5), layout="constrained")
        axes = figure.subplots()
        methods = sorted((row for row in rows if row["method"] not in ("full", "base")), key=lambda row: row["parameters"])
        for row in [row for row in rows if row["method"] == "full"] + methods + [row for row in rows if row["method"] == "base"]:
            percent = [100 * match for match in row["matches"]]
            mean = sum(percent) / len(percent)
            if row in methods:
                i = methods.index(row)
                spread, label = [[mean - min(percent)], [max(percent) - mean]], f"{row['method']}, {row['parameters']:,}: {mean:.1f} %"
                color = warm(0.4 + 0.5 * i / len(methods))
                axes.errorbar(row["parameters"], mean, yerr=spread, fmt=shapes[i % 8], color=color, markeredgecolor=INK, capsize=4, markersize=9, alpha=0.85, label=label)
            elif row["method"] == "full":
                axes.axhline(mean, color=INK, linestyle="--", linewidth=1.2, label=f"full fine-tuning, {row['parameters']:,}: {mean:.1f} %")
            else:
                axes.axhline(mean, color=FROZEN, linestyle=":", linewidth=1.6, label=f"the frozen base: {mean:.1f} %")
        axes.set(xscale="log", xlabel="trained parameters", ylabel="exact match on unseen dates (%)", ylim=(0, 105), title=title)
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
