"""The `crossenc` command: every job is a verb.

A verb's module is imported when that verb is called: `crossenc status` need not wait for Ray, nor --help for anything.
"""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

#: Where each verb's command is, and what it does: its help begins so.
VERBS = {
    "rerank": ("jobs.rerank:command", "Rerank candidates with a cross-encoder, exactly once."),
    "train": ("jobs.train:command", "Train a cross-encoder on labelled lists."),
    "evaluate": ("jobs.evaluate:command", "Compare models and rankings on judged collections."),
    "export": (
        "jobs.export:command",
        "Export a model to ONNX for backend onnx, and keep the file only if it ranks as well.",
    ),
    "mine": ("jobs.mine:command", "Mine hard negatives for training from candidates or from a rerank run."),
    "distill": ("jobs.distill:command", "Train a small cross-encoder to score like larger ones."),
    "retrain": (
        "jobs.retrain:command",
        "Train on new labels, compare with the version in use, and promote what is better.",
    ),
    "submit": ("jobs.submit:command", "Submit a job to a Ray cluster."),
    "status": (
        "jobs.status:command",
        "Show whether a run is running, resumable or finished, and what it has done so far.",
    ),
    "models": (
        "jobs.registry:models_command",
        "List the models of a registry, or the versions and the history of one.",
    ),
    "promote": (
        "jobs.registry:promote_command",
        "Make a version of a model the current one: the next job that names registry://NAME uses it.",
    ),
    "rollback": ("jobs.registry:rollback_command", "Make an earlier version of a model the current one again."),
}


class _Verb(TyperCommand):
    """A verb as --help lists it. What follows it on a command line is parsed by its own command."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        module, function = VERBS[str(self.name)][0].split(":")
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(getattr(import_module(module), function))
        return typer.main.get_command(alone).make_context(*args, **options)


class _Verbs(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: _Verb(name=name, help=help_, callback=None) for name, (_, help_) in VERBS.items()}


app = typer.Typer(name="crossenc", cls=_Verbs, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Rerank query-document pairs with cross-encoders: billions of them, exactly once."""


def main() -> None:
    """Entry point of the console command."""
    app()
