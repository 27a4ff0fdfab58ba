"""The queries on which a system lost most against the baseline, with the documents that rose and fell.

Choosing is a pure function of rankings, judgements and values; texts are looked up by the caller and joined here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from crossenc.evaluation.comparison import Collection, Values
from pipelines.evaluation_texts import Texts

#: Ranks that people look at, and documents shown of those that rose and of those that fell.
_TOP = 10
_NUM_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedDocument:
    """A document and its ranks, None where it is not ranked. `grade` is None where nobody judged it."""

    doc_id: str
    grade: int | None
    rank_before: int | None
    rank_after: int | None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A query on which `system` is worse than the baseline by the main measure."""

    collection: str
    system: str
    query_id: str
    before: float
    after: float
    risen: tuple[MovedDocument, ...]
    fallen: tuple[MovedDocument, ...]
    query: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query with each of its documents."""
        return [(self.query_id, document.doc_id) for document in (*self.risen, *self.fallen)]


def worst_losses(
    collection: Collection, values: Mapping[str, Values], measure: str, baseline: str, most: int
) -> list[Loss]:
    """The `most` queries of each system whose `measure` fell most against the baseline, the largest loss first.

    Queries that lost nothing are none. Equal losses are in the order of the query ids.
    """
    runs = {system.name: system.run for system in collection.all_systems}
    losses = []
    for name, run in runs.items():
        before, after = values[baseline][measure], values[name][measure]
        by = sorted(collection.qrels, key=lambda query: (after[query] - before[query], query))
        for query in [query for query in by if after[query] < before[query]][:most]:
            risen, fallen = moved(runs[baseline].get(query, ()), run.get(query, ()), collection.qrels[query])
            losses.append(
                Loss(
                    collection=collection.name,
                    system=name,
                    query_id=query,
                    before=before[query],
                    after=after[query],
                    risen=risen,
                    fallen=fallen,
                )
            )
    return losses


def moved(
    before: Sequence[str], after: Sequence[str], grades: Mapping[str, int]
) -> tuple[tuple[MovedDocument, ...], tuple[MovedDocument, ...]]:
    """The documents that rose into or within the new top, and those that fell in or out of the old one.

    Relevant documents come first among those that fell, because they are what is lost; otherwise the best rank does.
    """
    old = {doc_id: rank for rank, doc_id in enumerate(before, start=1)}
    new = {doc_id: rank for rank, doc_id in enumerate(after, start=1)}
    beyond = max(len(before), len(after)) + 1

    def document(doc_id: str) -> MovedDocument:
        return MovedDocument(
            doc_id=doc_id, grade=grades.get(doc_id), rank_before=old.get(doc_id), rank_after=new.get(doc_id)
        )

    risen = [doc_id for doc_id in after[:_TOP] if new[doc_id] < old.get(doc_id, beyond)]
    fallen = [
        doc_id
        for doc_id in before
        if new.get(doc_id, beyond) > old[doc_id] and (old[doc_id] <= _TOP or grades.get(doc_id, 0) > 0)
    ]
    fallen.sort(key=lambda doc_id: (-max(grades.get(doc_id, 0), 0), old[doc_id]))
    return tuple(map(document, risen[:_NUM_SHOWN])), tuple(map(document, fallen[:_NUM_SHOWN]))


def with_texts(loss: Loss, texts: Texts) -> Loss:
    """The same loss with the texts there are."""

    def told(documents: Sequence[MovedDocument]) -> tuple[MovedDocument, ...]:
        found = texts.documents
        return tuple(replace(one, text=found.get((loss.query_id, one.doc_id), "")) for one in documents)

    query = texts.queries.get(loss.query_id, "")
    return replace(loss, query=query, risen=told(loss.risen), fallen=told(loss.fallen))
