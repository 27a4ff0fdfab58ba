"""Labelled data to tokenised lists in storage: plan, prepare each slice, finish; and reading the lists again.

Exactly once in the sense of the mining job: a slice's files are named by the slice, their bytes depend on the slice
alone, and each is made by one create-only PUT; the slice's record is stored after them and makes it done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossenc.card import DatasetFacts
from crossenc.errors import CrossEncError
from crossenc.records import TokenizedPairs
from crossenc.training.lists import LabelStatistics, TokenizedLists
from pipelines.storage import Location
from pipelines.train_data_config import LabelledData


class PairTokenizer(Protocol):
    """Turns pairs of texts into token ids, at most `max_length` a pair."""

    @property
    def max_length(self) -> int: ...

    def encode(self, queries: list[str], documents: list[str]) -> TokenizedPairs: ...


class TokenizerSource(Protocol):
    """What preparing needs of a model: a pipelines.model.CheckpointModel is one. Can be sent to other processes."""

    @property
    def name(self) -> str: ...

    def digests(self) -> Mapping[str, str]: ...

    def load_tokenizer(self) -> PairTokenizer: ...


@dataclass(frozen=True, slots=True)
class PreparedPart:
    """A stored file of lists. `path` is relative to the folder; `file` is the input file that its rows come from."""

    part_id: str
    path: str
    file: str
    num_lists: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenised lists in storage. List i is the i-th in the order of the parts, and of the rows in each.

    `num_rows` rows of the input are in them; `num_refused` rows and documents are not, by reason: those of the whole
    input, whichever side of a split they might have been on.
    """

    folder: Location
    num_rows: int
    num_lists: int
    num_pairs: int
    num_tokens: int
    num_refused: Mapping[str, int]
    parts: tuple[PreparedPart, ...]
    statistics: LabelStatistics
    facts: DatasetFacts
    digest: str

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs and tokens of each list, int64 [N] both; of the parts only these columns are read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """How to prepare.

    `group_default` is what `LabelledData.group` is where that is None. `validation_share` of the queries, chosen by a
    hash of their text, are held out by `prepare_split`. `slice_pairs` is about how many pairs one task prepares, and
    one part holds. `workers` limits the tasks at work at once; by default the cluster's CPUs do.
    """

    group_default: bool = False
    max_text_bytes: int = 4 * 2**20
    slice_pairs: int | None = None
    workers: int | None = None
    cpus_per_task: float = 1
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far preparing is. Rows include refused ones."""

    num_parts: int
    num_parts_done: int
    num_rows: int
    num_pairs: int


class StoppedError(CrossEncError):
    """Preparing was told to stop; calling it again goes on where it was."""


def prepare(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    *,
    settings: PrepareSettings,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> PreparedData:
    """The lists of `data`, tokenised and stored in `folder`; at once where they are there already."""
    raise NotImplementedError


def prepare_split(
    data: LabelledData,
    folder: Location,
    source: TokenizerSource,
    validation_share: float,
    *,
    settings: PrepareSettings,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> tuple[PreparedData, PreparedData]:
    """As `prepare`, with a share of the queries held out: what to train on, and what to validate on."""
    raise NotImplementedError


def read_lists(prepared: PreparedData, indices: NDArray[np.int64]) -> TokenizedLists:
    """The lists with these numbers, in that order. Parts read lately are kept in memory."""
    raise NotImplementedError
