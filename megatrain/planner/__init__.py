"""The specification of a run, and its predicted memory, disk space and time."""
