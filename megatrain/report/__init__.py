"""HTML pages about a run."""
