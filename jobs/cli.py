"""The `crossenc` command: every job is a verb."""

import typer

from jobs import distill, evaluate, export, mine, registry, rerank, retrain, status, submit, train

app = typer.Typer(
    name="crossenc",
    help="Rerank query-document pairs with cross-encoders: billions of them, exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("rerank")(rerank.command)
app.command("train")(train.command)
app.command("evaluate")(evaluate.command)
app.command("export")(export.command)
app.command("mine")(mine.command)
app.command("distill")(distill.command)
app.command("retrain")(retrain.command)
app.command("submit")(submit.command)
app.command("status")(status.command)
app.command("models")(registry.models_command)
app.command("promote")(registry.promote_command)
app.command("rollback")(registry.rollback_command)


def main() -> None:
    """Entry point of the console command."""
    app()
