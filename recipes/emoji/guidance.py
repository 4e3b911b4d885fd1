"""Measures how far the student has learnt its guidance scale: `python -m recipes.emoji.guidance --teacher FOLDER`.

Pictures from the same noise at two scales differ. The student, whose scale is an input, should change its pictures in the
same direction and by the same amount as the guided teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.emoji.evaluate import teacher_pictures
from recipes.emoji.judge import evaluation_scenes
from sana_sprint import SanaSprintPipeline
from sana_sprint.evaluate.compositional import draw


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="the student: a name or a pipeline folder")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher run's final folder")
    parser.add_argument("--scales", type=float, nargs=2, default=(4.0, 5.0))
    parser.add_argument("--count", type=int, default=60, help="number of held-out prompts, a multiple of 6")
    arguments = parser.parse_args()
    low, high = arguments.scales
    scenes = evaluation_scenes(arguments.count)
    captions = [scene.caption for scene in scenes]
    teacher = change(*(teacher_pictures(arguments.teacher, scenes, scale, 20) for scale in (low, high)))
    pipeline = SanaSprintPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    print(f"| from {low} to {high} | size of the change (levels) | cosine with the teacher's |")
    print("|---|---|---|")
    print(f"| teacher, 20 steps | {size(teacher):.2f} | 1 |")
    for steps in (1, 2, 4):
        student = change(
            *(draw(pipeline, captions, num_steps=steps, guidance=scale) for scale in (low, high))
        )
        print(f"| student, {steps} | {size(student):.2f} | {cosine(student, teacher):.2f} |")


def change(before: list[Image.Image], after: list[Image.Image]) -> np.ndarray:
    """Computes the difference of two lists of pictures: (n,H,W,3) in levels."""
    return np.stack(
        [np.asarray(b, np.float32) - np.asarray(a, np.float32) for a, b in zip(before, after, strict=True)]
    )


def size(difference: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(difference).mean()))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Computes the cosine of all differences taken as one vector; 0 if either is zero."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / norms if norms else 0.0


if __name__ == "__main__":
    main()
