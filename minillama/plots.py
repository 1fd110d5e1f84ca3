"""The lessons' plots of measured numbers, in figures.py's style: curves with their spread, and what heads look at."""

import matplotlib
from matplotlib.figure import Figure

from .figures import FROZEN, GATE, INK, STYLE, TRAINED


def curve_figure(curves, xlabel, ylabel, title, log=False):
    """Means with their spread over seeds. curves: {label: (xs, [[a value per seed] per x])}; lines differ in dash and marker too."""
    shades, dashes, markers = (TRAINED, FROZEN, GATE, INK), ("-", "--", "-.", ":"), "osD^vP*X"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, (label, (xs, values)) in enumerate(curves.items()):
            means, color = [sum(row) / len(row) for row in values], shades[i % 4]
            marker = markers[i % 8] if len(means) <= 20 else ""
            axes.plot(xs, means, color=color, linestyle=dashes[i % 4], marker=marker, label=label)
            axes.fill_between(xs, [min(row) for row in values], [max(row) for row in values], color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, ylim=(0, 105) if "%" in ylabel else None, xscale="log" if log else "linear")
        if all(isinstance(x, int) for xs, _ in curves.values() for x in xs) and not log:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1:
            axes.legend()
    return figure


def attention_figure(prompts, words, characters, rows, title):
    """Heat maps side by side: gated weights on K prompts (R, K), which may be negative, and weights on T words (R, T), a
    character of the text below each column; rows: R labels, empty ones skipped, a line above each that is not."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        left, right = figure.subplots(1, 2, width_ratios=(prompts.shape[1], words.shape[1]), sharey=True)
        extent = max(0.05, abs(prompts).max().item())
        images = (
            left.imshow(prompts, aspect="auto", cmap="PuOr_r", vmin=-extent, vmax=extent),
            right.imshow(words, aspect="auto", cmap="Blues", vmin=0, vmax=1),
        )
        left.set(title="gate · softmax over the prompts", xlabel="prompt token", xticks=range(prompts.shape[1]), xticklabels=range(1, prompts.shape[1] + 1))
        right.set(title="softmax over the words", xlabel="text", xticks=range(len(characters)), xticklabels=characters)
        starts = [i for i, label in enumerate(rows) if label]
        left.set(yticks=[i + 0.5 * (len(rows) / len(starts) - 1) for i in starts], yticklabels=[rows[i] for i in starts])
        for axes, image in zip((left, right), images):
            for i in starts[1:]:
                axes.axhline(i - 0.5, color=INK, linewidth=0.8)
            figure.colorbar(image, ax=axes, fraction=0.06, pad=0.01, aspect=30)
    return figure
