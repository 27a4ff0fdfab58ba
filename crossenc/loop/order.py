"""Which lists make which batch: a function of the settings, the seed and the epoch, and of nothing else.

A run that was killed finds its place by counting steps, and a batch is the same for any number of workers: it is cut
first and shared out afterwards. Pure numpy; knows lengths, no texts and no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import ConfigError

#: The share of what a worker keeps that is shuffled together; the rest is for parts that come and parts that go.
_SHUFFLED_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """How lists are shuffled and cut into batches; one of the two sizes is given.

    `batch_lists` and `batch_tokens` are of a step of all workers together. `shuffled_lists` are shuffled together at
    most, or whole parts where those are more; by default as many as a worker keeps. Raises ConfigError for sizes that
    cannot be.
    """

    batch_lists: int | None = None
    batch_tokens: int | None = None
    seed: int = 42
    shuffled_lists: int | None = None

    def __post_init__(self) -> None:
        if (self.batch_lists is None) == (self.batch_tokens is None):
            raise ConfigError("give the size of a batch either in lists or in tokens")
        for name in ("batch_lists", "batch_tokens", "shuffled_lists"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: set 1 or more")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that lists are stored in, which a worker reads and keeps whole.

    `num_lists` int64 [P] are those of each part, in the order of the data. `loads` float64 [P], above 0, say what share
    of all that a worker can keep each one takes.
    """

    num_lists: NDArray[np.int64]
    loads: NDArray[np.float64]


def epoch_order(parts: Parts, settings: OrderSettings, epoch: int) -> NDArray[np.int64]:
    """All lists in the order of an epoch, int64 [N]: a permutation.

    Data that a worker can keep is shuffled as a whole. Of other data the parts are shuffled, and then each list moves
    to a place drawn from a window around its part: any place of the epoch draws on as many parts as a worker keeps,
    and each part is needed in one stretch.
    """
    random = np.random.default_rng((settings.seed, epoch))
    num_lists = int(parts.num_lists.sum())
    window = _window(parts, settings)
    if window >= 1:
        return random.permutation(num_lists).astype(np.int64)
    shuffled = random.permutation(len(parts.loads))
    ends = np.cumsum(parts.loads[shuffled])
    centres = np.empty(len(shuffled))
    centres[shuffled] = (ends - parts.loads[shuffled] / 2) / ends[-1]
    places = np.repeat(centres, parts.num_lists) + window * (random.random(num_lists) - 0.5)
    places = np.abs(places)  # what would move out of the epoch is folded back into it
    places = np.minimum(places, 2 - places)
    return np.argsort(places, kind="stable").astype(np.int64)


def _window(parts: Parts, settings: OrderSettings) -> float:
    """The share of the data that is shuffled together, 1 or more for all of it."""
    total = float(parts.loads.sum())
    kept = 1.0 if total <= 1 else _SHUFFLED_SHARE / total
    wanted = 1.0 if settings.shuffled_lists is None else settings.shuffled_lists / max(1, int(parts.num_lists.sum()))
    return min(kept, wanted)


def batch_ends(num_tokens: NDArray[np.int64], settings: OrderSettings) -> NDArray[np.int64]:
    """Where each batch of an epoch ends, given the tokens [N] of its lists in order; the last one is N.

    A list is never cut: one with more tokens than a batch has is a batch of its own.
    """
    if settings.batch_lists is not None:
        ends = np.arange(settings.batch_lists, len(num_tokens) + settings.batch_lists, settings.batch_lists)
        return np.minimum(ends, len(num_tokens)).astype(np.int64)
    assert settings.batch_tokens is not None  # one of the two is given
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_tokens)])
    found: list[int] = []
    start = 0
    while start < len(num_tokens):
        end = int(np.searchsorted(before, before[start] + settings.batch_tokens, side="right")) - 1
        start = max(end, start + 1)
        found.append(start)
    return np.array(found, dtype=np.int64)


