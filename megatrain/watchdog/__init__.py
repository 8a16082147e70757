"""Notices from outside the collectives that a run stands still or has lost a rank, says whom everyone waits for, and ends it."""
