"""The command as a whole: its verbs, their help, and what a verb need not wait for."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from jobs.cli import VERBS, app


def test_help_lists_every_verb():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "exactly once" in shown
    assert all(f" {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_own_help_begins_as_the_list_of_verbs_says(verb):
    place, said = VERBS[verb]
    module, function = place.split(":")
    described = inspect.getdoc(getattr(import_module(module), function))
    assert described is not None and " ".join(described.split()).startswith(said)
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0 and f"crossenc {verb}" in shown.stdout


def test_a_verb_that_there_is_not_is_refused():
    done = CliRunner().invoke(app, ["rank"])
    assert done.exit_code == 2 and "No such command 'rank'" in done.stderr


@pytest.mark.parametrize(
    ("words", "heavy", "code"),
    [
        (["--help"], {"ray", "torch", "matplotlib", "pyarrow"}, 0),
        (["status", "nowhere"], {"ray", "torch", "matplotlib"}, 2),
        (["models", "--registry", "nowhere"], {"ray", "torch", "matplotlib"}, 2),
    ],
)
def test_what_needs_no_cluster_waits_for_none(words, heavy, code, tmp_path):
    script = "import sys; from jobs.cli import app\n"
    script += f"try: app({words!r})\nexcept SystemExit as ended: print(ended.code, {heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} set()", done.stderr
