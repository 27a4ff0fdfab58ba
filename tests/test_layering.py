"""Importing the packages does nothing but import."""

import ast
import subprocess
import sys


def test_importing_the_library_loads_neither_ray_nor_arrow_nor_torch():
    code = "import sys, crossenc, crossenc.records, crossenc.ranking, crossenc.batching, crossenc.evaluation.metrics\n"
    code += "import crossenc.mining\n"
    code += "assert not {'ray', 'pyarrow', 'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_pipelines_starts_no_ray_and_changes_no_environment():
    code = "import os, logging; before = dict(os.environ); handlers = list(logging.getLogger().handlers)\n"
    code += "import pipelines.rerank, ray\nfrom importlib import import_module\nfrom jobs.cli import VERBS\n"
    code += "for place, _ in VERBS.values(): import_module(place.split(':')[0])\n"
    code += "assert not ray.is_initialized() and logging.getLogger().handlers == handlers\n"
    code += "print({k for k in os.environ if before.get(k) != os.environ[k]})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    changed = ast.literal_eval(done.stdout.replace("set()", "[]"))
    assert not {name for name in changed if not name.startswith(("RAY_", "KMP_", "PYTHON"))}
