"""From texts to scores: what the loss classes share. Knows the model only by the protocol below."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from crossenc.errors import InputError

Column = Sequence[str]
Pair = tuple[str, str]
Labels = Tensor | Sequence[Tensor]


@runtime_checkable
class ScoresPairs(Protocol):
    """What a loss needs of a model; CrossEncoder has it."""

    @property
    def num_labels(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def logits(self, pairs: Sequence[Pair], *, prompt: str | None = None) -> Tensor:
        """Raw logits [P, L] of P pairs on `device`, with their graph where gradients are enabled."""
        ...


class TextLoss(torch.nn.Module):
    """A loss that is called with columns of texts, scores them with its model and compares with the labels.

    `required_num_labels` is the L that the model must have; None for any. Raises InputError for another model.
    `prompt` in a call goes before every query; `task` is taken for compatibility, models here having one task.
    """

    required_num_labels: int | None = 1

    def __init__(self, model: ScoresPairs, activation_fn: torch.nn.Module | None) -> None:
        super().__init__()
        if not isinstance(model, ScoresPairs):
            raise InputError(f"{self._name} trains a CrossEncoder, not a {type(model).__name__}: pass the model itself")
        if self.required_num_labels is not None and model.num_labels != self.required_num_labels:
            raise InputError(
                f"{self._name} needs a model with {self.required_num_labels} output label, and this one has "
                f"{model.num_labels}: load it with num_labels={self.required_num_labels}, or use CrossEntropyLoss"
            )
        self.model = model
        self.activation_fn = activation_fn or torch.nn.Identity()

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that a model card shows."""
        return {"activation_fn": full_name(self.activation_fn)}

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _logits(self, pairs: Sequence[Pair], prompt: str | None) -> Tensor:
        """Raw logits [P] of a model with one label, [P, L] of others, in float32 at least."""
        logits = self.model.logits(pairs) if prompt is None else self.model.logits(pairs, prompt=prompt)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.squeeze(1) if self.required_num_labels == 1 else logits

    def _pair_columns(self, inputs: Sequence[Column]) -> list[Pair]:
        """The pairs of two columns."""
        if len(inputs) != 2:
            raise InputError(f"{self._name} takes two columns of texts beside the labels, got {len(inputs)}")
        return paired(inputs[0], inputs[1])

    def _one_label_each(self, labels: Tensor, num_pairs: int) -> Tensor:
        """Labels [P], from [P] or [P, 1], on the model's device."""
        if labels.numel() != num_pairs:
            raise InputError(
                f"{self._name} needs one label for each of {num_pairs} pairs, got labels of shape {tuple(labels.shape)}"
            )
        return labels.reshape(-1).to(self.model.device)


class ListLoss(TextLoss):
    """A loss whose inputs are a column of queries and one of lists of documents, with a list of labels for each.

    `mini_batch_size` pairs go through the model at a time: as many as there are queries when None or 0, all when
    negative. It changes how much is padded, and no gradient.
    """

    def __init__(self, model: ScoresPairs, activation_fn: torch.nn.Module | None, mini_batch_size: int | None) -> None:
        super().__init__(model, activation_fn)
        self.mini_batch_size = mini_batch_size

    def forward(
        self, inputs: Sequence[Sequence[Any]], labels: Labels, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, [queries, lists of documents], and `labels`, one tensor [N] a query."""
        scores, targets, mask = self._matrices(inputs, labels, prompt)
        return self.compute(scores, targets, mask)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of scores [Q, N] that are there already; `activation_fn` has been applied to them."""
        raise NotImplementedError(f"{self._name} has to define compute(scores, labels, mask)")

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    def _matrices(
        self, inputs: Sequence[Sequence[Any]], labels: Labels, prompt: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, labels and mask [Q, N], N being the length of the longest list."""
        if len(inputs) != 2:
            raise InputError(f"{self._name} takes queries and lists of documents beside the labels, got {len(inputs)}")
        if isinstance(labels, Tensor):
            raise InputError(f"{self._name} takes a list of labels for each query, one tensor a query; got one tensor")
        queries, lists = inputs
        lengths = [len(documents) for documents in lists]
        if len(queries) != len(lengths) or lengths != [len(values) for values in labels]:
            raise InputError(
                f"{self._name} needs a label for each document: {len(queries)} queries have lists of {lengths} "
                f"documents and of {[len(values) for values in labels]} labels"
            )
        pairs = [(query, document) for query, documents in zip(queries, lists, strict=True) for document in documents]
        device = self.model.device
        mask = torch.arange(max(lengths, default=0), device=device) < torch.tensor(lengths, device=device)[:, None]
        logits = self.activation_fn(self._in_mini_batches(pairs, len(queries), prompt))
        scores = logits.new_zeros(mask.shape).masked_scatter(mask, logits)
        flat = torch.cat([torch.as_tensor(values).to(scores) for values in labels]) if pairs else scores.new_empty(0)
        return scores, scores.new_zeros(mask.shape).masked_scatter(mask, flat), mask

    def _in_mini_batches(self, pairs: Sequence[Pair], num_queries: int, prompt: str | None) -> Tensor:
        size = self.mini_batch_size or num_queries
        size = size if size > 0 else len(pairs)
        parts = [self._logits(pairs[start : start + size], prompt) for start in range(0, len(pairs), max(size, 1))]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.model.device)


def paired(queries: Column, documents: Column) -> list[Pair]:
    """Two columns of equal length as pairs; raises InputError when one is longer."""
    if len(queries) != len(documents):
        raise InputError(f"columns of texts need equal lengths, got {len(queries)} and {len(documents)}")
    return list(zip(queries, documents, strict=True))


def tuple_pairs(queries: Column, columns: Sequence[Column]) -> list[Pair]:
    """Each query with its document of the first column, then with that of the second, ..."""
    return [pair for column in columns for pair in paired(queries, column)]


def full_name(instance: object) -> str:
    """Where an instance's class, or a function, is defined, as cards and configurations name it."""
    named = instance if callable(instance) and hasattr(instance, "__qualname__") else type(instance)
    return f"{named.__module__}.{named.__qualname__}"
