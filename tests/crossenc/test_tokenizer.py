import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast, RobertaConfig

from crossenc.errors import CheckpointError, ConfigError, InputError
from crossenc.testing import FakeTokenizer, Family, tiny_checkpoint
from crossenc.tokenizer import TRUNCATIONS, PairTokenizer, load_tokenizer, position_limit

FAMILIES: tuple[Family, ...] = ("bert", "xlm-roberta", "electra", "modernbert")
NUM_SPECIAL = {"bert": 3, "electra": 3, "modernbert": 3, "xlm-roberta": 4}

words = st.sampled_from(
    ["the", "water", "Zürich", "строка", "漢字", "🙂", "[SEP]", "</s>", "<s>", "\0", "\n", "", "a" * 130]
)
texts = st.lists(words, max_size=20).map(" ".join) | st.text(max_size=30)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(folder / family, family, max_length=48) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(checkpoints: dict[str, Path]) -> dict[str, PairTokenizer]:
    return {family: load_tokenizer(folder) for family, folder in checkpoints.items()}


def assert_equal_to_transformers(
    tokenizer: PairTokenizer,
    queries: list[str],
    documents: list[str],
    max_length: int,
    truncation: str = "longest_first",
) -> None:
    expected = tokenizer.tokenizer(queries, documents, truncation=truncation, max_length=max_length)
    whole = tokenizer.tokenizer(queries, documents, truncation=False, verbose=False)
    pairs = PairTokenizer(tokenizer.tokenizer, max_length, truncation=truncation).encode(queries, documents)
    assert pairs.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    assert pairs.input_ids.tolist() == [i for ids in expected["input_ids"] for i in ids]
    assert pairs.input_ids.dtype == np.int32
    assert (pairs.token_type_ids is not None) == ("token_type_ids" in expected)
    if pairs.token_type_ids is not None:
        assert pairs.token_type_ids.tolist() == [i for types in expected["token_type_ids"] for i in types]
        assert pairs.token_type_ids.dtype == np.uint8
    assert pairs.truncated.tolist() == [len(ids) > max_length for ids in whole["input_ids"]]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=6), max_length=st.integers(6, 60))
def test_pairs_are_encoded_as_transformers_encodes_them(
    family: str, pairs: list[tuple[str, str]], max_length: int, tokenizers: dict[str, PairTokenizer]
) -> None:
    queries, documents = (list(side) for side in zip(*pairs, strict=True))
    assert_equal_to_transformers(tokenizers[family], queries, documents, max_length)


