"""Transformer models as lists of layers, read from Hugging Face configs."""
