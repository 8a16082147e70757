"""Settings that were renamed, by their old name.

Configs use the new names; run folders may hold the old ones.
"""

from __future__ import annotations

from typing import Any

RENAMED = {
    "run.stall_seconds": "run.hang_timeout",
    "parallel.memory_gib": "parallel.autotune_memory_gib",
    "train.eval_every": "eval.every",
    "train.eval_batches": "eval.batches",
    "train.early_stop": "eval.early_stopping_patience",
    "train.early_stop_metric": "eval.early_stopping_metric",
    "train.save_every": "checkpoint.save_every",
    "train.keep_last": "checkpoint.keep_last",
    "train.keep_every": "checkpoint.keep_every",
    "train.async_save": "checkpoint.async_save",
    "train.resume": "checkpoint.resume",
    "train.verify": "checkpoint.verify",
    "train.resume_margin": "checkpoint.resume_loss_tolerance",
    "train.max_bad_steps": "stability.max_nonfinite_steps",
    "train.spike": "stability.on_loss_spike",
    "train.spike_factor": "stability.spike_threshold",
    "train.spike_window": "stability.spike_window",
    "train.spike_steps": "stability.spike_patience",
    "train.max_rollbacks": "stability.max_rollbacks",
    "train.trace_steps": "profile.steps",
    "train.stop_after": "train.exit_after_step",
}


def migrate(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved config with the new names in place of the old ones."""
    migrated = {
        name: dict(content) if isinstance(content, dict) else content
        for name, content in raw.items()
    }
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(content := migrated.get(section), dict) and key in content:
            new_section, new_key = new.split(".")
            target = migrated.setdefault(new_section, {})
            if isinstance(target, dict):
                target.setdefault(new_key, content.pop(key))
    return migrated
