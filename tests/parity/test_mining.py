"""The margins choose the negatives that sentence-transformers' miner chooses from the same scores."""

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from crossenc.mining import MineQuery, MineSettings, mine, text_key
from crossenc.ranking import order

NUM_QUERIES, NUM_DOCUMENTS = 12, 40
QUERIES = [f"query{q}" for q in range(NUM_QUERIES)]
DOCUMENTS = [f"document{d}" for d in range(NUM_DOCUMENTS)]
#: The first query has three positives, so that the lowest of them has to set the margin.
POSITIVES = [(0, 0), (0, 1), (0, 2), *((q, q + 2) for q in range(1, NUM_QUERIES))]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    """A word is a random vector, nearer to the others than chance, so that margins cut somewhere in the middle."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *QUERIES, *DOCUMENTS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.random.default_rng(3).normal(0.6, 1.0, (len(vocabulary), 8)).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)], device="cpu")


def ours(model: SentenceTransformer, settings: MineSettings) -> set[tuple[str, str, str]]:
    scores = model.similarity(model.encode(QUERIES), model.encode(DOCUMENTS)).double().numpy()
    triplets = set()
    for q, row in enumerate(scores):
        ranks = np.empty(NUM_DOCUMENTS, np.int64)
        ranks[order(row, np.zeros(NUM_DOCUMENTS, np.int64), DOCUMENTS)] = np.arange(1, NUM_DOCUMENTS + 1)
        positives = {DOCUMENTS[d] for query, d in POSITIVES if query == q}
        keys = [text_key(document) for document in DOCUMENTS]
        mined = mine(
            MineQuery(QUERIES[q], DOCUMENTS, keys, ranks, row, positives, set(map(text_key, positives))), settings
        )
        triplets |= {(QUERIES[q], positive, DOCUMENTS[d]) for positive in positives for d in mined.negatives}
    return triplets


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"absolute_margin": 0.0},
        {"absolute_margin": 0.2},
        {"relative_margin": 0.05},
        {"relative_margin": 0.4},
        {"max_score": 0.5, "min_score": 0.1},
        {"relative_margin": 0.1, "absolute_margin": 0.15, "max_score": 0.6},
    ],
)
@pytest.mark.parametrize("num_negatives", [3, 30])
def test_margins_and_limits_choose_what_sentence_transformers_chooses(model, rules, num_negatives):
    pairs = Dataset.from_dict(
        {"query": [QUERIES[q] for q, _ in POSITIVES], "positive": [DOCUMENTS[d] for _, d in POSITIVES]}
    )
    theirs = mine_hard_negatives(
        pairs,
        model,
        corpus=DOCUMENTS,
        range_max=NUM_DOCUMENTS,
        num_negatives=num_negatives,
        output_format="triplet",
        verbose=False,
        **rules,
    )
    expected = {(row["query"], row["positive"], row["negative"]) for row in theirs}
    assert ours(model, MineSettings(num_negatives=num_negatives, **rules)) == expected
    assert expected
