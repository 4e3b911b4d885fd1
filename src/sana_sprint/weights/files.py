"""File names of a model folder, and its small JSON files."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
CONFIG_KEY = "config"  # in the metadata of a model in a single file
STEM = "diffusion_pytorch_model"
STEMS = (STEM, "model")  # the second is transformers', for the text encoder's folder
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
# The release whose folders ours are tested to equal. Written for readers; nothing checks it.
DIFFUSERS_VERSION = "0.42.1"

_SHOWN = 4  # names listed in a message before "..."
_VARIANT = re.compile(r"[A-Za-z0-9_-]+")
_WEIGHT_FILE = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(?:\.(?P<variant>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}}(?:\.(?P<older>[\w-]+))?)?\.safetensors"
)
# Contents that a failed download leaves under a file's name, by their first bytes.
_IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"),
    (b"<", "a web page, not the file itself: the download got an error or a login page"),
    (b"PK\x03\x04", "a zip archive, such as torch.save writes; pickled weights are never read"),
    (b"\x80", "a pickle; pickled weights are never read"),
)


class WeightsError(ValueError):
    """A model could not be found, read or written; the message names the folder or file and what is allowed."""


def check_variant(variant: str | None) -> None:
    """Raise `WeightsError` for a variant that cannot be a part of a file name."""
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise WeightsError(f"a variant is made of letters, digits, `_` and `-`, got: {variant!r}")


def weight_name(variant: str | None) -> str:
    """The file that holds all weights of a model which is not sharded."""
    return f"{STEM}.safetensors" if variant is None else f"{STEM}.{variant}.safetensors"


def index_names(variant: str | None) -> tuple[str, ...]:
    """Spellings of a shard index's name, the one that diffusers writes today first."""
    if variant is None:
        return (f"{STEM}.safetensors.index.json",)
    return (
        f"{STEM}.safetensors.index.{variant}.json",
        f"{STEM}.safetensors.{variant}.index.json",  # older diffusers; its shards end in `.{variant}.safetensors`
        f"{STEM}.{variant}.safetensors.index.json",  # the variant where the weight files have it
    )


def is_weight_file(name: str, variant: str | None) -> bool:
    """Whether `name` is a safetensors file, whole or shard, of a model of ours in `variant`."""
    match = _WEIGHT_FILE.fullmatch(name)
    return match is not None and match["stem"] == STEM and (match["variant"] or match["older"]) == variant


def available_variants(folder: str | os.PathLike[str]) -> tuple[str | None, ...]:
    """The variants whose safetensors files are in `folder`, sorted; None (first) stands for the plain files.

    Knows the names of diffusers' and of transformers' weight files.
    """
    matches = [match for name in file_names(Path(folder)) if (match := _WEIGHT_FILE.fullmatch(name))]
    found = {match["variant"] or match["older"] for match in matches}
    return tuple(sorted(found, key=lambda variant: variant or ""))


def file_names(folder: Path) -> list[str]:
    """Names of the files (not folders) in `folder`, sorted; none if it does not exist."""
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def first_few(names: Iterable[str]) -> str:
    """The first names for a message, with "..." in place of the others."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def impostor(path: Path) -> str | None:
    """Describes a file that should hold JSON or safetensors but does not, and the remedy; None if it is not recognised."""
    with path.open("rb") as file:
        head = file.read(32)
    return next((what for start, what in _IMPOSTORS if head.startswith(start)), None)


def header(class_name: str) -> dict[str, str]:
    """The fields with which diffusers recognises config.json and model_index.json."""
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `WeightsError` if it is absent or holds anything else."""
    if not path.is_file():
        raise WeightsError(
            f"no {path.name} in {path.parent}{'' if path.parent.is_dir() else ': no such folder'}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise WeightsError(f"{path} is {impostor(path) or f'not valid JSON: {error}'}") from error
    if not isinstance(fields, dict):
        raise WeightsError(f"{path} must hold one JSON object, got: {type(fields).__name__}")
    return fields


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object the way diffusers does: sorted keys, two spaces, a newline at the end."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
