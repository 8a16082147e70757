"""lm-evaluation-harness on a model that is spread over ranks: `pip install megatrain[eval]`.

Every rank runs the harness on the same tasks and puts the same requests to the model together, so that the harness need not
know of ranks. Tasks that compare likelihoods and those that roll over texts are answered; those that generate are refused,
since any checkpoint is a folder that the harness's own `hf` model generates from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatrain.errors import ConfigError, UserError
from megatrain.evaluation.loglikelihood import Scorer
from megatrain.evaluation.multiple_choice import make_request
from megatrain.evaluation.progress import ProgressBar
from megatrain.evaluation.spec import EvalSpec
from megatrain.evaluation.windows import Row, rows


class HarnessModel(LM):
    """What the harness asks a model for. All ranks call it together, with the same requests."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        *,
        prefix: int | None,
        window: int,
        stride: int | None = None,
        progress: ProgressBar | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self.prefix, self.window = scorer, tokenizer, prefix, window
        self.stride = window if stride is None else stride
        self.progress = progress or ProgressBar(silent=True)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether greedy decoding would give it."""
        made = [self._request(*instance.args) for instance in requests]
        return [
            (score.loglikelihood, score.greedy)
            for score in self.scorer.scores(self.progress.watch(made))
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text."""
        made = [list(self._rows(instance.args[0])) for instance in requests]
        scores = self.scorer.scores(self.progress.watch(row for some in made for row in some))
        return [sum(next(scores).loglikelihood for _ in some) for some in made]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused."""
        raise UserError(
            "this task generates text, which `megatrain evaluate` does not; run it with the harness itself: "
            "lm_eval --model hf --model_args pretrained=FOLDER --tasks ..."
        )

    def _request(self, context: str, continuation: str) -> Row:
        return make_request(
            context, continuation, tokenizer=self.tokenizer, prefix=self.prefix, window=self.window
        ).row

    def _rows(self, text: str) -> list[Row]:
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        before = [] if self.prefix is None else [self.prefix]
        return list(rows([*before, *tokens], window=self.window, stride=self.stride))


def run_tasks(
    subject: EvalSpec, scorer: Scorer, tokenizer: Any, prefix: int | None, progress: ProgressBar
) -> dict[str, Any]:
    """The harness's figures, named `task/metric`; only rank 0 is sure to get them."""
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer",
            "(nothing)",
            "is missing and the harness's tasks are text",
            "give a tokenizer's folder",
        )
    manager = _task_manager(subject)
    model = HarnessModel(scorer, tokenizer, prefix=prefix, window=subject.window, progress=progress)
    found = simple_evaluate(
        model=model,
        tasks=list(subject.tasks),
        task_manager=manager,
        limit=subject.limit,
        num_fewshot=subject.num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
    )
    if found is None:  # the harness gives its results to the first rank of a machine alone
        return {}
    return {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _task_manager(subject: EvalSpec) -> TaskManager:
    """One that knows the tasks; the harness's own thousands take seconds to list, so the user's folder alone comes first."""
    manager = None
    if subject.include_path is not None:
        if not Path(subject.include_path).is_dir():
            raise ConfigError("--include-path", subject.include_path, "is not a folder")
        manager = TaskManager(include_path=subject.include_path, include_defaults=False)
    if manager is None or any(task not in manager.all_tasks for task in subject.tasks):
        manager = TaskManager(include_path=subject.include_path)
    unknown = [task for task in subject.tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            "--tasks",
            unknown[0],
            "is not a task that lm-evaluation-harness knows",
            "see `lm_eval ls tasks`, or give --include-path FOLDER for tasks of your own",
        )
    return manager
