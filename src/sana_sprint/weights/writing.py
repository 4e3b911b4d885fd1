"""Saves a model to its folder, in shards and variants; a reader never sees a partial model."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_sprint.weights.files import (
    CONFIG_KEY,
    CONFIG_NAME,
    WeightsError,
    check_variant,
    file_names,
    first_few,
    header,
    index_names,
    is_weight_file,
    weight_name,
    write_json,
)


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` into `folder` (made if absent) so that `load_model` and diffusers load it.

    `dtype` casts floating-point tensors in the files only, None writes them as they are. `max_shard_size` is a number
    of bytes or a string such as "500MB". Files of other variants stay; all variants share the one config.json.

    All files are first written in full under another name and then renamed: a write that fails leaves the old model,
    and a reader never sees new weights mixed with old ones. Raises `WeightsError` for a model without a published
    class name or with tensors on the meta device, and for a bad variant, dtype or shard size.
    """
    check_variant(variant)
    fields, state = _content(model, dtype)
    # Without data, but of the sizes that will be written, which `dtype` may halve.
    shapes = {key: _cast(tensor, dtype, "meta") for key, tensor in state.items()}
    files, index = _split(shapes, variant, max_shard_size)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        scratch = Path(name)
        write_json(scratch / CONFIG_NAME, fields)
        for file, keys in files.items():
            tensors = {key: _cast(state[key], dtype, "cpu").contiguous() for key in keys}
            save_file(tensors, scratch / file, metadata={"format": "pt"})
            # safetensors lets only the owner read its files; a model should be as readable as other files.
            (scratch / file).chmod((scratch / CONFIG_NAME).stat().st_mode & 0o777)
        if index is not None:
            write_json(scratch / index_names(variant)[0], index)
        _publish(scratch, folder, variant)


def save_single_file(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write `model` into one safetensors file that holds its config too, for `load_single_file`.

    The file appears whole or not at all. `dtype` and errors as for `save_model`.
    """
    fields, state = _content(model, dtype)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    tensors = {key: _cast(tensor, dtype, "cpu").contiguous() for key, tensor in state.items()}
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # safetensors would let only the owner read the file
        save_file(tensors, partial, metadata={"format": "pt", CONFIG_KEY: json.dumps(fields)})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _content(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content of config.json, tensors), checked."""
    class_name = getattr(type(model), "published_class_name", None)
    if class_name is None:
        raise WeightsError(
            f"only models that have a published_class_name can be saved, got: {type(model).__name__}"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise WeightsError(f"weights can only be saved in a floating-point dtype, got: {dtype}")
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    if unset := [key for key, tensor in state.items() if tensor.is_meta]:
        raise WeightsError(f"tensors on the meta device have no values to save: {first_few(unset)}")
    config: Any = model.config
    return {**config.to_dict(), **header(class_name)}, state


def _cast(tensor: Tensor, dtype: torch.dtype | None, device: str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _split(
    tensors: dict[str, Tensor], variant: str | None, max_shard_size: int | str
) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """(file name -> keys it holds, content of the index or None when one file holds everything)"""
    from huggingface_hub import split_torch_state_dict_into_shards  # lazy: importing it takes long

    pattern = weight_name(variant).replace(".safetensors", "{suffix}.safetensors")
    try:
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise WeightsError(f"max_shard_size must be bytes or a size such as '5GB': {error}") from error
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return split.filename_to_tensors, index if split.is_sharded else None


def _publish(scratch: Path, folder: Path, variant: str | None) -> None:
    """Move the finished files of `scratch` into `folder`, then remove the same variant's other files.

    Readers prefer an index to a single file, so an index comes last and an outdated one goes first.
    """
    indices = index_names(variant)
    names = sorted(file_names(scratch), key=lambda name: name in indices)
    old = [name for name in file_names(folder) if name in indices or is_weight_file(name, variant)]
    old.sort(key=lambda name: name not in indices)
    shards = set(names) - {CONFIG_NAME, weight_name(variant), *indices}
    if shards & set(old):  # the old index would lead to some old and some new shards while they are renamed
        for name in set(old) & set(indices):
            (folder / name).unlink()
    for name in names:
        (scratch / name).replace(folder / name)
    for name in old:
        if name not in names:
            (folder / name).unlink(missing_ok=True)
