"""Notices when a job has got no further for long, and says what the cluster may be waiting for. Knows no job."""

import time
from collections.abc import Callable

#: Silence that people should hear about.
FIRST_SECONDS = 120.0


class Silence:
    """A job's silence, counted from now on. `what` begins the complaint, `remedy` ends that of a lack.

    `describe_shortage` says what the cluster lacks, in words, "" where it lacks nothing.
    """

    def __init__(self, what: str, remedy: str, describe_shortage: Callable[[], str]) -> None:
        self._what, self._remedy, self._describe_shortage = what, remedy, describe_shortage
        self._progress: object = None
        self._end()

    def complaint(self, progress: object) -> str:
        """A sentence after FIRST_SECONDS of the same `progress`, and each time the silence has doubled; else ""."""
        if progress != self._progress:
            self._progress = progress
            self._end()
        seconds = time.monotonic() - self._since
        if seconds < self._next_seconds:
            return ""
        self._next_seconds *= 2
        shortage = self._describe_shortage()
        return f"{self._what} {seconds:,.0f} s" + (f": {shortage}; {self._remedy}" if shortage else "")

    def _end(self) -> None:
        self._since = time.monotonic()
        self._next_seconds = FIRST_SECONDS
