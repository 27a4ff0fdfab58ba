"""What a model would do to only the top of the first stage's list. Knows rankings only, no measure and no model.

A reranker sees the first stage's best documents, and more of them are not always better: deep in the list it meets
more documents that it takes for relevant than documents that are. So a model is looked at at several depths.
"""

from collections.abc import Sequence


def rerank_top(first_stage: Sequence[str], reranked: Sequence[str], depth: int) -> list[str]:
    """The first `depth` documents of `first_stage` in the order of `reranked`, and the rest as the first stage has it.

    Documents of the top that `reranked` lacks (the model could not score them) are left out, as they are from
    `reranked`; so with a depth beyond the list the result is `reranked` itself.
    """
    top = set(first_stage[:depth])
    return [*(doc_id for doc_id in reranked if doc_id in top), *first_stage[depth:]]


def useful_depths(depths: Sequence[int], longest: int) -> tuple[int, ...]:
    """The depths that differ from each other for lists of at most `longest` documents, rising.

    Of those that take in every list whole, only the smallest is left.
    """
    rising = sorted(set(depths))
    within = [depth for depth in rising if depth < longest]
    return (*within, *rising[len(within) : len(within) + 1])
