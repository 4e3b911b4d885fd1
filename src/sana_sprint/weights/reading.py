"""Loads a model from its folder: complete and checked, or one clear error."""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sana_sprint.weights.files import (
    CONFIG_KEY,
    CONFIG_NAME,
    PICKLES,
    WeightsError,
    available_variants,
    check_variant,
    file_names,
    first_few,
    impostor,
    index_names,
    read_json,
    weight_name,
)


class _Config(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class _ConfigClass(Protocol):
    def from_dict(self, fields: dict[str, Any], /) -> _Config: ...


ModelT_co = TypeVar("ModelT_co", bound=nn.Module, covariant=True)


class ModelClass(Protocol[ModelT_co]):
    """A model class that can be loaded and saved: its published name and its config."""

    @property
    def published_class_name(self) -> str: ...  # `_class_name` in config.json
    @property
    def config_class(self) -> _ConfigClass: ...
    def __call__(self, config: Any, /) -> ModelT_co: ...


def load_model(
    cls: ModelClass[ModelT_co],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> ModelT_co:
    """The model in `folder`, complete and in eval mode, or a `WeightsError`.

    Floating-point tensors are cast to `dtype` one by one (None keeps the file's types). Where neither type nor device
    changes, parameters are copy-on-write views of the memory-mapped file: loading reads nothing yet, and changing a
    parameter does not change the file, but another program must not overwrite the file in place while the model lives
    (`save_model` never does). All buffers must be in the files.

    Raises `WeightsError` naming the folder and file: config.json absent, for another class or with unknown fields;
    variant absent (those that exist are listed); only pickles; a file truncated or not safetensors; a missing shard;
    keys missing, unexpected or of another shape; a device that does not work here.
    """
    folder = Path(folder)
    check_variant(variant)
    config = folder / CONFIG_NAME
    fields = read_json(config)
    listing, files = _weight_files(folder, variant)
    return _assembled(cls, fields, config, listing, files, dtype=dtype, device=device)


def load_single_file(
    cls: ModelClass[ModelT_co],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> ModelT_co:
    """The model in one file of `save_single_file`, which holds its config too; otherwise as `load_model`."""
    path = Path(path)
    with open_safetensors(path) as reader:
        metadata = reader.metadata() or {}
    if CONFIG_KEY not in metadata:
        raise WeightsError(f"{path} holds no config: it was not written by save_single_file")
    fields = json.loads(metadata[CONFIG_KEY])
    return _assembled(cls, fields, path, path, [path], dtype=dtype, device=device)


def _assembled(
    cls: ModelClass[ModelT_co],
    fields: dict[str, Any],
    config_path: Path,
    listing: Path,
    files: list[Path],
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> ModelT_co:
    """The model that the config's fields describe, with the files' tensors; `config_path` and `listing` are for messages."""
    if dtype is not None and not dtype.is_floating_point:
        raise WeightsError(f"weights can only be loaded in a floating-point dtype, got: {dtype}")
    device = _usable_device(device)
    config = _checked_config(cls, fields, config_path)
    try:
        with torch.device("meta"):  # no memory, time or random numbers for values that files replace
            model = cls(config)
    except ValueError as error:
        raise WeightsError(
            f"{config_path} does not describe a {cls.published_class_name}: {error}"
        ) from error

    with ExitStack() as stack:
        readers = _Readers((path, stack.enter_context(open_safetensors(path))) for path in files)
        readers.check_fits(model, listing)
        state = {key: _placed(reader.get_tensor(key), dtype, device) for key, reader in readers.items()}
    model.load_state_dict(state, strict=True, assign=True)
    unset = [key for key, tensor in model.named_buffers() if tensor.is_meta]
    assert not unset, f"a model's buffers must be in its files, these are not: {unset}"
    return model.to(device).eval()


class _Readers(dict[str, Any]):
    """Key -> open safetensors file that holds it, over all files of one model."""

    def __init__(self, opened: Iterable[tuple[Path, Any]]) -> None:
        super().__init__()
        for path, reader in opened:
            if twice := [key for key in reader.keys() if key in self]:  # noqa: SIM118  (not a mapping)
                raise WeightsError(f"{path} repeats keys of another shard: {first_few(twice)}")
            self.update(dict.fromkeys(reader.keys(), reader))

    def check_fits(self, model: nn.Module, listing: Path) -> None:
        """Raise one error with every difference between the files and the model, before any tensor is read."""
        wanted = model.state_dict()
        differences = {
            "missing": [key for key in wanted if key not in self],
            "unexpected": [key for key in self if key not in wanted],
            "of another shape or kind": [
                difference
                for key in wanted
                if key in self and (difference := _difference(key, wanted[key], self[key].get_slice(key)))
            ],
        }
        found = [f"{len(keys)} {kind}: {first_few(keys)}" for kind, keys in differences.items() if keys]
        if found:
            raise WeightsError(
                f"{listing} does not fit {CONFIG_NAME} in {listing.parent} "
                f"({type(model).__name__}, {len(wanted)} tensors): {'; '.join(found)}"
            )


def _difference(key: str, wanted: Tensor, stored: Any) -> str:
    shape, kind = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(wanted.shape):
        return f"{key} is {shape}, the model's {tuple(wanted.shape)}"
    if wanted.is_floating_point() != kind.startswith(("F", "BF")):
        return f"{key} is {kind}, the model's {wanted.dtype}"
    return ""


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without that kind of device
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"device {str(device)!r} does not work here: {reason}") from error
    if device.type == "meta":
        raise WeightsError("device 'meta' holds no weights; use a device such as 'cpu' or 'cuda'")
    return device


def _checked_config(cls: ModelClass[nn.Module], fields: dict[str, Any], path: Path) -> _Config:
    name = fields.get("_class_name", cls.published_class_name)
    if name != cls.published_class_name:
        raise WeightsError(f"{path} describes a {name!r}, expected: {cls.published_class_name!r}")
    try:
        return cls.config_class.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _weight_files(folder: Path, variant: str | None) -> tuple[Path, list[Path]]:
    """(the file to name in messages, the files that hold the weights). As in diffusers an index goes first."""
    for name in index_names(variant):
        if (path := folder / name).is_file():
            return path, _shards(path)
    single = folder / weight_name(variant)
    if single.is_file():
        return single, [single]
    raise WeightsError(
        f"{folder} has neither {single.name} nor an index of its shards; {_what_is_there(folder)}"
    )


def _what_is_there(folder: Path) -> str:
    names = file_names(folder)
    if safetensors := [name for name in names if name.endswith(".safetensors")]:
        variants = ", ".join(map(repr, available_variants(folder))) or "none"
        return f"variants there: {variants}; files there: {first_few(safetensors)}"
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        return f"only pickles, which are never read: {first_few(pickles)}; get or convert it to safetensors"
    return "it has no safetensors files"


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no `weight_map` from keys to files")
    names = sorted(set(map(str, weight_map.values())))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise WeightsError(
            f"{index} may only name .safetensors files of its own folder, got: {first_few(strange)}"
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"{index} lists {len(names)} shards, {len(missing)} missing: {first_few(missing)}")
    return [index.parent / name for name in names]


def open_safetensors(path: Path) -> Any:
    """A reader of a safetensors file, a context manager. Raises `WeightsError` saying why it cannot be read."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        what = impostor(path) or f"truncated or not safetensors ({path.stat().st_size} bytes): {error}"
        raise WeightsError(f"{path} is {what}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
