"""The figures of results that the command line and the lessons share, in the visual language of style.py."""

import math

import matplotlib
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from . import style
from .style import DASHES, FROZEN, GATE, INK, METHOD_COLOURS, PLAIN, SHADES, STYLE, TRAINED, looks

use = style.use  # for a notebook's first cell


def training_figure(history, title, method=None, tanh=True):
    """Loss and accuracy over the steps, and where there are gates, each opening from zero.
    history: what `train` returned.  method: gives the loss its colour.  tanh: whether the gates pass through one."""
    steps = [record["step"] for record in history]
    with matplotlib.rc_context(STYLE):
        gated = "gates" in history[0]
        figure = Figure(figsize=(11 if gated else 6.5, 3.9), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        left, *right = figure.subplots(1, 1 + gated, squeeze=False)[0]
        left.plot(steps, [record["loss"] for record in history], color=METHOD_COLOURS.get(method, TRAINED))
        left.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
        left.set_title("Loss and accuracy on the training batches")
        accuracy, thin = left.twinx(), dict(color=FROZEN, linewidth=1, linestyle="--")
        accuracy.plot(steps, [100 * record["accuracy"] for record in history], **thin)
        accuracy.set(ylabel="whole answers right (%)", ylim=(0, 101))
        accuracy.spines["right"].set_visible(True)
        accuracy.grid(False)
        left.plot([], [], **thin, label="accuracy (right axis)")
        left.lines[0].set_label("loss (left axis)")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)  # below: the curves may go anywhere

        if gated:
            draw_gates(right[0], history, "tanh(gate)" if tanh else "gate")
    return figure


def draw_gates(axes, history, name):
    """One line per head (or layer), coloured by layer, from the 0 before the first step; few layers differ in dash too
    and have a key, many have a scale of colours. name: what the numbers are."""
    layers, few = list(history[0]["gates"]), len(history[0]["gates"]) <= 12
    places = [0.4 + 0.55 * i / max(1, len(layers) - 1) for i in range(len(layers))]
    shades = ListedColormap(matplotlib.colormaps["YlOrRd"](places))
    for i, layer in enumerate(layers):
        style = dict(color=shades(i), linestyle=DASHES[i % 4] if few else "-", linewidth=1.2 if few else 0.9)
        rows = [[0.0] * len(history[0]["gates"][layer])] + [record["gates"][layer] for record in history]
        for head, line in enumerate(zip(*rows)):
            axes.plot(range(len(line)), line, **style, label=f"layer {layer}" if head == 0 else None)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"{name} (0: the base, bit for bit)")
    axes.set_title(f"The gates open from zero, one line per {'head' if len(rows[0]) > 1 else 'layer'}")
    if few:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        span = matplotlib.cm.ScalarMappable(Normalize(-0.5, len(layers) - 0.5), shades)
        axes.figure.colorbar(span, ax=axes, label="layer", fraction=0.06, pad=0.02)


