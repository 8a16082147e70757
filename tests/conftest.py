"""Settings of all tests, made before any of them imports torch."""

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.launches import extensions, launch, server  # noqa: F401  (fixtures)

# The tensors of tests are tiny: more threads cost more than they help.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Refuses two test files of one name: pytest imports them by name, so the two would clash."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise pytest.UsageError(
            f"more than one test file is called {', '.join(twice)}; rename all but one"
        )
