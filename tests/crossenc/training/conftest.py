"""What all tests of training share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """Hide what was imported from the garbage collector, which accelerate runs before each training."""
    gc.freeze()
    yield
    gc.unfreeze()
