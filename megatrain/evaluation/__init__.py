"""Measures a model on any layout."""
