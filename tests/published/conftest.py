"""Scripts for the published pipeline, run with diffusers and with this package: equal, or refused by both.

A row is a snippet, written as a user of diffusers writes it, with the library and a model folder as its arguments:

    def three_steps(lib, folder):
        pipe = lib.SanaSprintPipeline.from_pretrained(folder)
        return pipe("a red cat", num_inference_steps=3, intermediate_timesteps=None, generator=seeded(), output_type="latent")

    def test_three_steps(folder):
        same(three_steps, folder)

* `same` runs a snippet with both libraries and compares its results, fp32 to 1e-5; `both_refuse` expects an error of both.
  Both seed torch's global generator first. They are in `tests.helpers.published`.
* A test that takes the fixture `lib` runs once with each library, for what is asserted and not compared (names, types).
* `folder` is a pipeline in the published layout that diffusers wrote, with random weights: sample_size 32, compression 32.
  It is shared by all tests: write to `tmp_path` instead. `output_type="latent"` spares the decoding of 1024 pixels.
* One file per area. `python -m tests.published.table` writes all rows into docs/published.md: a test's name is the script, its
  docstring the note. Where both cannot do the same, the test says why, next to what each does.
"""

import importlib

import pytest

from tests.helpers.pipeline import BUCKET_AUTOENCODER, BUCKET_TRANSFORMER, save_published_folder
from tests.helpers.published import LIBRARIES


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A pipeline that diffusers wrote; never written to."""
    return save_published_folder(
        tmp_path_factory.mktemp("published") / "tiny", BUCKET_TRANSFORMER, BUCKET_AUTOENCODER
    )


@pytest.fixture(params=LIBRARIES)
def lib(request):
    """The library that a snippet imports its names from: diffusers, then this package."""
    return importlib.import_module(request.param)
