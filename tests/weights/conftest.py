"""A model, and its folder, for the tests of this folder."""

import pytest

from sana_sprint.weights import save_model
from tests.helpers.weights import tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    save_model(model, tmp_path / "model")
    return tmp_path / "model"
