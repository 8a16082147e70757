"""megatrain: a pipeline-parallel trainer for large transformers on DeepSpeed."""

__version__ = "0.1.0"
