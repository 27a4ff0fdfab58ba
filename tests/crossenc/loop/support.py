"""Lists to learn from, and a learner of a tiny model."""

from functools import partial

import numpy as np
import torch

from crossenc import CrossEncoder
from crossenc.loop.learner import Learner, LearnerSettings
from crossenc.loop.lists import TokenizedLists
from crossenc.loop.optimizer import parameter_groups
from crossenc.losses import objective
from crossenc.testing import WORDS, tiny_checkpoint


def tiny_model(folder, family="bert", dropout=0.0, **settings) -> CrossEncoder:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    names += ("attention_dropout", "embedding_dropout", "mlp_dropout") if family == "modernbert" else ()
    known = dict.fromkeys(names, dropout)
    return CrossEncoder(tiny_checkpoint(folder, family, **settings), config_kwargs=known, device="cpu")


def make_lists(model: CrossEncoder, sizes, seed=0, weights=None) -> TokenizedLists:
    """Lists of texts of random words; the first document of each is relevant."""
    random = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, most)))

    queries = [query for size in sizes for query in [text(5)] * size]
    pairs = model.pair_tokenizer().encode(queries, [text(30) for _ in queries])
    labels = np.concatenate([np.eye(1, size, dtype=np.float32)[0] for size in sizes])
    counted = np.ones(len(sizes), np.float32) if weights is None else np.array(weights, np.float32)
    return TokenizedLists(pairs, np.array(sizes), labels, counted, tuple(f"row {i}" for i in range(len(sizes))))


#: Keys' biases change no score, so that their gradients are rounding alone, and Adam would make whole steps of it.
adamw = partial(torch.optim.AdamW, eps=1e-3)


def make_learner(model, lists, loss="binary_cross_entropy", optimizer=adamw, **settings) -> Learner:
    def make(model):
        groups = parameter_groups(model, learning_rate=1e-3, head_learning_rate=None, weight_decay=0.01)
        return optimizer(groups)

    loss = objective(loss) if isinstance(loss, str) else loss
    return Learner(model, loss, make, LearnerSettings(**{"max_tokens": 10_000, **settings}), lists)


def weights_of(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
