"""What holds for all tests, before any of them imports torch."""

import os

# Their tensors are tiny, and threads that wait for each other cost more than they help, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