@pytest.mark.parametrize("num_query_words", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("num_document_words", [0, 7, 8, 9, 40])
@pytest.mark.parametrize("max_length", [4, 5, 19, 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_equals_transformers_at_every_balance_of_lengths(
    num_query_words: int, num_document_words: int, max_length: int, side: str, checkpoints: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(checkpoints["bert"])
    tokenizer.tokenizer.truncation_side = side
    query, document = ("the water " * 20).split(), ("heart blood " * 20).split()
    queries, documents = [" ".join(query[:num_query_words])], [" ".join(document[:num_document_words])]
    assert_equal_to_transformers(tokenizer, queries, documents, max_length)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("truncation", ["only_first", "only_second"])
@settings(max_examples=40, deadline=None)
@given(pair=st.tuples(texts, texts), max_length=st.integers(6, 60))
def test_cutting_one_text_alone_equals_transformers_while_something_is_left_of_it(
    family: str, truncation: str, pair: tuple[str, str], max_length: int, tokenizers: dict[str, PairTokenizer]
) -> None:
    tokenizer = tokenizers[family]
    try:
        assert_equal_to_transformers(tokenizer, [pair[0]], [pair[1]], max_length, truncation)
    except Exception as error:
        if "Truncation error" not in str(error):  # transformers gives up where the other text fills the length
            raise
        pairs = PairTokenizer(tokenizer.tokenizer, max_length, truncation=truncation).encode([pair[0]], [pair[1]])
        balanced = PairTokenizer(tokenizer.tokenizer, max_length).encode([pair[0]], [pair[1]])
        assert pairs.input_ids.tolist() == balanced.input_ids.tolist()


def with_pairs(checkpoint: Path, template: str) -> PreTrainedTokenizerFast:
    inner = load_tokenizer(checkpoint).tokenizer
    special = [(token, inner.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    inner.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", template, special)
    return inner


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_puts_the_document_first_encodes_pairs_itself_and_says_so(
    truncation: str, side: str, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    inner = with_pairs(checkpoints["bert"], "[CLS] $B:0 [SEP] $A:1 [SEP]")
    inner.truncation_side = side
    with caplog.at_level("WARNING"):
        tokenizer = PairTokenizer(inner, 60, truncation=truncation)
    assert "it encodes each one by itself" in caplog.text
    queries, documents = ["the water", "water " * 50, "the"], ["of the river", "the bank", "heart blood " * 20]
    for query, document in zip(queries, documents, strict=True):
        is_cut = {"only_first": len(query), "only_second": len(document)}.get(truncation, 200) > 100
        kind = truncation if is_cut or len(query + document) < 100 else TRUNCATIONS[0]
        if kind == truncation:
            assert_equal_to_transformers(tokenizer, [query], [document], 60, truncation)
        else:  # nothing would be left of the text that is to be cut
            balanced = PairTokenizer(inner, 60).encode([query], [document])
            assert tokenizer.encode([query], [document]).input_ids.tolist() == balanced.input_ids.tolist()
    assert tokenizer.encode([], []).offsets.tolist() == [0]


def test_a_tokenizer_that_puts_a_text_into_a_pair_twice_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="twice"):
        PairTokenizer(with_pairs(checkpoints["bert"], "[CLS] $A:0 [SEP] $B:1 [SEP] $A:0"), 30)


def test_an_unknown_truncation_is_refused(tokenizers: dict[str, PairTokenizer]) -> None:
    with pytest.raises(ConfigError, match="'only_third': choose from longest_first"):
        PairTokenizer(tokenizers["bert"].tokenizer, 20, truncation="only_third")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_alone_is_encoded_as_transformers_encodes_it(family: str, tokenizers: dict[str, PairTokenizer]) -> None:
    for text in ("the water", "the water " * 60, ""):
        expected = tokenizers[family].tokenizer(text, truncation=True, max_length=tokenizers[family].max_length)
        found = tokenizers[family].encode_text(text)
        assert found.input_ids.tolist() == expected["input_ids"]
        assert found.truncated.tolist() == [len(text) > 100]


def test_equal_texts_give_the_same_tokens_as_texts_alone(tokenizers: dict[str, PairTokenizer]) -> None:
    tokenizer = tokenizers["bert"]
    queries, documents = ["the water", "the", "the water"], ["heart", "heart", "fever"]
    together = tokenizer.encode(queries, documents)
    alone = [tokenizer.encode([q], [d]).input_ids for q, d in zip(queries, documents, strict=True)]
    assert together.input_ids.tolist() == np.concatenate(alone).tolist()


def test_no_pairs_give_no_tokens(tokenizers: dict[str, PairTokenizer]) -> None:
    pairs = tokenizers["bert"].encode([], [])
    assert (len(pairs), pairs.num_tokens, pairs.offsets.tolist()) == (0, 0, [0])


def test_using_the_tokenizer_of_transformers_in_between_changes_nothing(
    tokenizers: dict[str, PairTokenizer],
) -> None:
    tokenizer = tokenizers["electra"]
    before = tokenizer.encode(["the water"], ["heart " * 90])
    tokenizer.tokenizer(["the"], truncation=True, max_length=4, padding="max_length")
    after = tokenizer.encode(["the water"], ["heart " * 90])
    assert before.input_ids.tolist() == after.input_ids.tolist()


def test_encoding_a_text_beyond_the_limit_is_silent(
    tokenizers: dict[str, PairTokenizer], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("WARNING")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizers["bert"].encode(["the"], ["water " * 500]).truncated.tolist() == [True]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tokenizer_kind", ["real", "fake"])
def test_a_text_that_is_not_text_is_refused_with_its_position(
    tokenizer_kind: str, tokenizers: dict[str, PairTokenizer]
) -> None:
    tokenizer = tokenizers["bert"] if tokenizer_kind == "real" else FakeTokenizer()
    with pytest.raises(InputError, match="document 1 has a lone surrogate at character 2"):
        tokenizer.encode(["a", "b"], ["c", "d \ud800"])
    with pytest.raises(InputError, match="query 1 is a NoneType"):
        tokenizer.encode(["a", None], ["c", "d"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 queries and 2 documents"):
        tokenizer.encode(["a"], ["c", "d"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_limit_is_what_the_positions_hold(family: str, checkpoints: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(checkpoints[family])
    assert tokenizer.max_length == 48
    # XLM-R's table is two rows longer than the tokens it can hold.
    assert AutoConfig.from_pretrained(checkpoints[family]).max_position_embeddings in (48, 50)


def test_roberta_loses_the_rows_up_to_its_padding_id() -> None:
    assert position_limit(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512


def test_a_tokenizer_that_states_less_than_the_positions_sets_the_default_only(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_with(checkpoints["bert"], tmp_path, "tokenizer_config.json", model_max_length=20)
    assert load_tokenizer(folder).max_length == 20
    assert load_tokenizer(folder, 40).max_length == 40


def test_without_any_stated_limit_one_must_be_given(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_with(checkpoints["bert"], tmp_path, "tokenizer_config.json", model_max_length=10**30)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": -1}))
    with pytest.raises(ConfigError, match="set max_length"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, 40).max_length == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_a_limit_out_of_range_is_refused(family: str, checkpoints: dict[str, Path]) -> None:
    smallest = NUM_SPECIAL[family] + 1
    assert load_tokenizer(checkpoints[family], smallest).max_length == smallest
    for max_length in (-1, 0, smallest - 1, 49):
        with pytest.raises(ConfigError, match=f"max_length is {max_length}"):
            load_tokenizer(checkpoints[family], max_length)


def test_a_damaged_tokenizer_is_refused_by_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_with(checkpoints["modernbert"], tmp_path, "tokenizer.json", model={"type": "nonsense"})
    with pytest.raises(CheckpointError, match=f"tokenizer of {folder}"):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_pad_is_refused(tokenizers: dict[str, PairTokenizer]) -> None:
    from transformers import PreTrainedTokenizerFast

    unpadded = PreTrainedTokenizerFast(tokenizer_object=tokenizers["modernbert"].tokenizer.backend_tokenizer)
    with pytest.raises(CheckpointError, match="pad_token"):
        PairTokenizer(unpadded, 16)


def test_the_fake_tokenizer_gives_equal_words_equal_ids() -> None:
    pairs = FakeTokenizer(vocabulary_size=1000).encode(["water  the", "\n", ""], ["the water", "heart", ""])
    first, second, third = np.split(pairs.input_ids, pairs.offsets[1:-1])
    water, the = first[1:3].tolist()
    assert first.tolist() == [1, water, the, 2, the, water, 2]
    assert (second[:2].tolist(), len(second), third.tolist()) == ([1, 2], 4, [1, 2, 2])
    assert water != the
    assert all(3 <= word < 1000 for word in (water, the))


def test_the_fake_tokenizer_truncates_the_longer_text() -> None:
    pairs = FakeTokenizer(max_length=8).encode(["a b", "a"], ["c " * 20, "c d e"])
    assert pairs.lengths.tolist() == [8, 7]
    assert pairs.truncated.tolist() == [True, False]


def copy_with(folder: Path, to: Path, name: str, **changes: object) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / name).write_text(json.dumps({**json.loads((to / name).read_text()), **changes}))
    return to
