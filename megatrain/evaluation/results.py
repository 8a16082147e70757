"""The results file of an evaluation and its table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatrain.evaluation.fingerprint import result_id
from megatrain.evaluation.spec import EvalSpec
from megatrain.files import write_atomically
from megatrain.telemetry.console import duration

Results = dict[str, Any]
"""The content of the results file; see `docs/evaluate.md`."""


def write_results(results: Results, folder: Path, spec: EvalSpec) -> Path:
    """Writes the results file atomically and returns its path.

    The same evaluation overwrites its own file; another model, data or settings give another name.
    """
    name = re.sub(r"[^\w.-]+", "_", Path((*spec.tasks, *spec.data)[0]).name)
    path = folder / f"{spec.kind}-{name}-{result_id(results)}.json"
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def format_results(results: Results) -> str:
    """Returns the results as a table."""
    settings, model, metrics = results["settings"], results["model"], results["figures"]
    layout = " x ".join(f"{axis} {settings[axis]}" for axis in ("tensor", "pipeline", "data"))
    width = max(len(name) for name in metrics)
    lines = [
        f"{results['kind']} of {', '.join(results['data']['paths'])}",
        f"  model     {model['path']} ({model['model_type']})",
        f"  settings  window {settings['window']}, stride {settings['stride']}, {layout}, "
        f"{settings['dtype']}",
        f"  time      {duration(results['seconds'])}, {results['tokens_per_second']:,.0f} tokens/s",
        "",
        *(f"  {name:<{width}}  {_format_metric(value):>14}" for name, value in metrics.items()),
    ]
    return "\n".join([*lines, *_format_classes(results["classes"])])


def _format_classes(classes: dict[str, dict[str, float]]) -> list[str]:
    if not classes:
        return []
    columns = list(next(iter(classes.values())))
    width = max(len(label) for label in classes)
    lines = ["", "  " + " " * width + "".join(f"{name:>11}" for name in columns)]
    for label, row in classes.items():
        cells = (f"{row[name]:>11.{0 if name == 'support' else 4}f}" for name in columns)
        lines.append(f"  {label:<{width}}" + "".join(cells))
    return lines


def _format_metric(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.5g}" if abs(value) >= 1000 else f"{value:.5f}"
    return str(value)
