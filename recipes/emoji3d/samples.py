"""Samples by number, as training and evaluation take them: pictures with captions, and prompts with their scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from recipes.emoji3d.artwork import STYLES
from recipes.emoji3d.backgrounds import num_variants, sample_background
from recipes.emoji3d.captions import Caption, describe, must_name
from recipes.emoji3d.crowds import crowd
from recipes.emoji3d.scenes import TASKS, Scene, arrange, is_visible, render, sample_scene

NUM_CAPTIONS = 6  # of each training picture
_FIRST_EVALUATION_SEED = 1_000_000_000_000  # beyond every training and validation index


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out caption, what it says, and the scene that it is about."""

    scene: Scene
    says: Caption

    @property
    def caption(self) -> str:
        """The text that a model is given."""
        return self.says.text


def everyday_128(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sample `index` of the small chain: (uint8 (128,128,3), captions), from the training split."""
    return _sample(index, "everyday", 128)


def all_256(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sample `index` of the large chain: (uint8 (256,256,3), captions), from the training split."""
    return _sample(index, "all", 256)


def autoencoder_128(index: int) -> np.ndarray:
    """Autoencoder sample `index` of the small chain: two scenes for each crowd. uint8 (128,128,3)."""
    return _autoencoder_picture(index, "everyday", 128)


def autoencoder_256(index: int) -> np.ndarray:
    """Autoencoder sample `index` of the large chain. uint8 (256,256,3)."""
    return _autoencoder_picture(index, "all", 256)


def evaluation_prompts(count: int = 600, *, tier: str = "everyday", wording: str = "known") -> list[Prompt]:
    """The held-out prompts that models are scored on, always the same: every task in turn.

    Args:
        count: how many.
        tier: whose concepts.
        wording: one of `captions.WORDINGS`; scenes are the same for each.
    """
    prompts = []
    for number in range(count):
        seed, task = _FIRST_EVALUATION_SEED + number // len(TASKS), TASKS[number % len(TASKS)]
        scene = sample_scene(seed, tier=tier, held_out=True, task=task)
        rng = random.Random(f"prompt3d-{number}")
        prompts.append(Prompt(scene, describe(scene, rng, wording=wording, must_name=must_name(task))))
    return prompts


def redraw(prompt: Prompt, seed: int) -> Scene:
    """Draws another scene that the prompt's caption holds for: whatever it leaves open is drawn anew."""
    scene, says = prompt.scene, prompt.says
    rng = random.Random(f"redraw3d-{seed}-{says.text}")
    kinds = [thing.kind if says.names_sizes else replace(thing.kind, size=None) for thing in scene.things]
    relation = scene.relation if says.names_relation else None
    while True:
        style = scene.style if says.names_style else rng.choice(STYLES)
        background = sample_background(rng)
        if says.names_background:
            pattern = scene.background.pattern
            variant = rng.randrange(num_variants(pattern)) if pattern else 0
            background = replace(scene.background, variant=variant)
        colors = [color for color in (background.first, background.second) if color]
        looks = {(kind.concept.emoji, kind.hue) for kind in kinds}
        if all(is_visible(emoji, style, hue, color) for emoji, hue in looks for color in colors):
            return Scene(scene.task, style, arrange(kinds, relation, rng), background, relation)


def _autoencoder_picture(index: int, tier: str, side: int) -> np.ndarray:
    if index % 3 == 0:
        return crowd(index, side)
    return np.asarray(render(sample_scene(index, tier=tier), side))


def _sample(index: int, tier: str, side: int) -> tuple[np.ndarray, tuple[str, ...]]:
    scene = sample_scene(index, tier=tier)
    rng = random.Random(f"captions3d-{index}")
    captions = tuple(describe(scene, rng).text for _ in range(NUM_CAPTIONS))
    return np.asarray(render(scene, side)), captions
