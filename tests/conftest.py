"""What holds for all tests, before any of them imports torch."""

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.launches import extensions, launch, server  # noqa: F401  (fixtures)

# Their tensors are tiny, and threads that wait for each other cost more than they help, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Refuse two test files of one name at once: pytest imports them by it, and only a run of all tests would show the clash."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise pytest.UsageError(
            f"more than one test file is called {', '.join(twice)}; rename all but one"
        )