def comparison_figure(rows, title):
    """Exact match against trained parameters, one shape for each method with its spread over seeds; names in the
    legend. Where four methods or more end above 95 %, a second panel shows the top from near.

    rows: dicts with method, parameters, matches (a share per seed). The methods "full" and "base" are drawn as lines.
    """
    percent = {row["method"]: [100 * match for match in row["matches"]] for row in rows}
    mean = {method: sum(values) / len(values) for method, values in percent.items()}
    points = [row for row in sorted(rows, key=lambda row: row["parameters"]) if row["method"] not in ("full", "base")]
    crowded = sum(mean[row["method"]] > 95 for row in points) >= 4
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 6 if crowded else 4.5), layout="constrained")
        heights = (1, 1.5) if crowded else (1,)
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes in panels:
            for row, (color, marker) in zip(points, looks([row["method"] for row in points])):
                method, n, values = row["method"], row["parameters"], percent[row["method"]]
                spread = [[mean[method] - min(values)], [max(values) - mean[method]]]
                style = dict(markeredgecolor=INK, capsize=4, markersize=9, alpha=0.85)
                label = f"{method}, {n:,}: {mean[method]:.1f} %"
                axes.errorbar(n, mean[method], yerr=spread, fmt=marker, color=color, label=label, **style)
            for row in rows:
                if row["method"] == "full":
                    label = f"full fine-tuning, {row['parameters']:,}: {mean['full']:.1f} %"
                    axes.axhline(mean["full"], color=INK, linestyle="--", linewidth=1.2, label=label)
                elif row["method"] == "base":
                    label = f"the frozen base: {mean['base']:.1f} %"
                    axes.axhline(mean["base"], color=FROZEN, linestyle=":", linewidth=1.6, label=label)
        if crowded:
            panels[0].set(ylim=(94.5, 100.5), ylabel="the top from near (%)")
        axes.set(xscale="log", xlabel="trained parameters", ylabel="exact match on unseen dates (%)", ylim=(0, 105))
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.5, high * 1.5)
        if high < 10 * low:  # within a decade: the numbers themselves
            ticks = [row["parameters"] for row in points]
            ticks = [n for i, n in enumerate(ticks) if i == 0 or n > 1.08 * ticks[i - 1]]
            axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
            axes.minorticks_off()
        panels[0].set_title(title)
        panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def bench_figure(settings, cases):
    """A training step of each case as bars, PEFT's above ours, with whiskers from the fastest to the slowest round; a
    line marks the floor. settings and cases: as `minillama bench` writes them."""
    sides = {
        "peft": ("PEFT", FROZEN),
        "ours": ("ours", TRAINED),
        "compiled": ("ours, compiled", GATE),
        "float8": ("ours, compiled, float8 base", INK),
    }
    cases = [case for case in cases if "step" in case["seconds"]]
    with matplotlib.rc_context(STYLE):
        dtype = settings["dtype"].removeprefix("torch.")
        figure = Figure(figsize=(9, 1.2 + 0.9 * max(1, len(cases))), layout="constrained")
        axes, seen = figure.subplots(), set()
        for row, case in enumerate(cases):
            steps = {side: times for side, times in case["seconds"]["step"].items() if side in sides}
            for place, side in enumerate(side for side in sides if side in steps):
                times = sorted(1000 * time for time in steps[side])
                middle = times[len(times) // 2]
                y, (label, color) = row + 0.21 * (place - (len(steps) - 1) / 2), sides[side]
                spread = [[middle - times[0]], [times[-1] - middle]]
                label = None if side in seen else label
                axes.barh(y, middle, 0.19, xerr=spread, color=color, label=label, error_kw={"linewidth": 1})
                seen.add(side)
            floor = 1000 * case["floor"]
            axes.plot(
                [floor, floor],
                [row - 0.45, row + 0.45],
                color=INK,
                linewidth=1.5,
                label=None if row else f"products, {dtype}",
            )
        names = [f"{case['method']}\n{case['rows']} × {case['tokens']}, K = {case['prompts']}" for case in cases]
        axes.set_yticks(range(len(cases)), names)
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="milliseconds a training step", title=f"{settings['base']}, {dtype}, {settings['device']}")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def roofline_figure(points, ceiling, bandwidth, title):
    """What a machine can do at most (Williams et al. 2009), and where pieces of work came out below it.
    ceiling, bandwidth: operations and bytes a second; points: {label: (operations, bytes, [seconds of each try])},
    of which the median is drawn and the spread as a whisker."""
    places = {label: operations / moved for label, (operations, moved, _) in points.items()}
    left, right = min(0.5, *places.values()) / 2, max(2 * ceiling / bandwidth, *places.values()) * 3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.4), layout="constrained")
        axes, ridge = figure.subplots(), ceiling / bandwidth
        unit, name = (1e12, "T") if ceiling > 1e13 else (1e9, "G")
        axes.plot([left, ridge, right], [left * bandwidth / unit, *[ceiling / unit] * 2], color=INK, linewidth=1.6)
        axes.axvline(ridge, color=INK, linewidth=0.8, linestyle=":")
        roof = f"the roof: {bandwidth / unit:.1f} {name}B/s, then {ceiling / unit:,.0f} {name}FLOP/s"
        axes.plot([], [], color=INK, linewidth=1.6, label=roof)
        for (label, (operations, _, tries)), (color, marker) in zip(points.items(), looks(points)):
            rates = sorted(operations / seconds / unit for seconds in tries)
            middle = rates[len(rates) // 2]
            spread = [[middle - rates[0]], [rates[-1] - middle]]
            style = dict(markersize=9, markeredgecolor=INK, capsize=4, color=color, fmt=marker)
            share = middle * unit / min(ceiling, bandwidth * places[label])
            axes.errorbar(places[label], middle, yerr=spread, label=f"{label}: {share:.0%} of the roof", **style)
        axes.set(xscale="log", yscale="log", xlim=(left, right), title=title)
        axes.set(xlabel="operations for each byte that is read", ylabel=f"{name}FLOP/s")
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 3) if high < 3e3 * low else (1,)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def curve_figure(curves, xlabel, ylabel, title, log=False, method=None):
    """Means with their spread over seeds. curves: {label: (xs, [[a value per seed] per x])};
    lines differ in dash and marker too. A label that names a method gets its colour, the others that of `method`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, (color, marker, (label, (xs, values))) in enumerate(
            (*look, curve) for look, curve in zip(looks(curves, method), curves.items())
        ):
            means = [sum(row) / len(row) for row in values]
            marker = marker if len(means) <= 20 else ""
            axes.plot(xs, means, color=color, linestyle=DASHES[i % 4], marker=marker, label=label)
            lowest, highest = [min(row) for row in values], [max(row) for row in values]
            axes.fill_between(xs, lowest, highest, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set(ylim=(0, 105) if "%" in ylabel else None, xscale="log" if log else "linear")
        if all(isinstance(x, int) for xs, _ in curves.values() for x in xs) and not log:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 5:  # a long key would lie on the curves
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        elif len(curves) > 1:
            axes.legend()
    return figure


def attention_figure(prompts, tokens, characters, rows, title, tanh=True):
    """Heat maps side by side: gated weights on K prompts (R, K), which may be negative, and weights on T tokens (R, T),
    a character of the text below each column; rows as in `name_groups`. tanh: whether the gates pass through one."""
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        left, right = figure.subplots(1, 2, width_ratios=(prompts.shape[1], tokens.shape[1]), sharey=True)
        extent = max(0.05, abs(prompts).max().item())
        images = (
            left.imshow(prompts, aspect="auto", cmap="PuOr_r", vmin=-extent, vmax=extent),
            right.imshow(tokens, aspect="auto", cmap="Blues", vmin=0, vmax=1),
        )
        left.set(title=f"{'tanh(gate)' if tanh else 'gate'} · softmax", xlabel="prompt token")
        left.set(xticks=range(prompts.shape[1]), xticklabels=range(1, prompts.shape[1] + 1))
        right.set(title="softmax", xlabel="text", xticks=range(len(characters)), xticklabels=characters)
        for axes, image in zip((left, right), images):
            name_groups(axes, rows)
            figure.colorbar(image, ax=axes, fraction=0.06, pad=0.01, aspect=30)
    return figure


def name_groups(axes, rows):
    """Names the groups of a heat map's rows, each in its middle, and draws a line between them.
    rows: a label at the first row of each group, empty ones for the others."""
    starts = [i for i, label in enumerate(rows) if label]
    middles = [i + 0.5 * (len(rows) / len(starts) - 1) for i in starts]
    axes.set(yticks=middles, yticklabels=[rows[i] for i in starts])
    for i in starts[1:]:
        axes.axhline(i - 0.5, color=INK, linewidth=0.8)


def share_figure(panels, characters, rows, title):
    """The share of each softmax that a prefix takes: heat maps side by side, {heading: (R, T)}, a character of the text
    below each column; rows as in `name_groups`."""
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (heading, shares) in zip(every, panels.items()):
            image = axes.imshow(100 * shares, aspect="auto", cmap="Oranges", vmin=0, vmax=100)
            axes.set(title=f"{heading}: {100 * shares.mean():.0f} % on average")
            axes.set_xlabel("the token that looks (its character)")
            axes.set(xticks=range(len(characters)))
            axes.set_xticklabels(characters, fontsize=7.5)
            name_groups(axes, rows)
            axes.title.set_fontsize(10.5)
        figure.colorbar(image, ax=every[-1], fraction=0.06, pad=0.02, aspect=30, label="share of the prefix (%)")
    return figure


def heat_figure(values, rows, columns, xlabel, ylabel, title, scale, write="{:.2f}"):
    """A heat map with the number in each cell; values: a list of rows, None where a cell stays empty; scale: what the
    colours say. write None: no numbers, for maps with many cells."""
    with matplotlib.rc_context(PLAIN):
        wide = len(columns) > 8
        height = 1.5 + (0.26 if write is None else 0.45) * len(rows)
        figure = Figure(figsize=(11 if wide else 2.6 + 1.1 * len(columns), max(2.8, height)), layout="constrained")
        axes = figure.subplots()
        numbers = [[float("nan") if value is None else value for value in row] for row in values]
        image = axes.imshow(numbers, aspect="auto", cmap="YlOrRd", vmin=0)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        top = image.get_clim()[1]
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if write is not None and value is not None:
                    color = "white" if value > 0.6 * top else INK
                    axes.text(j, i, write.format(value), ha="center", va="center", color=color)
        percent = PercentFormatter(1, decimals=0) if write and write.endswith("%}") else None  # as in the cells
        figure.colorbar(image, ax=axes, label=scale, fraction=0.06, pad=0.02, format=percent)
    return figure


def rotation_figure(speeds, scores):
    """How RoPE turns pairs of features. speeds: {title: radians a position}, drawn at positions 0 to 7;
    scores: {label: (distances, scores)}, drawn as curves."""
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 3.3), layout="constrained")
        *circles, right = figure.subplots(1, len(speeds) + 1, width_ratios=[1] * len(speeds) + [1.7])
        for axes, (title, speed) in zip(circles, speeds.items()):
            axes.add_patch(matplotlib.patches.Circle((0, 0), 1, fill=False, edgecolor="#bbbbbb"))
            for position in reversed(range(8)):
                x, y = math.cos(position * speed), math.sin(position * speed)
                color = matplotlib.colormaps["YlOrRd_r"](position / 10)
                axes.plot((0, x), (0, y), color=color, linewidth=1.6)
                axes.plot(x, y, marker="o", markersize=4, color=color)
                if 8 * speed > 2:
                    axes.text(1.18 * x, 1.18 * y, str(position), ha="center", va="center", fontsize=9)
            axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[], title=title)
            axes.spines[:].set_visible(False)
        for i, (label, (distances, values)) in enumerate(scores.items()):
            right.plot(distances, values, color=SHADES[i % 4], linestyle=DASHES[i % 4], linewidth=1.3, label=label)
        right.axhline(0, color=INK, linewidth=0.8)
        right.set(xlabel="distance from key to query (tokens)", ylabel="score, 1 at distance 0")
        right.set_title("The score of a query and a key that match")
        right.legend()
    return figure


def maps_figure(maps, rows, columns, title, xlabel, ylabel):
    """Heat maps of numbers from 0 to 1, two in a row.
    maps: {title: (R, C)}; rows, columns: a label for each, empty ones allowed."""
    with matplotlib.rc_context(PLAIN):
        lines = (len(maps) + 1) // 2
        figure = Figure(figsize=(11, 0.9 + lines * (0.9 + 0.19 * len(rows))), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        every = figure.subplots(lines, 2, squeeze=False, sharex=True, sharey=True)
        for axes, (heading, values) in zip(every.flat, maps.items()):
            image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1)
            axes.set(title=heading)
            axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
            axes.tick_params(length=0, labelbottom=True)
        for axes in every[-1]:
            axes.set_xlabel(xlabel)
        for axes in every[:, 0]:
            axes.set_ylabel(ylabel)
        figure.colorbar(image, ax=every, fraction=0.03, pad=0.01)
    return figure


def scale_figure(scales, title):
    """Learned factors around 1, each vector sorted: a row of panels for each layer, a column for each kind, widths as
    their lengths; amplified above 1, inhibited below, turned round below 0. scales: {layer: {kind: (features,)}}."""
    kinds = list(next(iter(scales.values())))
    widths = [max(25, len(next(iter(scales.values()))[kind]) ** 0.75) for kind in kinds]
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 0.5 + 1.45 * len(scales)), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        grid = figure.subplots(len(scales), len(kinds), width_ratios=widths, sharey=True, squeeze=False)
        for axes, kind in zip(grid[0], kinds):
            axes.set_title(kind)
        for row, (layer, vectors) in zip(grid, scales.items()):
            row[0].set_ylabel(f"layer {layer}\nfactor")
            for axes, kind in zip(row, kinds):
                every = sorted(vectors[kind].tolist())
                values = every[:: thinned(every)]
                edges = [i - 0.5 for i in range(len(values) + 1)]
                amplified, inhibited = [max(v, 1) for v in values], [min(max(v, 0), 1) for v in values]
                for color, part in ((TRAINED, amplified), (FROZEN, inhibited)):
                    axes.stairs(part, edges, baseline=1, fill=True, color=color)
                axes.stairs([min(v, 0) for v in values], edges, baseline=0, fill=True, color=GATE)
                axes.axhline(1, color=INK, linewidth=0.8), axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
                axes.set(xticks=(), xlim=(-0.5, len(values) - 0.5))
                axes.spines["bottom"].set_visible(False)
        for axes, kind in zip(grid[-1], kinds):
            n, step = len(vectors[kind]), thinned(vectors[kind])
            axes.set_xlabel(f"{n} features, sorted" + (f" (1 in {step} drawn)" if step > 1 else ""))
    return figure


def thinned(values):
    """One value in how many to draw: enough of them for the eye, and a small file."""
    return max(1, len(values) // 64)


def edged(axes):
    """A picture's axes: no numbers, a thin edge around it."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#c8c8c8", linewidth=0.7)


