"""Pictures of a run: its loss, drawn from its metrics.jsonl, and which classes a classifier takes for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatrain.telemetry.curves import Curve, read_curves
from megatrain.telemetry.metrics import FILE_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermillion, which readers of all kinds of colour sight tell apart; the marks differ too.
_TRAIN, _VALID = "#0072B2", "#D55E00"

Matrix = np.ndarray[Any, np.dtype[Any]]
Points = tuple[list[float], list[float]]


def loss_name(task: str, problem: str = "single-label") -> str:
    """What a task's loss is, and of what it is the mean; `problem` is classification's."""
    if task == "classification":
        return {
            "single-label": "cross-entropy loss (nats per text)",
            "multi-label": "binary cross-entropy loss (nats per text and class)",
            "regression": "mean squared error",
        }[problem]
    names = {
        "token-classification": "cross-entropy loss (nats per word)",
        "dpo": "DPO loss (per pair)",
        "simpo": "SimPO loss (per pair)",
        "orpo": "ORPO loss (per pair)",
    }
    return names.get(task, "cross-entropy loss (nats per token)")


def plot_loss(run_folder: Path | str, *, title: str = "", loss: str = "loss") -> Path:
    """Draw the training loss and the evaluations over tokens (steps where lines hold none) into loss.png; `loss` is its axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(run_folder)
    curves = read_curves(folder / FILE_NAME)
    # Drawn without pyplot, which would take over the program's figures and choose a display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, valid = _points(curves, "loss"), _points(curves, "valid_loss")
    if train[0]:
        axes.plot(*train, color=_TRAIN, linewidth=1.2, label="training")
    if valid[0]:
        axes.plot(
            *valid,
            color=_VALID,
            marker="o",
            markersize=5,
            linestyle="--",
            linewidth=1,
            label="validation",
        )
    _label(
        axes,
        title or f"Loss of {folder.resolve().name}",
        "tokens" if "tokens" in curves else "optimizer steps",
        loss,
    )
    path = folder / "loss.png"
    canvas.print_png(str(path))
    return path


def plot_confusion_matrix(path: Path, matrix: Matrix, labels: list[str]) -> Path:
    """Draw int [right class, said class] as shares of each row, with the counts in the cells where they can be read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(14.0, 3.0 + 0.45 * len(labels))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the right class", shrink=0.8)
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), [_short(label) for label in labels], rotation=90)
        axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    if len(labels) <= 20:
        for row, column in np.ndindex(*matrix.shape):
            if matrix[row, column]:
                axes.text(
                    column,
                    row,
                    str(matrix[row, column]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[row, column] > 0.6 else "black",
                )
    axes.set_xlabel("class as told")
    axes.set_ylabel("right class")
    axes.set_title(f"{np.trace(matrix)} of {matrix.sum()} right")
    canvas.print_png(str(path))
    return path


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _points(curves: dict[str, Curve], name: str) -> Points:
    """Tokens, or steps where lines hold none, and values."""
    points = curves[name].points() if name in curves else []
    steps = [point.step for point in points]
    if "tokens" in curves:
        seen = curves["tokens"].points()
        steps = np.interp(
            steps, [point.step for point in seen], [point.value for point in seen]
        ).tolist()
    return steps, [point.value for point in points]


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend(frameon=False)
