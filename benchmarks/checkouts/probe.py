"""Runs the items in one checkout: `python -m checkouts.probe OUT FIXTURES PATTERN...`, or `--make FIXTURES`.

The current folder is where commands write; PYTHONPATH says which checkout.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from fnmatch import fnmatch
from pathlib import Path

import torch

from checkouts import fixtures, models, pipelines, programs, training  # noqa: F401  (register their items)
from checkouts.record import ITEMS, Record


def main() -> None:
    import sana_sprint

    checkout = os.environ["CHECKOUT"]
    if not sana_sprint.__file__.startswith(checkout):
        raise SystemExit(f"sana_sprint is {sana_sprint.__file__}, not of {checkout}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1] == "--make":
        fixtures.make(Path(sys.argv[2]))
        return
    out, patterns = Path(sys.argv[1]), sys.argv[3:]
    fixtures.FOLDER = Path(sys.argv[2])
    for name, run in ITEMS.items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        record, error, started = Record(), None, time.perf_counter()
        try:
            run(record)
        except Exception as problem:  # an item that fails in one checkout is a difference like any other
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"
        folder = out / name
        record.save(folder)
        facts = {"error": error, "seconds": time.perf_counter() - started}
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