def pictures_figure(pictures, said, title):
    """Pictures (n, h, w) in two columns, with what was said of each: (prompt, answer, whether it is right)."""
    n, (h, w) = len(pictures), pictures.shape[1:]
    rows, columns = (-(-n // 2), 2) if w > 3 * h else (-(-n // 5), 5)
    with matplotlib.rc_context(PLAIN):
        size = (9, 0.95 * rows + 0.5) if columns == 2 else (11, 2.35 * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, picture, (prompt, answer, right) in zip(places, pictures, said):
            axes.imshow(picture, cmap="Greys", interpolation="none", vmin=0, vmax=1)
            between = "" if columns == 2 else "\n"  # five stand side by side
            mark = "" if right else "  ✗"
            axes.set_title(f"{prompt}{between}{answer}{mark}", fontsize=10, color=INK if right else GATE)
            edged(axes)
        for axes in list(places)[n:]:
            axes.axis("off")
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def reading_figure(picture, effect, weights, characters, rows, title):
    """How a picture (h, N·w) of N tiles is read while T characters are written. Large, below the picture: effect
    (T, N), what a character loses when a tile is exchanged. Small beside it: where each of R heads looks, weights
    (R, T, N), named by `rows`."""
    R, (T, N) = len(weights), effect.shape
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1))
        top, large = left.subplots(2, 1, height_ratios=(1, 5.2))
        top.imshow(
            picture, cmap="Greys", interpolation="none", vmin=0, vmax=1, aspect="auto", extent=(-0.5, N - 0.5, 1, 0)
        )
        top.set(xlim=(-0.5, N - 0.5), title="what each character depends on")
        large.imshow(effect, aspect="auto", cmap="Purples", interpolation="none", vmin=0, vmax=1)
        large.set(xticks=range(N), xticklabels=range(1, N + 1), xlabel="the digit that is exchanged", yticks=range(T))
        large.set_yticklabels(characters, fontsize=13)
        large.set_ylabel("the character that is written")
        for t in range(T):
            for n in range(N):
                if effect[t, n] > 0.05:
                    color = "white" if effect[t, n] > 0.6 else INK
                    large.text(n, t, f"{100 * effect[t, n]:.0f}", ha="center", va="center", color=color, fontsize=9)
        for i, axes in enumerate(right.subplots(-(-R // 4), 4, sharex=True, sharey=True).flat):
            axes.imshow(weights[i], aspect="auto", cmap="Oranges", interpolation="none", vmin=0, vmax=1)
            axes.set_title(rows[i], fontsize=8.5)
            edged(axes)
        right.suptitle("where each head looks meanwhile (its softmax)", fontsize=10.5)
        edged(top)
    return figure


def tiles_figure(images, maps, names, title):
    """Pictures (n, h, w) over what some of an encoder's filters make of them, (n, C, h, w), a column for each."""
    n, rows = len(images), 1 + maps.shape[1]
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(11, 1.05 * rows + 0.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        places = figure.subplots(rows, n)
        for column in range(n):
            places[0, column].imshow(images[column], cmap="Greys", interpolation="none", vmin=0, vmax=1)
            places[0, column].set_title(names[column], fontsize=10, loc="center")
            for row in range(1, rows):
                places[row, column].imshow(maps[column, row - 1], cmap="Oranges", interpolation="none")
        for axes in places.flat:
            edged(axes)
        for row, label in enumerate(("picture", *(f"filter {i}" for i in range(1, rows)))):
            places[row, 0].set_ylabel(label, fontsize=9)
    return figure
