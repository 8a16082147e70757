"""Converts models between formats, with verification."""
