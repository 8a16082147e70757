"""The training loop, its callbacks and tasks."""
