"""Checkpoints: Hugging Face folders with the optimizer state beside them."""
