"""Calls of the text-to-image pipeline and everything around them: times, noise, prompts, callbacks, outputs."""

import torch

from tests.helpers.pipeline import PROMPT, seeded
from tests.helpers.published import both_refuse, quiet, same


def draw(pipe, **settings):
    """Latents of one picture of `PROMPT`."""
    return pipe(PROMPT, output_type="latent", **settings).images


def test_the_default_call(folder):
    found = same(lambda lib, folder: draw(quiet(lib, folder), generator=seeded()), folder)
    assert found.std() > 0.3  # random weights that draw something


def test_the_default_picture(folder):
    same(lambda lib, folder: quiet(lib, folder)(PROMPT, generator=seeded()), folder)


def test_prompt_and_embeddings_together_are_refused(folder):
    def both(lib, folder):
        return draw(quiet(lib, folder), prompt_embeds=torch.zeros(1, 2, 32))

    both_refuse(both, folder, match="either prompt or prompt_embeds")
