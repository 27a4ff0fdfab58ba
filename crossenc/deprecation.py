"""Old names and places of arguments: still understood, with a warning that says what to write now."""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def accepts_old_arguments(
    renamed: Mapping[str, str | None], positional: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function to take arguments by their old names.

    `renamed` maps an old name to the new one, or to None where it has no effect any more; where both are given the
    new one counts. `positional` names keyword-only arguments that used to be positional ones, in their order after
    those that still are. An unknown name raises TypeError with the nearest known one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        num_positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            surplus = dict(zip(positional, args[num_positional:], strict=False))
            for name in surplus:
                _warn(f"{function.__qualname__} takes {name!r} by name only: write {name}=")
            if surplus:
                args = args[:num_positional]
            new: dict[str, Any] = {}
            for name in [name for name in kwargs if name not in parameters]:
                new |= _renamed(function.__qualname__, name, kwargs.pop(name), renamed, list(parameters))
            return function(*args, **{**new, **surplus, **kwargs})

        return wrapper

    return decorate


def _renamed(
    function: str, name: str, value: Any, renamed: Mapping[str, str | None], known: Sequence[str]
) -> dict[str, Any]:
    if name not in renamed:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it knows {', '.join(known[1:])}"
        raise TypeError(f"{function}() has no argument {name!r}: {hint}")
    new = renamed[name]
    _warn(f"the argument {name!r} of {function} is deprecated: " + (f"write {new!r}" if new else "it has no effect"))
    return {new: value} if new else {}


def _warn(message: str) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=4)
