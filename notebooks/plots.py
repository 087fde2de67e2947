"""The figures of the notebooks: pure functions of numbers that return a matplotlib Figure.

The colours are those of Okabe and Ito, which can be distinguished with any colour vision. Lines, markers and hatches
differ as well, so that the figures can also be read in grey.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)), (0, (3, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
TEACHER = "#444444"


def _figure(num_axes: int = 1, width: float = 5.2, height: float = 3.6):
    figure = Figure(figsize=(width * num_axes, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, num_axes, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def training_curves(history: list[dict]) -> Figure:
    """Plot the loss of a run so far against the step, on training and on held-out text.

    Args:
        history: the events of the run, as in metrics.jsonl.
    """
    figure, (axis,) = _figure(1, width=6.4)
    for index, split in enumerate(("train", "eval")):
        events = [event for event in history if f"{split}/step" in event]
        steps, losses = ([event[f"{split}/{key}"] for event in events] for key in ("step", "loss"))
        style = {"marker": "o", "markersize": 4} if split == "eval" else {"linewidth": 1}
        label = {"train": "training text, single steps", "eval": "held-out text"}[split]
        axis.plot(steps, losses, color=COLOURS[index], label=label, **style)
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.legend(frameon=False)
    return figure


def curves(
    x: Sequence[float],
    lines: dict[str, Sequence],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    levels: dict[str, float] | None = None,
    marks: dict[str, float] | None = None,
    filled: str | None = None,
) -> Figure:
    """Plot lines over a common x.

    Args:
        x: (n,).
        lines: name -> (n,), or (n, seeds): then each seed is a point, and the line goes through the means.
        levels: name -> y of a horizontal line.
        marks: name -> x of a vertical line.
        filled: the name of the line that is drawn as a grey area, since the others are compared with it.
    """
    figure, (axis,) = _figure(1, width=6.4)
    lines = {name: np.asarray(values, dtype=float) for name, values in lines.items()}
    drawn = 0
    for name, values in lines.items():
        if name == filled:
            axis.fill_between(x, values, color="#999999", alpha=0.5, linewidth=0, label=name)
            continue
        colour, style, marker = COLOURS[drawn % 6], STYLES[drawn % 6], MARKERS[drawn % 6]
        drawn += 1
        if values.ndim == 2:
            for seed in values.T:
                axis.plot(x, seed, linestyle="", marker=marker, markersize=4, color=colour, alpha=0.5)
            values = values.mean(1)
        dots = {"marker": marker, "markersize": 5, "clip_on": False} if len(values) <= 12 else {}
        axis.plot(x, values, color=colour, linestyle=style, linewidth=1.8, label=name, **dots)
    for index, (name, level) in enumerate((levels or {}).items()):
        axis.axhline(level, color=TEACHER, linewidth=1, linestyle=(":", "-.")[index % 2], label=name)
    for name, position in (marks or {}).items():
        axis.axvline(position, color=TEACHER, linewidth=1, linestyle=":")
        axis.annotate(name, (position, 0.98), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize=8, color=TEACHER)  # fmt: skip
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_x:
        axis.set_xscale("log")
    if len(x) <= 12:  # few values: each gets a tick
        axis.set_xticks(x, [f"{float(value):,g}" for value in x])
        axis.minorticks_off()
    if log_y:
        axis.set_yscale("log")
    elif not levels and all(values.min() >= 0 for values in lines.values()):
        axis.set_ylim(bottom=0)
    if levels:  # the position "best" does not avoid horizontal lines
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    else:
        axis.legend(frameon=False, fontsize=8)
    return figure


def token_strips(tokens: Sequence[str], values: dict[str, Sequence[float]], unit: str, columns: int = 64) -> Figure:
    """Show a text with each token on a coloured background: one strip per quantity, dark where the value is low.

    Args:
        tokens: the n tokens as text.
        values: the name of a quantity -> (n,). All strips have the same scale.
        unit: the unit of the values, for the colour bar.
        columns: the number of characters per line.
    """
    cells, column, line = [], 0, 0  # (token, column, line)
    for token in tokens:
        text = token.replace(" ", "·").replace("\n", "↵") or "?"
        if column + len(text) + 1 > columns:
            column, line = 0, line + 1
        cells.append((text, column, line))
        column += len(text) + 1
    figure = Figure(figsize=(9.6, (0.5 + 0.3 * (line + 1)) * len(values) + 0.1), dpi=150, layout="constrained")
    axes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    colours = colormaps["cividis"]
    top = max(max(each) for each in values.values()) or 1.0
    for axis, (name, each) in zip(axes, values.items(), strict=True):
        for (text, column, line), value in zip(cells, each, strict=True):
            shade = colours(value / top)
            axis.add_patch(
                Rectangle((column, line), len(text) + 1, 0.9, facecolor=shade, edgecolor="white", linewidth=0.7)
            )
            ink = "black" if 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] > 0.5 else "white"
            axis.text(column + (len(text) + 1) / 2, line + 0.47, text, ha="center", va="center", color=ink,
                      fontsize=10, family="monospace")  # fmt: skip
        axis.set(xlim=(0, columns), ylim=(cells[-1][2] + 1, 0))
        axis.set_title(name, loc="left", fontsize=13)
        axis.axis("off")
    scale = figure.colorbar(ScalarMappable(Normalize(0, top), colours), ax=list(axes), pad=0.01, aspect=18)
    scale.set_label(unit, fontsize=13)
    scale.ax.tick_params(labelsize=12)
    return figure


def token_bars(tokens: Sequence[str], groups: dict[str, Sequence[float]], title: str = "") -> Figure:
    """Plot the probabilities of a few tokens, side by side for a few distributions.

    Args:
        tokens: the k tokens as text, the most likely one first.
        groups: the name of a distribution -> (k,).
    """
    figure, (axis,) = _figure(1, width=6.4, height=1.2 + 0.16 * len(tokens) * (len(groups) + 0.6))
    height = 0.8 / len(groups)
    for index, (name, values) in enumerate(groups.items()):
        places = [position + (index - (len(groups) - 1) / 2) * height for position in range(len(tokens))]
        bars = axis.barh(places, values, height, color=COLOURS[index % 6], hatch=HATCHES[index % 4], edgecolor="white",
                         label=name)  # fmt: skip
        axis.bar_label(bars, labels=[f"{value:.1%}" if value else "" for value in values], padding=3, fontsize=7)
    axis.set_yticks(range(len(tokens)), [repr(token) for token in tokens], family="monospace", fontsize=8)
    axis.set(xlabel="probability of the next token", title=title,
             xlim=(0, 1.13 * max(max(values) for values in groups.values())))  # fmt: skip
    axis.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(groups))
    return figure


def reliability(
    groups: dict[str, tuple[Sequence[float], Sequence[bool]]], title: str = "", bins: int = 10, least: int = 20
) -> Figure:
    """Plot how often the most likely token came next, against its probability: below the diagonal is overconfident.

    Args:
        groups: name -> (confidence, whether the most likely token came next), each (N,), one value per token.
        least: the number of tokens that a bin must have to be shown; the fraction of a few is mostly chance.
    """
    figure, (left, right) = _figure(2, width=4.8)
    left.plot([0, 1], [0, 1], color=TEACHER, linewidth=1, linestyle=":", label="calibrated")
    for index, (name, (confidence, correct)) in enumerate(groups.items()):
        confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
        bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
        cells = [bin_of == b for b in range(bins) if (bin_of == b).sum() >= least]
        means = [confidence[cell].mean() for cell in cells]
        style = {"color": COLOURS[index % 6], "linestyle": STYLES[index % 6], "marker": MARKERS[index % 6]}
        left.plot(means, [correct[cell].mean() for cell in cells], label=name, markersize=5, **style)
        right.plot(means, [cell.mean() for cell in cells], label=name, markersize=5, **style)
    left.set(xlabel="confidence: probability of the most likely token", ylabel="fraction in which it came next",
             title=title, xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    right.set(xlabel="confidence", ylabel="fraction of all tokens", title="Distribution of the confidence", xlim=(0, 1))
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    return figure


def points(panels: dict[str, dict[str, Sequence[float]]], levels: dict[str, float] | None = None) -> Figure:
    """Plot every value as a point and the mean as a bar: one panel per quantity, one column per group.

    Args:
        panels: quantity with its unit -> group -> values, for example one per seed.
        levels: quantity -> the teacher's value, to compare with.
    """
    figure, axes = _figure(len(panels), width=3.5, height=3.2)
    for axis, (quantity, groups) in zip(axes, panels.items(), strict=True):
        for index, values in enumerate(groups.values()):
            spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
            axis.plot(index + np.asarray(spread), values, linestyle="", marker=MARKERS[index % 6], alpha=0.8,
                      color=COLOURS[index % 6])  # fmt: skip
            axis.hlines(np.mean(values), index - 0.28, index + 0.28, color="black", linewidth=1.5)
        if quantity in (levels or {}):
            axis.axhline(levels[quantity], color=TEACHER, linestyle=":", linewidth=1.2)
            axis.annotate("teacher", (0.99, levels[quantity]), (0, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize=10, color=TEACHER)  # fmt: skip
        axis.set_xticks(range(len(groups)), list(groups), fontsize=10)
        axis.set(xlim=(-0.6, len(groups) - 0.4))
        axis.set_ylabel(quantity, fontsize=10)
        axis.tick_params(axis="y", labelsize=10)
    return figure


def differences(panels: dict[str, dict[str, Sequence[float]]], reference: str, factor: float = 4.3) -> Figure:
    """Plot paired differences from a reference: a point per seed, and the mean with an interval; grey if 0 is in it.

    Args:
        panels: quantity with its unit -> group -> differences, one per seed, at least two.
        reference: the name of what was subtracted.
        factor: half the interval in standard errors: 4.3 gives the two-sided 95 % interval for three seeds.
    """
    figure, axes = _figure(len(panels), width=3.5, height=1.2 + 0.32 * max(map(len, panels.values())))
    for axis, (quantity, groups) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color=TEACHER, linewidth=1.2, linestyle=":")
        for row, values in enumerate(np.asarray(each, dtype=float) for each in groups.values()):
            mean, half = values.mean(), factor * values.std(ddof=1) / len(values) ** 0.5
            noise = abs(mean) <= half
            colour = "#999999" if noise else COLOURS[0]
            axis.errorbar(mean, row, xerr=half, color=colour, capsize=3, marker="s", mfc="white" if noise else colour)
            axis.plot(values, [row + 0.28] * len(values), linestyle="", marker="|", markersize=5, color=colour)
        axis.set_yticks(range(len(groups)), list(groups) if axis is axes[0] else [], fontsize=10)
        axis.set(ylim=(len(groups) - 0.4, -0.6))
        axis.set_xlabel(f"{quantity}\nminus {reference}", fontsize=10)
        axis.tick_params(axis="x", labelsize=10)
        axis.locator_params(axis="x", nbins=4)
    return figure


def predicted_and_counted(groups: dict[str, tuple[float, float, float]], quantity: str) -> Figure:
    """Plot counted against predicted fractions, with two standard errors; on the diagonal they are equal.

    Args:
        groups: name -> (predicted, counted, standard error of the count), as fractions.
        quantity: what is predicted.
    """
    figure, (axis,) = _figure(1, width=4.6, height=4.0)
    axis.plot([0, 1], [0, 1], color=TEACHER, linewidth=1, linestyle=":", label="as predicted")
    for index, (name, (predicted, counted, error)) in enumerate(groups.items()):
        axis.errorbar(predicted, counted, yerr=2 * error, color=COLOURS[index % 6], marker=MARKERS[index % 6],
                      linestyle="", capsize=3, label=name)  # fmt: skip
    axis.set(xlabel=f"predicted {quantity}", ylabel=f"counted {quantity}", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)
    return figure


def collectives(weights: Sequence[float], gradients: Sequence[Sequence[float]]) -> Figure:
    """Draw what each of R ranks holds before and after FSDP's all-gather and reduce-scatter; empty parts are not held.

    Args:
        weights: (R,), the weights; rank r holds the one at r.
        gradients: (R, R), in row r those that rank r has computed.
    """
    figure = Figure(figsize=(9.6, 1.9 + 0.72 * len(weights)), dpi=150, layout="constrained")
    axes, ranks = figure.subplots(1, 2), range(len(weights))
    summed = np.sum(gradients, axis=0)
    panels = {
        "all-gather: weights, before a layer runs": ([[weights[r]] for r in ranks], [list(weights)] * len(weights)),
        "reduce-scatter: gradients, after it": ([list(row) for row in gradients], [[summed[r]] for r in ranks]),
    }
    for axis, (title, states) in zip(axes, panels.items(), strict=True):
        for column, (state, held) in enumerate(zip(("before", "after"), states, strict=True)):
            left = column * (len(weights) + 1.4)
            axis.text(left + len(weights) / 2, -0.25, state, ha="center", fontsize=13)
            for rank, numbers in enumerate(held):
                for part in ranks:
                    number = numbers[part] if len(numbers) > 1 else numbers[0] if part == rank else None
                    colour = "none" if number is None else COLOURS[part % 6]
                    axis.add_patch(Rectangle((left + part, rank), 1, 0.8, facecolor=colour, edgecolor=TEACHER,
                                             linewidth=1, alpha=0.45))  # fmt: skip
                    text = "" if number is None else f"{number:g}"
                    axis.text(left + part + 0.5, rank + 0.42, text, ha="center", va="center", fontsize=14)
        for rank in ranks:
            axis.text(-0.25, rank + 0.42, f"rank {rank}", ha="right", va="center", fontsize=12)
        middle = len(weights) / 2 - 0.1
        arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": TEACHER}
        axis.annotate("", (len(weights) + 1.25, middle), (len(weights) + 0.15, middle), arrowprops=arrow)
        axis.set(xlim=(-2.0, 2 * len(weights) + 1.5), ylim=(len(weights), -0.7))
        axis.set_title(title, fontsize=13)
        axis.axis("off")
    return figure


def stacked_bars(
    bars: dict[str, dict[str, float]], *, xlabel: str, title: str = "", levels: dict[str, float] | None = None
) -> Figure:
    """Plot totals as bars that are made of parts, with the total at the end of each bar.

    Args:
        bars: name of the bar -> part -> size; the same parts in the same order in each.
        levels: name -> a size to compare the totals with, drawn as a vertical line.
    """
    figure, (axis,) = _figure(1, width=8.2, height=1.5 + 0.55 * len(bars))
    longest = max([sum(parts.values()) for parts in bars.values()] + list((levels or {}).values()))
    left = np.zeros(len(bars))
    for index, part in enumerate(next(iter(bars.values()))):
        sizes = np.array([parts[part] for parts in bars.values()])
        drawn = axis.barh(range(len(bars)), sizes, 0.62, left, color=COLOURS[index % 6], hatch=HATCHES[index % 6],
                          edgecolor="white", linewidth=0.8, label=part)  # fmt: skip
        texts = [f"{size:.1f}" if size > 0.035 * longest else "" for size in sizes]
        for text in axis.bar_label(drawn, labels=texts, label_type="center", fontsize=7):
            if text.get_text():
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85})
        left += sizes
    for row, total in enumerate(left):
        axis.annotate(f"{total:.1f}", (total, row), (4, 0), textcoords="offset points", va="center", weight="bold",
                      fontsize=8)  # fmt: skip
    for name, level in (levels or {}).items():
        axis.axvline(level, color=TEACHER, linewidth=1.2, linestyle=":")
        axis.annotate(name, (level, 1.0), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=8, color=TEACHER)  # fmt: skip
    axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=xlabel, xlim=(0, 1.08 * longest))
    axis.set_title(title, pad=14 if levels else 6)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure
