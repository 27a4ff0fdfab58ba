"""Old names and places of arguments: still understood, with a warning that says what to write now."""

import difflib
import functools
import inspect
import logging
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


#: What followed the batch size by place before version 5.4 of sentence-transformers; from 4 on without num_workers.
_AFTER_BATCH_SIZE = (
    *("batch_size", "show_progress_bar", "num_workers", "activation_fn", "apply_softmax"),
    *("convert_to_numpy", "convert_to_tensor"),
)


def accepts_old_arguments(
    renamed: Mapping[str, str | None], positional: Sequence[str] = (), batch_size_at: int | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function to take arguments by their old names.

    `renamed` maps an old name to the new one, to "a.b" for the entry b of a mapping a, or to None where it has no
    effect any more; where both are given the new one counts. `positional` names keyword-only arguments that used to
    be positional ones, in their order after those that still are. Where the positional argument number
    `batch_size_at` is an integer, it and those after it are what they were when the batch size stood there. An unknown
    name raises TypeError with the nearest known one, unless the function takes any.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        num_positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            if len(args) - num_positional > len(positional) and not takes_more:
                raise TypeError(f"{function.__qualname__}() takes no more than {len(positional)} more by place")
            surplus = dict(zip(positional, args[num_positional:], strict=False))
            if batch_size_at is not None and len(args) > batch_size_at and _is_integer(args[batch_size_at]):
                warn_deprecated(f"{function.__qualname__} takes batch_size and what follows by name: write batch_size=")
                kwargs = {**_after_batch_size(args[batch_size_at:]), **kwargs}
                args = args[:batch_size_at]
            for name in surplus:
                warn_deprecated(f"{function.__qualname__} takes `{name}` by name only: write {name}=")
            if surplus:
                args = args[:num_positional]
            new: dict[str, Any] = {}
            for name in [name for name in kwargs if name not in parameters]:
                if name in renamed:
                    new |= _renamed(function.__qualname__, name, kwargs.pop(name), renamed[name], kwargs)
                elif not takes_any:
                    raise TypeError(_unknown(function.__qualname__, name, list(parameters)))
            return function(*args, **{**new, **surplus, **kwargs})

        return wrapper

    return decorate


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _after_batch_size(values: Sequence[Any]) -> dict[str, Any]:
    has_workers = len(values) > 2 and _is_integer(values[2])
    names = _AFTER_BATCH_SIZE if has_workers else [name for name in _AFTER_BATCH_SIZE if name != "num_workers"]
    given = dict(zip(names, values, strict=False))
    given.pop("num_workers", None)
    return {name: int(value) if _is_integer(value) else value for name, value in given.items()}


def warn_deprecated(message: str, stacklevel: int = 3) -> None:
    """Say it in the log, which people see, and as a DeprecationWarning, which test suites can turn into an error."""
    logger.warning(message)
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def _renamed(function: str, name: str, value: Any, new: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The argument under its new name; an entry of a mapping that is `given` goes there."""
    if new is None:
        warn_deprecated(f"The {function} `{name}` argument is deprecated: it has no effect", 4)
        return {}
    mapping, _, key = new.partition(".")
    if not key:
        warn_deprecated(f"The {function} `{name}` argument was renamed and is now deprecated: write `{new}`", 4)
        return {new: value}
    warn_deprecated(f"The {function} `{name}` argument is deprecated: write {mapping}={{{key!r}: …}}", 4)
    return {mapping: {key: value, **(given.pop(mapping, None) or {})}}


def _unknown(function: str, name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it knows {', '.join(known[1:])}"
    return f"{function}() has no argument {name!r}: {hint}"
