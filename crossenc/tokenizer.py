"""Texts to token ids: pairs exactly as the checkpoint's own tokenizer would encode them, unpadded.

Each distinct query and document is tokenised once per call and pairs are assembled from the ids: a query that
goes with a hundred documents costs one tokenisation, not a hundred. Where a tokenizer's pairs are more than their
texts and fixed special tokens around them, it encodes each pair itself. Knows no model, device or batch.

Shape letters: P pairs, T tokens.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.records import TokenizedPairs

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from crossenc.chat import ChatTokenizer
    from crossenc.layout import Layout

logger = logging.getLogger(__name__)
#: Families whose position table starts at padding_idx + 1, so that many of its rows never hold a token.
_OFFSET_POSITION_FAMILIES = {
    "camembert",
    "data2vec-text",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
#: What a pair that is too long loses tokens of; the first is what applies where nothing is said.
TRUNCATIONS = ("longest_first", "only_first", "only_second")
#: Pairs by which a tokenizer shows whether its pairs can be assembled: of one token, of several, of odd characters.
_PROBES = (
    ("a", "a"),
    ("what is it", "It is 1 of 3, e.g. this."),
    (" naïve?\n", "\u201cTwo\u201d  lines\n\nof it\u2026 "),
)
#: Held from setting truncation and padding of a Rust tokenizer, which threads share and transformers sets too, to the
#: end of the call that needs them so.
_SETTINGS_LOCK = threading.Lock()
#: Texts per call into the Rust tokenizer, whose results take about 100 bytes a token until copied out.
_TEXTS_PER_CALL = 512


def check_texts(texts: Sequence[str], what: str) -> None:
    """Raise InputError naming the first position whose text is not a str that UTF-8 can hold."""
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what} {position} is a {type(text).__name__}, not text: make it a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what} {position} has a lone surrogate at character {error.start}, which is not text: "
                "decode the source as UTF-8 with errors='replace'"
            ) from error


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts in order of appearance, and for each of `texts` its position among them, int64."""
    positions: dict[str, int] = {}
    rows = np.fromiter((positions.setdefault(text, len(positions)) for text in texts), np.int64, len(texts))
    return list(positions), rows


def position_limit(config: "PretrainedConfig") -> int | None:
    """Longest input that the positions allow, in tokens with the special ones; None when unbounded."""
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is None or num_positions <= 0:
        return None
    if config.model_type in _OFFSET_POSITION_FAMILIES:
        return int(num_positions) - (int(config.pad_token_id) + 1)
    return int(num_positions)


