"""Metrics, events, logs, traces and their analysis."""
