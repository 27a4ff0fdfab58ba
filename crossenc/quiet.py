"""Transformers without its warnings and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the terminal inside the block."""
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if had_progress_bar:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()
