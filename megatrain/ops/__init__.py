"""Kernels and numerics on single tensors, without process groups."""