class Tokenizer(Protocol):
    """What turns pairs of texts into token ids, for one checkpoint."""

    @property
    def max_length(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    @property
    def padding_side(self) -> str: ...

    def encode(self, queries: Sequence[str], documents: Sequence[str], prompt: str | None = None) -> TokenizedPairs: ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


class PairTokenizer:
    """A checkpoint's fast tokenizer, for (query, document) pairs of at most `max_length` tokens.

    `truncation` says what a pair longer than `max_length` loses: tokens of the longer text ("longest_first"), or of
    one of the two alone ("only_first" is the query, "only_second" the document), as long as one is left of it.
    """

    max_length: int
    pad_token_id: int
    padding_side: str

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int,
        prompt: str = "",
        truncation: str = "longest_first",
    ) -> None:
        """Wrap `tokenizer`; `prompt` stands before every query where a call gives no other.

        Raises ConfigError when `max_length` leaves no room for a token of the texts or `truncation` is unknown,
        CheckpointError when the tokenizer cannot encode or pad pairs.
        """
        if truncation not in TRUNCATIONS:
            raise ConfigError(f"truncation is {truncation!r}: choose from {', '.join(TRUNCATIONS)}")
        self.truncation = truncation
        if tokenizer.pad_token_id is None:
            raise CheckpointError("the tokenizer cannot pad: set pad_token in tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompt = prompt
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.padding_side = str(tokenizer.padding_side)
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._template = self._checked_template()
        num_special = tokenizer.num_special_tokens_to_add(pair=True)
        if max_length <= num_special:
            raise ConfigError(
                f"max_length is {max_length}, but a pair has {num_special} special tokens: "
                f"set max_length to {num_special + 1} or more"
            )

    def encode(self, queries: Sequence[str], documents: Sequence[str], prompt: str | None = None) -> TokenizedPairs:
        """Tokenise pair p = (queries[p], documents[p]), with special tokens and truncation, without padding.

        `prompt` replaces the tokenizer's own.

        Raises InputError for a text that is not a str or holds a lone surrogate, ValueError when the
        arguments differ in length.
        """
        if len(queries) != len(documents):
            raise ValueError(f"encode needs pairs, got {len(queries)} queries and {len(documents)} documents")
        check_texts(queries, "query")
        check_texts(documents, "document")
        prompt = self.prompt if prompt is None else prompt
        if prompt:
            queries = [prompt + query for query in queries]
        if self._template is None:
            return self._encode_whole(queries, documents)
        return self._template.join(
            self._tokenise(queries),
            self._tokenise(documents),
            self.max_length,
            keep_ends=self.tokenizer.truncation_side == "left",
            truncation=self.truncation,
        )

    def _checked_template(self) -> "PairTemplate | None":
        """What pairs are assembled by; None, with a warning, where that is not what the tokenizer itself makes."""
        template, is_equal = _pair_template(self.tokenizer), True
        num_special = self.tokenizer.num_special_tokens_to_add(pair=True)
        for query, document in _PROBES:
            queries, documents = self._tokenise([query]), self._tokenise([document])
            whole = self.tokenizer.backend_tokenizer.encode(query, document)
            if len(whole.ids) > len(queries.flat) + len(documents.flat) + num_special:
                raise CheckpointError("the tokenizer puts a text into a pair twice, for which no length can be kept")
            if template is not None:
                pair = template.join(queries, documents, len(whole.ids))
                types = whole.type_ids if pair.token_type_ids is None else pair.token_type_ids.tolist()
                is_equal &= (pair.input_ids.tolist(), types) == (whole.ids, whole.type_ids)
        if template is not None and is_equal:
            return template
        logger.warning("this tokenizer's pairs cannot be assembled from their texts: it encodes each one by itself")
        return None

    def _encode_whole(self, queries: Sequence[str], documents: Sequence[str]) -> TokenizedPairs:
        """Each pair by the tokenizer itself."""
        with _SETTINGS_LOCK:
            self.tokenizer.backend_tokenizer.no_padding()
            encodings = [self._encode_one(query, document) for query, document in zip(queries, documents, strict=True)]
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        types = [np.array(encoding.type_ids, np.uint8) for encoding in encodings]
        return TokenizedPairs(
            np.concatenate([np.empty(0, np.int32), *ids]),
            np.cumsum([0, *map(len, ids)], dtype=np.int64),
            np.concatenate([np.empty(0, np.uint8), *types]) if self._has_types else None,
            np.array([bool(encoding.overflowing) for encoding in encodings], dtype=bool),
        )

    def _encode_one(self, query: str, document: str) -> "Encoding":
        backend, side = self.tokenizer.backend_tokenizer, self.tokenizer.truncation_side
        encoding: Encoding
        backend.enable_truncation(self.max_length, strategy=self.truncation, direction=side)
        try:
            encoding = backend.encode(query, document)
        except Exception as error:  # of no class of its own: nothing would be left of the text that is to be cut
            if "Truncation error" not in str(error):
                raise
            backend.enable_truncation(self.max_length, strategy=TRUNCATIONS[0], direction=side)
            encoding = backend.encode(query, document)
        return encoding

    def encode_text(self, text: str, prompt: str | None = None) -> TokenizedPairs:
        """Tokenise one text without a document, as the tokenizer has it; otherwise as `encode`."""
        check_texts([text], "text")
        backend = self.tokenizer.backend_tokenizer
        with _SETTINGS_LOCK:
            backend.no_padding()
            backend.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
            encoding = backend.encode((self.prompt if prompt is None else prompt) + text)
        types = np.array(encoding.type_ids, np.uint8) if self._has_types else None
        offsets = np.array([0, len(encoding.ids)], np.int64)
        return TokenizedPairs(np.array(encoding.ids, np.int32), offsets, types, np.array([bool(encoding.overflowing)]))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, uncut and without special ones."""
        counts: list[int] = self._tokenise(texts).lengths.tolist()
        return counts

    def _tokenise(self, texts: Sequence[str]) -> "Ragged":
        """Token ids of each text without special tokens; equal texts share theirs."""
        distinct, rows = distinct_texts(texts)
        ids = token_ids(self.tokenizer, distinct)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.concatenate([np.empty(0, np.int32), *ids])
        return Ragged(flat, (np.cumsum(lengths) - lengths)[rows], lengths[rows])


def token_ids(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Token ids of each text, uncut and without special tokens."""
    backend = tokenizer.backend_tokenizer
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = texts[start : start + _TEXTS_PER_CALL]
        with _SETTINGS_LOCK:
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch_fast(chunk, add_special_tokens=False)
        ids.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
    return ids


def load_tokenizer(folder: str | Path, max_length: int | None = None) -> "PairTokenizer | ChatTokenizer":
    """Load the tokenizer of a local checkpoint folder.

    `max_length` defaults to the smaller of what the tokenizer states and what the positions allow. An explicit one
    may exceed what the tokenizer states, never what the positions allow. The checkpoint's default prompt is used.
    Raises ConfigError for a `max_length` out of range, CheckpointError if the tokenizer does not load.
    """
    # Imported here because transformers takes seconds to import, which users of a fake need not wait for.
    from crossenc.chat import ChatTokenizer
    from crossenc.layout import load_config, read_layout

    config = load_config(folder)
    layout = read_layout(folder, config)
    prompt = layout.prompts[layout.default_prompt_name] if layout.default_prompt_name else ""
    tokenizer = wrap_tokenizer(load_fast_tokenizer(folder), config, layout, max_length, prompt)
    if isinstance(tokenizer, ChatTokenizer):
        tokenizer.check_template()
    return tokenizer


def load_fast_tokenizer(folder: str | Path, settings: Mapping[str, Any] | None = None) -> "PreTrainedTokenizerFast":
    """Transformers' tokenizer of a local folder; `settings` go to transformers. Raises CheckpointError."""
    from transformers import AutoTokenizer

    from crossenc.quiet import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), **{"trust_remote_code": False, "local_files_only": True, **(settings or {})}
            )
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {folder} does not load: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of {folder} has no fast (Rust) form: convert it with transformers and save "
            "its tokenizer.json beside the model"
        )
    return tokenizer


