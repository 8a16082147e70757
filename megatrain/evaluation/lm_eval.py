"""Tasks of lm-evaluation-harness on a distributed model; requires `pip install megatrain[eval]`.

All ranks run the harness on the same tasks and pass the same requests to the model together; the
harness itself runs as on a single process. Tasks that compare likelihoods or roll over texts are
supported. Tasks that generate are not: the harness's own `hf` model reads any checkpoint's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatrain.errors import ConfigError, UserError
from megatrain.evaluation.loglikelihood import Row, Scorer
from megatrain.evaluation.multiple_choice import make_request
from megatrain.evaluation.perplexity import make_rows
from megatrain.evaluation.spec import EvalSpec


class HarnessModel(LM):
    """A model of the harness. All ranks call it together, with the same requests."""

    def __init__(self, scorer: Scorer, tokenizer: Any, *, prefix: int | None, window: int) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self.prefix, self.window = scorer, tokenizer, prefix, window

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood and whether it is the greedy one."""
        rows = [self._make_row(*request.args) for request in requests]
        return [(score.loglikelihood, score.greedy) for score in self.scorer.scores(rows)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text."""
        texts = [self._make_rows(request.args[0]) for request in requests]
        scores = self.scorer.scores(row for rows in texts for row in rows)
        return [sum(next(scores).loglikelihood for _ in rows) for rows in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Raises UserError: generation is not supported."""
        raise UserError(
            "tasks that generate text are not supported by `megatrain evaluate`; run them with the "
            "harness itself",
            command="lm_eval --model hf --model_args pretrained=FOLDER --tasks TASKS",
        )

    def _make_row(self, context: str, continuation: str) -> Row:
        return make_request(
            context, continuation, tokenizer=self.tokenizer, prefix=self.prefix, window=self.window
        ).row

    def _make_rows(self, text: str) -> list[Row]:
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        before = [] if self.prefix is None else [self.prefix]
        return list(make_rows([*before, *tokens], window=self.window, stride=self.window))


def run_tasks(spec: EvalSpec, scorer: Scorer, tokenizer: Any, prefix: int | None) -> dict[str, Any]:
    """Returns the harness's metrics as `task/metric`; on other ranks than 0 they may be empty."""
    manager = _find_tasks(spec)
    found = simple_evaluate(
        model=HarnessModel(scorer, tokenizer, prefix=prefix, window=spec.window),
        tasks=list(spec.tasks),
        task_manager=manager,
        limit=spec.limit,
        num_fewshot=spec.num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
    )
    if found is None:  # the harness returns its results on the first rank of a machine only
        return {}
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _find_tasks(spec: EvalSpec) -> TaskManager:
    """Returns a manager that knows the tasks.

    The harness takes seconds to list its own thousands, so the user's folder alone comes first.
    """
    manager = None
    if spec.include_path is not None:
        if not Path(spec.include_path).is_dir():
            raise ConfigError(
                "--include-path", spec.include_path, "must be a folder", "give a folder of tasks"
            )
        manager = TaskManager(include_path=spec.include_path, include_defaults=False)
    if manager is None or any(task not in manager.all_tasks for task in spec.tasks):
        manager = TaskManager(include_path=spec.include_path)
    unknown = [task for task in spec.tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            "--tasks",
            unknown[0],
            "is not a task of lm-evaluation-harness",
            "see `lm_eval ls tasks`, or give --include-path FOLDER for your own tasks",
        )
    return manager
