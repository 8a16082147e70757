"""The adapter to DeepSpeed ZeRO, optimizers and learning rates."""
