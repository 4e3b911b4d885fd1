"""model_index.json: the class of each subfolder of a pipeline folder."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_sprint.weights.files import CONFIG_NAME, WeightsError, header, read_json, write_json

MODEL_INDEX_NAME = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class ModelIndex:
    """The content of a model_index.json.

    `components` maps a subfolder's name to (library, class name), or to None for a component that the pipeline does not have;
    `options` are the file's other fields.
    """

    class_name: str
    components: Mapping[str, tuple[str, str] | None]
    options: Mapping[str, Any] = field(default_factory=dict)


def read_model_index(folder: str | os.PathLike[str]) -> ModelIndex:
    """The model_index.json of a pipeline folder. Raises `WeightsError` if it is absent or not of that form."""
    path = Path(folder) / MODEL_INDEX_NAME
    if not path.is_file() and (path.parent / CONFIG_NAME).is_file():
        raise WeightsError(
            f"no {MODEL_INDEX_NAME} in {folder}: with {CONFIG_NAME} it is a part of a pipeline"
        )
    fields = read_json(path)
    class_name = fields.get("_class_name")
    if not isinstance(class_name, str):
        raise WeightsError(f"{path} must name a pipeline class in `_class_name`, got: {class_name!r}")
    public = {name: value for name, value in fields.items() if not name.startswith("_")}
    return ModelIndex(
        class_name=class_name,
        components={
            name: _component(path, name, value) for name, value in public.items() if isinstance(value, list)
        },
        options={name: value for name, value in public.items() if not isinstance(value, list)},
    )


def _component(path: Path, name: str, value: list[Any]) -> tuple[str, str] | None:
    if not name.isidentifier():  # it becomes a folder to read from and an argument of the pipeline
        raise WeightsError(f"{path}: a component's name is an identifier such as 'vae', got: {name!r}")
    match value:
        case [str(library), str(class_name)]:
            return library, class_name
        case [None, None]:
            return None
        case _:
            raise WeightsError(f"{path}: component {name!r} must be [library, class name], got: {value!r}")


def write_model_index(folder: str | os.PathLike[str], index: ModelIndex) -> None:
    """Write model_index.json into `folder` (made if absent), atomically."""
    components = {name: list(value or (None, None)) for name, value in index.components.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        path = Path(scratch) / MODEL_INDEX_NAME
        write_json(path, {**index.options, **components, **header(index.class_name)})
        path.replace(folder / MODEL_INDEX_NAME)
