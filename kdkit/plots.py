"""The figures that notebooks and the demo share: pure functions of numbers that return a matplotlib Figure.

The colours are Okabe and Ito's, which readers with any colour vision tell apart; lines differ in style too, so that
nothing is lost in grey.
"""

from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
TEACHER = "#444444"


def _figure(num_axes: int = 1, width: float = 5.2, height: float = 3.6):
    figure = Figure(figsize=(width * num_axes, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, num_axes, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def evaluation_curves(histories: dict[str, list[dict]]) -> Figure:
    """Held-out cross-entropy and KL to the teacher against the step, for runs of one teacher.

    Args:
        histories: name of a run -> its events, as in metrics.jsonl.
    """
    figure, (left, right) = _figure(2)
    for index, (name, history) in enumerate(histories.items()):
        events = [event for event in history if "eval/step" in event]
        steps = [event["eval/step"] for event in events]
        style = {"color": COLOURS[index % 6], "linestyle": STYLES[index % 4], "marker": "o", "markersize": 3}
        left.plot(steps, [event["eval/ce_loss"] for event in events], label=name, **style)
        right.plot(steps, [event["eval/kl_t1"] for event in events], label=name, **style)
        if index == 0 and events:
            left.axhline(events[-1]["eval/teacher_ce_loss"], color=TEACHER, linewidth=1, label="teacher")
    left.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)", title="Held-out text")
    right.set(
        xlabel="optimizer step",
        ylabel="KL(teacher || student), T = 1 (nats per token)",
        title="Distance to the teacher",
    )
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    return figure


def training_curves(history: list[dict]) -> Figure:
    """The loss of a run so far, on its training text and on the held-out one, against the step.

    Args:
        history: its events, as in metrics.jsonl.
    """
    figure, (axis,) = _figure(1, width=6.4)
    for index, part in enumerate(("train", "eval")):
        events = [event for event in history if f"{part}/step" in event]
        steps, losses = ([event[f"{part}/{key}"] for event in events] for key in ("step", "loss"))
        style = {"marker": "o", "markersize": 4} if part == "eval" else {"linewidth": 1}
        label = {"train": "training text, each step", "eval": "held-out text"}[part]
        axis.plot(steps, losses, color=COLOURS[index], label=label, **style)
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.legend(frameon=False)
    return figure
