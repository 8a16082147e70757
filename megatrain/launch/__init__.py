"""Starts, supervises and watches the ranks of a run."""
