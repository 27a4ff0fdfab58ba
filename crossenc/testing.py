"""Stand-ins for tests, ours and yours: tiny checkpoints, a tokenizer and a scorer without a model.

Everything is a function of its arguments, so two machines make the same checkpoint and the same scores.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from crossenc.batching import padded_tokens
from crossenc.errors import ConfigError
from crossenc.records import TokenizedPairs
from crossenc.tokenizer import PairTemplate, Ragged, check_texts, distinct_texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

Family = Literal["bert", "xlm-roberta", "electra", "modernbert"]

#: Words that the tokenizer of a tiny checkpoint knows whole; others are cut into characters.
WORDS = (
    *("the", "of", "and", "to", "in", "is", "what", "how", "which", "water", "river", "city", "train"),
    *("bread", "stone", "music", "winter", "paper", "bridge", "school", "doctor", "fever", "heart", "blood"),
)
#: Printable ASCII and lower-case Russian.
_CHARACTERS = tuple(map(chr, [*range(0x21, 0x7F), *range(0x430, 0x450)]))


def tiny_checkpoint(
    folder: str | Path,
    family: Family = "bert",
    *,
    num_labels: int = 1,
    seed: int = 0,
    hidden_size: int = 32,
    num_layers: int = 2,
    max_length: int = 128,
    vocabulary: Sequence[str] = WORDS,
) -> Path:
    """Write a small random cross-encoder with a real fast tokenizer to `folder`, and return it.

    Weights depend on `seed` alone and are large enough that scores differ from pair to pair. `max_length`
    is in tokens. Raises ConfigError for an unknown family.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from crossenc.quiet import quiet_transformers

    makers = {
        "bert": _wordpiece_tokenizer,
        "electra": _wordpiece_tokenizer,
        "xlm-roberta": _unigram_tokenizer,
        "modernbert": _byte_pair_tokenizer,
    }
    if family not in makers:
        raise ConfigError(f"there is no tiny checkpoint of family {family!r}: choose from {', '.join(makers)}")
    tokenizer = makers[family](vocabulary, max_length)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_layers}
    config = _tiny_config(family, tokenizer, num_labels, sizes, max_length)
    with quiet_transformers():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return Path(folder)


