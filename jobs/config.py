"""Job files: YAML and `--set a.b=c` into a checked configuration, with errors that name the key and the remedy.

Where neither says where the model registry is, the environment may.
"""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console

from crossenc.errors import ConfigError
from pipelines.storage import FileInfo, info, locate, read_bytes, redact_options

Config = TypeVar("Config", bound=BaseModel)

# What the commands of jobs have in common.
JobFile = Annotated[str, typer.Argument(help="The job file: a path or URI of a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, as --set output=other or --set group.setting=4. Repeatable."),
]
NewRun = Annotated[bool, typer.Option("--new-run", help="Delete the run in the output folder and start over.")]

_MAX_BYTES = 1_000_000
#: The registry of jobs that name none, and of the commands on it.
REGISTRY_VARIABLE = "CROSSENC_REGISTRY"


def load(kind: type[Config], source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file `source` (a path or URI), with `key=value` overrides applied over it.

    Raises ConfigError naming the file, the key and, for a misspelt one, the nearest key there is.
    """
    tree = _read_yaml(source)
    for override in overrides:
        _apply(tree, override)
    if "registry" in kind.model_fields and os.environ.get(REGISTRY_VARIABLE):
        tree.setdefault("registry", os.environ[REGISTRY_VARIABLE])
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(kind, problem) for problem in error.errors())) from None


def show(config: BaseModel, lines: Sequence[str]) -> None:
    """Print the settings as YAML, without credentials, and `lines` after them."""
    shown = config.model_dump(mode="json")
    shown["storage_options"] = redact_options(shown["storage_options"])
    out = Console(highlight=False, soft_wrap=True)
    out.print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip(), markup=False)
    out.print("\n" + "\n".join(lines), markup=False)


def _read_yaml(source: str) -> dict[str, Any]:
    file = _find(source)
    if file.num_bytes > _MAX_BYTES:
        raise ConfigError(
            f"{source} has {file.num_bytes:,} bytes: that is no job file; give the YAML file with the settings"
        )
    text = read_bytes(file.location).decode()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source}: YAML aliases are not used in job files; write the value out")
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{source} is not YAML{_place(error)}; put quotes around values with special characters"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} holds no settings; write them as `key: value` lines")
    return tree


def _place(error: yaml.YAMLError) -> str:
    """Where YAML cannot be read, without a word of what stands there: it may be a credential."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    return f": see line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _find(source: str) -> FileInfo:
    file = info(locate(source))
    if file is None:
        folder = Path(source).parent
        near = get_close_matches(Path(source).name, [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else [])
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise ConfigError(f"there is no job file {source}{hint}")
    return file


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` in the tree; the value is read as YAML, so numbers, lists and null work."""
    path, equals, text = override.partition("=")  # errors show the path alone: the value may be a credential
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {path!r}: write key=value, with dots for keys inside others, as in scoring.actors=4")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {path!r}: {key} is a value, not a group of settings")
        node = child
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {path!r}: the value is not YAML; put quotes around it") from None


def _explain(kind: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, problem["loc"][:-1])
        near = get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {path}; {hint}"
    if problem["type"] == "missing":
        or_set = f", or give --set {path}=…" if len(problem["loc"]) == 1 else ""
        return f"{path} is missing; write it into the job file{or_set}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _keys_at(kind: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The setting names of the model at `path` below `kind`."""
    model: Any = kind
    for part in path:
        if isinstance(part, int):  # an item of a list: its model was taken from the list's own type
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        options = getattr(annotation, "__args__", (annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), BaseModel)
    return list(model.model_fields)