class Order:
    """The batches of a whole run, by the number of their step from 0.

    `num_tokens` are those of each list, int64 [N], N at least 1. Without `parts` all lists are in memory.
    """

    def __init__(
        self, num_tokens: NDArray[np.int64], settings: OrderSettings, num_epochs: int, parts: Parts | None = None
    ) -> None:
        self._num_tokens, self._settings = num_tokens, settings
        self._parts = parts or Parts(np.array([len(num_tokens)], np.int64), np.ones(1))
        self._epoch = -1
        self._order = self._ends = np.empty(0, np.int64)
        #: Steps before each epoch, int64 [num_epochs + 1].
        self.steps_before = np.zeros(num_epochs + 1, np.int64)
        for epoch in range(num_epochs):
            # Cut by number, every epoch has as many batches.
            is_known = epoch > 0 and settings.batch_lists is not None
            num_steps = self.steps_before[1] if is_known else len(self._enter(epoch))
            self.steps_before[epoch + 1] = self.steps_before[epoch] + num_steps

    def _enter(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._order = epoch_order(self._parts, self._settings, epoch)
            self._ends = batch_ends(self._num_tokens[self._order], self._settings)
            self._epoch = epoch
        return self._ends

    @property
    def num_steps(self) -> int:
        return int(self.steps_before[-1])

    def epoch_of(self, step: int) -> int:
        """The epoch that a step is in; a step belongs to one epoch alone."""
        return int(np.searchsorted(self.steps_before, step, side="right")) - 1

    def epochs_after(self, step: int) -> float:
        """How many epochs are done after `step` steps, as a number with a fraction."""
        if step >= self.num_steps:
            return float(len(self.steps_before) - 1)
        epoch = self.epoch_of(step)
        first, end = self.steps_before[epoch : epoch + 2]
        return epoch + float((step - first) / (end - first))

    def batch(self, step: int) -> NDArray[np.int64]:
        """The lists of a step, by their numbers."""
        epoch = self.epoch_of(step)
        ends = self._enter(epoch)
        place = step - int(self.steps_before[epoch])
        return self._order[0 if place == 0 else ends[place - 1] : ends[place]]


def share(batch: NDArray[np.int64], num_tokens: NDArray[np.int64], num_workers: int) -> list[NDArray[np.int64]]:
    """A batch shared out among workers so that each has about as many tokens; some get nothing of a small batch.

    `num_tokens` [N] are those of all lists. The longest list goes first, always to the worker with least so far.
    """
    longest_first = batch[np.argsort(-num_tokens[batch], kind="stable")]
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for item in longest_first.tolist():
        worker = min(range(num_workers), key=loads.__getitem__)
        shares[worker].append(item)
        loads[worker] += max(1, int(num_tokens[item]))
    return [np.array(part, dtype=np.int64) for part in shares]


def micro_batches(
    sizes: NDArray[np.int64], lengths: NDArray[np.int64], max_tokens: int, *, is_packed: bool
) -> list[NDArray[np.int64]]:
    """Cut Q lists into forward passes of at most `max_tokens` tokens, those of like length together.

    `sizes` [Q] are the pairs of each list, `lengths` [P] their tokens. Unless passes are packed, a pair counts as the
    longest in its pass. A list that does not fit is a pass of its own. Returns places in `sizes`.
    """
    num_tokens, longest = list_lengths(sizes, lengths)
    passes: list[list[int]] = []
    width = num_pairs = held = 0
    for place in np.argsort(-longest, kind="stable").tolist():
        held += int(num_tokens[place])
        num_pairs += int(sizes[place])
        if not passes or (held if is_packed else num_pairs * width) > max_tokens:
            passes.append([])
            held, num_pairs, width = int(num_tokens[place]), int(sizes[place]), int(longest[place])
        passes[-1].append(place)
    return [np.array(part, dtype=np.int64) for part in passes]


def list_lengths(sizes: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens in all and of the longest pair of each list, int64 [Q] each, from the tokens [P] of their pairs."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])[:-1]
    if not len(sizes):
        return starts, starts
    return np.add.reduceat(lengths, starts), np.maximum.reduceat(lengths, starts)