def wrap_tokenizer(
    tokenizer: "PreTrainedTokenizerFast",
    config: "PretrainedConfig",
    layout: "Layout",
    max_length: int | None = None,
    prompt: str = "",
    text_settings: Mapping[str, Any] | None = None,
) -> "PairTokenizer | ChatTokenizer":
    """The tokenizer of pairs that goes with a transformers tokenizer and model; arguments as in `load_tokenizer`.

    `text_settings` override the checkpoint's own: `max_length` and `truncation`, one of TRUNCATIONS or True for the
    first. Raises ConfigError for another one.
    """
    from crossenc.chat import ChatTokenizer

    settings = {**layout.text_settings, **(text_settings or {})}
    unknown = check_text_settings(settings)
    if unknown:
        raise ConfigError(f"the setting {unknown[0]} is not supported: set max_length or truncation alone")
    truncation = settings.get("truncation", True)
    if max_length is None:
        max_length = settings.get("max_length")
    limit = _resolve_max_length(config, tokenizer, max_length)
    if layout.is_causal:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template and layout.may_chat:
        return ChatTokenizer(tokenizer, limit, prompt, layout.template_settings)
    return PairTokenizer(tokenizer, limit, prompt, TRUNCATIONS[0] if truncation is True else truncation)


def check_text_settings(settings: Mapping[str, Any]) -> list[str]:
    """Those settings of a tokenizer's call that are not supported, as text; padding to the longest changes nothing."""
    supported = {"max_length": None, "truncation": (True, *TRUNCATIONS), "padding": (True, "longest")}
    return [
        f"{name}={value!r}"
        for name, value in settings.items()
        if name not in supported or ((choices := supported[name]) is not None and value not in choices)
    ]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of token ids: row p is `flat[starts[p]:starts[p] + lengths[p]]`; rows may share tokens."""

    flat: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def cut(self, lengths: NDArray[np.int64], keep_ends: bool) -> "Ragged":
        """Shorten each row to `lengths`, keeping its last tokens instead of its first ones if `keep_ends`."""
        starts = self.starts + (self.lengths - lengths) if keep_ends else self.starts
        return Ragged(self.flat, starts, lengths)


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The special tokens around a query and a document, and the token type of every part.

    The five parts are: before the query, the query, between, the document, after. `special_ids` holds the ids
    of the parts 0, 2 and 4; `part_types` the token types of all five, one value for a text, or None where the
    model has none.
    """

    special_ids: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
    part_types: tuple[NDArray[np.uint8], ...] | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.special_ids))

    def join(
        self,
        queries: Ragged,
        documents: Ragged,
        max_length: int,
        keep_ends: bool = False,
        truncation: str = TRUNCATIONS[0],
    ) -> TokenizedPairs:
        """Make pair p of query p and document p, cut to `max_length` tokens, special ones included.

        A text that is cut keeps its first tokens, or its last ones if `keep_ends`.
        """
        query_kept, document_kept = _kept(truncation, queries.lengths, documents.lengths, max_length - self.num_tokens)
        truncated = query_kept + document_kept < queries.lengths + documents.lengths
        queries, documents = queries.cut(query_kept, keep_ends), documents.cut(document_kept, keep_ends)
        before, between, after = self.special_ids
        parts = (before, queries.flat, between, documents.flat, after)
        take, offsets = _layout(parts, queries, documents)
        token_types = None
        if self.part_types is not None:
            types = [np.broadcast_to(kinds, len(part)) for kinds, part in zip(self.part_types, parts, strict=True)]
            token_types = np.concatenate(types)[take]
        return TokenizedPairs(np.concatenate(parts)[take], offsets, token_types, truncated)


