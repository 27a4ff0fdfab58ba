"""The rerank job as a process of its own, with a fake model: what kill tests start, kill and start again.

python -m tests.support.rerank_driver job.yaml [--seconds-per-pair 0.01] [--set a=b ...] [--new-run]
"""

import argparse

from jobs import rerank
from tests.support.models import StumblingModel


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--seconds-per-pair", type=float, default=0.0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--new-run", action="store_true")
    given = parser.parse_args()
    model = StumblingModel(seconds_per_pair=given.seconds_per_pair)
    return rerank.run(given.job, tuple(given.overrides), new_run=given.new_run, model=model)


if __name__ == "__main__":
    raise SystemExit(main())
