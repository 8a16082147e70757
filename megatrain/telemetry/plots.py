"""Plots of a run: its loss, from metrics.jsonl, and the confusion matrix of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatrain.telemetry.curves import Curve, read_curves
from megatrain.telemetry.metrics import FILE_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and vermillion of Okabe and Ito's palette for colour-blind readers; the markers differ too.
_TRAIN, _VALID = "#0072B2", "#D55E00"

Matrix = np.ndarray[Any, np.dtype[Any]]
Points = tuple[list[float], list[float]]


def loss_name(task: str, problem: str = "single-label") -> str:
    """Returns the name of a task's loss with its unit; `problem` is that of classification."""
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
    """Plots training and validation loss to loss.png and returns its path.

    The x axis shows tokens, or steps if the metrics have no tokens.

    Args:
        run_folder: folder with metrics.jsonl.
        title: title of the plot; by default the name of the folder.
        loss: label of the y axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(run_folder)
    curves = read_curves(folder / FILE_NAME)
    # Without pyplot, which holds global state and may open a display.
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
    """Plots an int matrix [label, prediction] as shares of each row; small matrices show counts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(14.0, 3.0 + 0.45 * len(labels))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the label", shrink=0.8)
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), [_shorten(label) for label in labels], rotation=90)
        axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels])
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
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(f"{np.trace(matrix)} of {matrix.sum()} correct")
    canvas.print_png(str(path))
    return path


def _shorten(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _points(curves: dict[str, Curve], name: str) -> Points:
    """Returns x values (tokens, or steps if there are none) and y values."""
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
