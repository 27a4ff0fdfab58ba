"""The commands on the model registry: `crossenc models`, `crossenc promote` and `crossenc rollback`."""

import sys
import uuid
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossenc.errors import InputError
from jobs import runtime
from jobs.config import REGISTRY_VARIABLE
from pipelines import new_version, registry
from pipelines.progress import announce, visible
from pipelines.registry import Entry, Version
from pipelines.storage import Location, locate

_Registry = Annotated[
    str,
    typer.Option("--registry", envvar=REGISTRY_VARIABLE, help="The registry: a folder or URI.", show_default=False),
]
_Reason = Annotated[str, typer.Option("--reason", help="Why, for the history.", show_default=False)]
_Name = Annotated[str, typer.Argument(help="The model's name in the registry.", show_default=False)]


def show(uri: str, name: str | None = None) -> int:
    """Prints the models, or the versions and the history of one, and returns the exit code."""

    def body(_: runtime.StopSignal) -> int:
        place = locate(uri)
        out = Console(highlight=False)
        out = out if out.is_terminal else Console(highlight=False, width=200)
        if name is None:
            _show_models(out, place)
            return runtime.DONE
        found, newest = registry.versions(place, name), registry.current(place, name)
        if not found and newest is None:
            known = ", ".join(registry.names(place)) or "none"
            raise InputError(f"{place} has no model {name}; there are: {known}")
        out.print(_version_table(found, newest), "")
        out.print(_history_table(registry.history(place, name)))
        return runtime.DONE

    return runtime.run(body)


def promote(
    uri: str,
    name: str,
    source: str,
    *,
    reason: str,
    version: str | None = None,
    evaluation: str | None = None,
    expected: int | None = None,
) -> int:
    """Makes a version, or a folder that becomes one, the current one; returns the exit code."""

    def body(_: runtime.StopSignal) -> int:
        place = locate(uri)
        if _is_folder(source):
            candidate = new_version.look(locate(source))
            if evaluation is not None:
                candidate = new_version.judged(candidate, locate(evaluation))
            announce(sys.stderr, f"storing {source} as a version …")
            chosen = new_version.add(place, name, candidate, version).version
        elif version is not None or evaluation is not None:
            raise InputError(
                "--as and --evaluation are of a version that is made of a folder; write the folder with a slash, as"
                " ./folder"
            )
        else:
            chosen = source
        key = _key()
        entry = registry.promote(place, name, chosen, reason=reason, key=key, expected=expected)
        _show_entry(name, entry, is_new=entry.key == key)
        return runtime.DONE

    return runtime.run(body)


def rollback(uri: str, name: str, *, to: str | None = None, reason: str) -> int:
    """Makes an earlier version the current one again; returns the exit code."""

    def body(_: runtime.StopSignal) -> int:
        key = _key()
        entry = registry.rollback(locate(uri), name, to=to, reason=reason, key=key)
        _show_entry(name, entry, is_new=entry.key == key)
        return runtime.DONE

    return runtime.run(body)


def _is_folder(source: str) -> bool:
    """A version's name has no slash: with one it is a path or a URI."""
    return "/" in source


def _key() -> str:
    """A name for a decision that nobody made before."""
    return uuid.uuid4().hex


def _show_entry(name: str, entry: Entry, is_new: bool) -> None:
    out = Console(highlight=False, soft_wrap=True)
    if not is_new:
        out.print(visible(f"nothing to do: {entry.version} is the current version of {name} already"), markup=False)
        return
    before = f", {entry.previous} before" if entry.previous else ""
    out.print(visible(f"{entry.version} is the current version of {name} now{before}"), markup=False)


def _show_models(out: Console, place: Location) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "current", "since (UTC)", "versions"):
        table.add_column(heading, justify="right" if heading == "versions" else "left")
    for name in registry.names(place):
        newest = registry.current(place, name)
        at = (newest.version, _minute(newest.at)) if newest is not None else ("none", "")
        table.add_row(Text(name), Text(at[0]), at[1], f"{len(registry.versions(place, name)):,}")
    if not table.rows:
        raise InputError(f"{place} has no models; make one with `crossenc promote NAME FOLDER`")
    out.print(table)


def _version_table(found: Sequence[Version], newest: Entry | None) -> Table:
    table = Table(box=None, pad_edge=False)
    measures = list(dict.fromkeys(str(version.facts["measure"]) for version in found if version.facts.get("measure")))
    for heading in ("version", "created (UTC)", *measures, "gain", "trained from", ""):
        table.add_column(heading, justify="right" if heading in (*measures, "gain") else "left")
    for version in found:
        values = [_figure(version, measure) for measure in measures]
        mark = "current" if newest is not None and newest.version == version.version else ""
        cells = [version.version, _minute(version.created_at), *values, _gain(version), visible(version.parent or "")]
        table.add_row(*map(Text, cells), Text(mark, style="green"))
    return table


def _history_table(entries: Sequence[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "history", "version", "before", "at (UTC)", "reason"):
        table.add_column(heading, justify="left" if heading else "right")
    for entry in reversed(entries):
        what = (entry.action, entry.version, entry.previous or "")
        table.add_row(f"{entry.number}", *what, _minute(entry.at), Text(visible(entry.reason)))
    return table


def _figure(version: Version, measure: str) -> str:
    value = version.facts.get("value")
    is_it = version.facts.get("measure") == measure and isinstance(value, int | float)
    return f"{value:.4f}" if is_it else ""


def _gain(version: Version) -> str:
    gain = version.facts.get("gain")
    return f"{gain:+.4f}" if isinstance(gain, int | float) else ""


def _minute(at: str) -> str:
    """A time in UTC without its seconds."""
    return at[:16].replace("T", " ")


def models_command(
    uri: _Registry,
    name: Annotated[str | None, typer.Argument(help="One model: its versions and its history.")] = None,
) -> None:
    """List the models of a registry, or the versions and the history of one.

    Exit codes: 0 done, 2 bad configuration or input, 1 anything else.
    """
    raise typer.Exit(show(uri, name))


def promote_command(
    name: _Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="VERSION|FOLDER",
            help="A version; or, with a slash in it, a checkpoint's folder or the output of a training or"
            " distillation job, which becomes a version first.",
            show_default=False,
        ),
    ],
    uri: _Registry,
    reason: _Reason,
    version: Annotated[
        str | None, typer.Option("--as", help="Name of the version that the folder becomes; by its content if absent.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--evaluation", help="Output of `crossenc evaluate` that judged the folder's model, kept with the version."
        ),
    ] = None,
    expected: Annotated[
        int | None,
        typer.Option("--expected", min=0, help="Refuse if the history has entries after this number."),
    ] = None,
) -> None:
    """Make a version of a model the current one: the next job that names registry://NAME uses it.

    Exit codes: 0 done, 2 bad configuration or input, 1 anything else.
    """
    raise typer.Exit(
        promote(uri, name, source, reason=reason, version=version, evaluation=evaluation, expected=expected)
    )


def rollback_command(
    name: _Name,
    uri: _Registry,
    reason: _Reason,
    to: Annotated[
        str | None, typer.Option("--to", help="The version to go back to; the one before by default.")
    ] = None,
) -> None:
    """Make an earlier version of a model the current one again. Again, it goes further back.

    Exit codes: 0 done, 2 bad configuration or input, 1 anything else.
    """
    raise typer.Exit(rollback(uri, name, to=to, reason=reason))
