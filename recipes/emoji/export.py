"""Copies a pipeline folder and its controlnet into the package as the embedded model: `python -m recipes.emoji.export FOLDER`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import sana_sprint
from sana_sprint import SanaSprintPipeline
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.weights import load_model, save_model

MAX_BYTES = 48_000_000  # everyone who clones the project downloads it
EMBEDDED = Path(sana_sprint.__file__).parent / "embedded" / "emoji"


def main() -> None:
    """Writes the folder in bf16, replacing the one there, and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="a pipeline folder, such as runs/emoji/control-student/final"
    )
    parser.add_argument("--target", type=Path, default=EMBEDDED)
    arguments = parser.parse_args()
    pipeline = SanaSprintPipeline.from_pretrained(arguments.folder, torch_dtype=torch.bfloat16)
    fresh = arguments.target.with_name(arguments.target.name + "-new")
    pipeline.save_pretrained(fresh)
    if (branch := arguments.folder / "controlnet").is_dir():
        # model_index.json does not list it, so the published text pipeline loads the folder unchanged.
        save_model(load_model(SanaControlNetModel, branch, dtype=torch.bfloat16), fresh / "controlnet")
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"error: {fresh} has {size} bytes; at most {MAX_BYTES} may ship")
    shutil.rmtree(arguments.target, ignore_errors=True)
    fresh.rename(arguments.target)
    print(f"{arguments.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
