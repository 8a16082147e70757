"""Settings of a run: declaration, reading, validation."""