def _layout(
    parts: Sequence[NDArray[np.int32]], queries: Ragged, documents: Ragged
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token of the pairs is in the concatenated parts, int64 [T], and the pairs' offsets."""
    num_pairs = len(queries.lengths)
    lengths = np.tile([len(part) for part in parts], (num_pairs, 1))
    lengths[:, 1], lengths[:, 3] = queries.lengths, documents.lengths
    starts = np.tile(np.cumsum([0, *map(len, parts)])[:-1], (num_pairs, 1))
    starts[:, 1] += queries.starts
    starts[:, 3] += documents.starts
    lengths, starts = lengths.ravel(), starts.ravel()
    ends = np.cumsum(lengths)
    # A token's source is where its part starts there, plus the token's place in that part.
    take = np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())
    return take, np.concatenate([np.zeros(1, np.int64), ends[4::5]])


def _pair_template(tokenizer: "PreTrainedTokenizerFast") -> PairTemplate | None:
    """Read the special tokens of a pair off an encoded example; None where the document comes first."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    example = backend.encode("a", "a", add_special_tokens=True)
    ids = np.array(example.ids, dtype=np.int32)
    sequence = example.sequence_ids
    if not {0, 1} <= set(sequence):
        raise CheckpointError("the tokenizer makes no tokens of the letter a: its vocabulary is damaged")
    first, second = sequence.index(0), sequence.index(1)
    end_of_first = first + sequence.count(0)
    end_of_second = second + sequence.count(1)
    if first > second:
        return None
    part_types = None
    if "token_type_ids" in tokenizer.model_input_names:
        types = np.array(example.type_ids, dtype=np.uint8)
        part_types = (
            types[:first],
            types[first : first + 1],
            types[end_of_first:second],
            types[second : second + 1],
            types[end_of_second:],
        )
    return PairTemplate((ids[:first], ids[end_of_first:second], ids[end_of_second:]), part_types)


def _longest_first(
    query_lengths: NDArray[np.int64], document_lengths: NDArray[np.int64], room: int
) -> NDArray[np.int64]:
    """Tokens that each query and document keep, int64 [2, P], when a pair may hold `room` text tokens.

    The longer text gives way until both are as long as each other; after that each gets half of the room, the
    odd token going to the longer one (to the document when they are equally long).
    """
    lengths = np.stack([query_lengths, document_lengths])
    shorter = np.minimum(lengths.min(axis=0), room // 2)
    longer_is_query = query_lengths > document_lengths
    cut = np.stack(
        [
            np.where(longer_is_query, room - shorter, shorter),
            np.where(longer_is_query, shorter, room - shorter),
        ]
    )
    return np.where(lengths.sum(axis=0) <= room, lengths, cut)


def _kept(
    truncation: str, query_lengths: NDArray[np.int64], document_lengths: NDArray[np.int64], room: int
) -> NDArray[np.int64]:
    """Tokens that each query and document keep, int64 [2, P], when a pair may hold `room` text tokens.

    A text that is to stay whole and leaves the other no token is cut after all, as in "longest_first".
    """
    lengths = np.stack([query_lengths, document_lengths])
    balanced = _longest_first(query_lengths, document_lengths, room)
    if truncation == "longest_first":
        return balanced
    cut, whole = (0, 1) if truncation == "only_first" else (1, 0)
    one_sided = lengths.copy()
    one_sided[cut] = np.minimum(lengths[cut], room - lengths[whole])
    return np.where((one_sided[cut] > 0) | (lengths.sum(axis=0) <= room), one_sided, balanced)


def _resolve_max_length(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerFast", max_length: int | None
) -> int:
    positions = position_limit(config)
    # transformers writes "no limit" as a number around 1e30.
    stated = tokenizer.model_max_length if tokenizer.model_max_length < 2**31 else None
    limits = [limit for limit in (stated, positions) if limit is not None]
    if max_length is None:
        if not limits:
            raise ConfigError("neither the tokenizer nor the model states a longest input: set max_length")
        return min(limits)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length is {max_length}, but the model has positions for {positions} tokens: "
            f"set max_length to at most {positions}"
        )
    if max_length <= 0:
        raise ConfigError(f"max_length is {max_length}: set a positive number of tokens")
    return max_length
