"""The environment of a process that runs the package of one checkout."""

from __future__ import annotations

import os
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


def environment(checkout: Path, threads: int, work: Path) -> dict[str, str]:
    """For a process that imports the package of `checkout`, and nothing from the caches of this machine."""
    checkout = checkout.resolve()
    if not (checkout / "src" / "sana_sprint").is_dir():
        raise SystemExit(f"{checkout} is no checkout: it has no src/sana_sprint")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (checkout / "src", BENCHMARKS, checkout))),
        "PYTHONHASHSEED": "0",
        "CHECKOUT": str(checkout),
        "OMP_NUM_THREADS": str(threads),
        "SANA_SPRINT_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
