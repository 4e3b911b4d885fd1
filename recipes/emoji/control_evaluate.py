"""Scores sketches to pictures on held-out scenes: `python -m recipes.emoji.control_evaluate --model FOLDER`.

A scene's objects are drawn as shaky outlines and passed to the public pipeline as a scribble with the caption. Scores: *place*,
an object of any kind is near every outline; *kind*, the objects are those of the caption, anywhere; *both*, every outline
has its own kind of object.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.emoji.matcher import Found, find
from recipes.emoji.scenes import Scene, render
from recipes.emoji.sketches import drawing, free_scene
from sana_sprint import SanaSprintControlNetPipeline
from sana_sprint.images import grid

FIRST_SEED = 2_000_000
# Pixels between the centres of an outline and of its object, an eighth of the picture's side. The hand itself errs by a few.
NEAR = 16.0
BATCH = 25


def main() -> None:
    """Prints a Markdown table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="a name or a pipeline folder with a controlnet")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--out", type=Path, help="a folder for sheets of sketches and pictures")
    arguments = parser.parse_args()
    scenes = [free_scene(FIRST_SEED + i, held_out=True) for i in range(arguments.count)]
    sketches = [sketch(scene, i) for i, scene in enumerate(scenes)]
    pipeline = SanaSprintControlNetPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    rows = {"real pictures": scored([render(scene) for scene in scenes], scenes)}
    for steps in (1, 2, 4):
        pictures = follow(pipeline, scenes, sketches, steps, arguments.guidance)
        rows[f"{steps} step{'s' * (steps > 1)}"] = scored(pictures, scenes)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            pairs = [image for pair in zip(sketches, pictures, strict=True) for image in pair]
            grid(pairs[:96], columns=12).save(arguments.out / f"control{steps}.png")
    print("| | place | kind | both |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['place']:.1%} | {row['kind']:.1%} | {row['both']:.1%} |")
    print(json.dumps({"count": len(scenes), **rows}))


def sketch(scene: Scene, number: int) -> Image.Image:
    """A drawing of the scene, black on white."""
    lines = drawing(np.asarray(render(scene)), random.Random(f"sketch-{number}"))
    return Image.fromarray((255 - 255 * lines.numpy()).astype(np.uint8))


def follow(
    pipeline: SanaSprintControlNetPipeline,
    scenes: Sequence[Scene],
    sketches: Sequence[Image.Image],
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """One picture of each sketch, from seeds 0, 1, ..."""
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        part = slice(start, min(start + BATCH, len(scenes)))
        output = pipeline(
            [scene.caption for scene in scenes[part]],
            image=list(sketches[part]),
            kind="scribble",
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=list(range(part.start, part.stop)),
        )
        pictures += output.images
    return pictures


def scored(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """Computes the shares of pictures correct in place, in kind, and in both."""
    results = [
        verdict(find(np.array(p.convert("RGB"))).objects, s) for p, s in zip(pictures, scenes, strict=True)
    ]
    return {name: float(np.mean([result[name] for result in results])) for name in ("place", "kind", "both")}


def verdict(found: Sequence[Found], scene: Scene) -> dict[str, bool]:
    """Decides (place, kind, both) from the objects found in a picture."""
    kinds = Counter(thing.kind for thing in found) == Counter(placed.kind for placed in scene.objects)
    near = [
        [np.hypot(thing.x - placed.x, thing.y - placed.y) <= NEAR for thing in found]
        for placed in scene.objects
    ]
    own = all(
        any(is_near and thing.kind == placed.kind for is_near, thing in zip(row, found, strict=True))
        for row, placed in zip(near, scene.objects, strict=True)
    )
    return {"place": all(any(row) for row in near), "kind": kinds, "both": kinds and own}


if __name__ == "__main__":
    main()