class FakeTokenizer:
    """Tokenises like PairTokenizer, without a vocabulary: an id is a hash of a whitespace-separated word.

    Pairs read `<1> query <2> document <2>`; there are no token types. A few microseconds a pair.
    """

    def __init__(self, max_length: int = 512, vocabulary_size: int = 30_000) -> None:
        self.max_length = max_length
        self.pad_token_id = 0
        self.padding_side = "right"
        self._vocabulary_size = vocabulary_size
        start, end = np.array([1], np.int32), np.array([2], np.int32)
        self._template = PairTemplate((start, end, end), part_types=None)

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> TokenizedPairs:
        """Tokenise pair p = (queries[p], documents[p]); the same errors as PairTokenizer.encode."""
        if len(queries) != len(documents):
            raise ValueError(f"encode needs pairs, got {len(queries)} queries and {len(documents)} documents")
        check_texts(queries, "query")
        check_texts(documents, "document")
        return self._template.join(self._hash_words(queries), self._hash_words(documents), self.max_length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Words of each text."""
        counts: list[int] = self._hash_words(texts).lengths.tolist()
        return counts

    def _hash_words(self, texts: Sequence[str]) -> Ragged:
        distinct, rows = distinct_texts(texts)
        encoded = [text.encode() for text in distinct]
        text_bytes = np.frombuffer(b"".join(text + b"\n" for text in encoded), dtype=np.uint8)
        in_word = text_bytes > ord(" ")
        first_of_word = in_word.copy()
        first_of_word[1:] &= ~in_word[:-1]
        starts = np.flatnonzero(first_of_word)
        text_ends = np.cumsum([len(text) + 1 for text in encoded], dtype=np.int64)
        ends = np.searchsorted(starts, text_ends)  # words before the end of each text
        word_starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        ids = np.empty(0, dtype=np.int32)
        if len(starts):
            place = np.arange(len(text_bytes)) - starts[np.cumsum(first_of_word) - 1]
            hashes = np.add.reduceat(_mix(text_bytes, place) * in_word, starts)
            ids = (3 + _scramble(hashes) % np.uint64(self._vocabulary_size - 3)).astype(np.int32)
        return Ragged(ids, word_starts[rows], (ends - word_starts)[rows])


@dataclass(frozen=True, slots=True)
class FakeScorer:
    """A Scorer without a model: a pair's score in [0, 1) is a hash of its token ids and their order."""

    seconds_per_pair: float = 0.0
    max_batch_tokens: int = 4096
    is_packed: bool = False
    forward_kind: str = "padded: there is no model"

    def num_fed_tokens(self, lengths: NDArray[np.int64]) -> int:
        return padded_tokens(lengths, self.max_batch_tokens)

    def score(self, pairs: TokenizedPairs) -> NDArray[np.float32]:
        """Float32 [P]; sleeps `seconds_per_pair` for each pair."""
        time.sleep(self.seconds_per_pair * len(pairs))
        if len(pairs) == 0:
            return np.empty(0, dtype=np.float32)
        place = np.arange(pairs.num_tokens) - np.repeat(pairs.offsets[:-1], pairs.lengths)
        hashes = np.add.reduceat(_mix(pairs.input_ids, place), pairs.offsets[:-1])
        # 24 bits, because a float32 holds exactly as many.
        return (_scramble(hashes) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _mix(values: NDArray[np.integer], places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Numbers that depend on each value and its place, to be summed modulo 2**64."""
    return (values.astype(np.uint64) + np.uint64(1)) * _scramble(places.astype(np.uint64))


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread neighbouring numbers over all bits: an odd multiplier, then the high half onto the low."""
    spread = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return spread ^ (spread >> np.uint64(32))


def _tiny_config(
    family: Family, tokenizer: "PreTrainedTokenizerFast", num_labels: int, sizes: dict[str, int], max_length: int
) -> "PretrainedConfig":
    from transformers import AutoConfig

    num_positions = max_length
    settings: dict[str, object] = {}
    if family == "xlm-roberta":
        num_positions += int(tokenizer.pad_token_id) + 1  # its position table starts after the padding id
    if family == "electra":
        settings["embedding_size"] = sizes["hidden_size"]
    if family == "modernbert":
        settings |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        settings |= {"local_attention": 16, "classifier_pooling": "mean"}
    return AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        intermediate_size=2 * sizes["hidden_size"],
        num_attention_heads=4,
        max_position_embeddings=num_positions,
        initializer_range=0.3,
        num_labels=num_labels,
        **sizes,
        **settings,
    )


def _wordpiece_tokenizer(vocabulary: Sequence[str], max_length: int) -> "PreTrainedTokenizerFast":
    from transformers import BertTokenizer

    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    inner_characters = (f"##{character}" for character in _CHARACTERS)
    pieces = dict.fromkeys([*specials, *_CHARACTERS, *inner_characters, *vocabulary])
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=max_length)


def _unigram_tokenizer(vocabulary: Sequence[str], max_length: int) -> "PreTrainedTokenizerFast":
    from transformers import XLMRobertaTokenizer

    specials = ("<s>", "<pad>", "</s>", "<unk>")
    words = (f"▁{word}" for word in vocabulary)  # sentencepiece's mark of a preceding space
    pieces = dict.fromkeys([*specials, "▁", *_CHARACTERS, *words, "<mask>"])
    # A log probability per character makes one whole word likelier than its characters.
    scored = [(piece, 0.0 if piece in specials else -10.0) for piece in pieces]
    return XLMRobertaTokenizer(vocab=scored, model_max_length=max_length)


def _byte_pair_tokenizer(vocabulary: Sequence[str], max_length: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    words = [f"Ġ{word}" for word in vocabulary if word.isascii()]  # byte-level BPE's mark of a space
    # A word is built up from the left, one character a merge.
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    pieces = [
        *specials,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(left + right for left, right in merges),
    ]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=numbers, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
