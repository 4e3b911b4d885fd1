"""Resolves a model's name: the embedded model, a folder on this machine, or a model of the Hugging Face Hub."""

import os
import re
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path

from sana_sprint.weights.files import STEMS, WeightsError, available_variants, check_variant

EMBEDDED_MODELS = ("emoji",)

# `owner/name`, the Hub's rules: letters, digits, `-`, `_`, `.`; no part starts or ends with `-` or `.`.
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_HUB_PART}/{_HUB_PART}")
# Configs, tokenizers and shard indices. Weights are named one by one, so that neither pickles nor the other variants
# of a repository (each as large as the model itself) are fetched.
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*tokenizer.model")


def resolve_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that holds a model, downloaded first if it is on the Hub.

    Tried in this order: the name of an embedded model (`"emoji"`; write `"./emoji"` for a folder of that name), a
    folder on this machine (`~` is expanded), a Hub id `owner/name`. A `Path` is always a folder.

    From the Hub come only configs, tokenizers and the safetensors files of `variant`; a component that lacks the
    variant comes as its plain files, as the published repositories mix them. `revision` is a branch, tag or commit;
    `cache_dir`, `token` and `local_files_only` are huggingface_hub's.

    Raises `WeightsError`: no such name or folder, a revision for something that is not on the Hub, a variant that
    no component has, or a download that failed (offline, not found, gated), with the reason and the remedy.
    """
    check_variant(variant)
    is_name = isinstance(name_or_path, str)
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    is_embedded = is_name and name in EMBEDDED_MODELS
    if is_embedded or (name and folder.is_dir()):
        if revision is not None:
            raise WeightsError(
                f"only a Hub model has revisions, {name!r} is on this machine; got: {revision!r}"
            )
        return _embedded_folder(name) if is_embedded else folder
    if folder.is_file():
        raise WeightsError(f"a model is a folder with config.json and safetensors, this is a file: {name}")
    if not is_name or not is_hub_id(name):
        raise WeightsError(
            f"no such model: {name!r}. Allowed: {', '.join(map(repr, EMBEDDED_MODELS))} (comes with this package), "
            "a folder that exists, or a Hugging Face id 'owner/name'"
        )
    return _download(
        name,
        variant,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )


def _embedded_folder(name: str) -> Path:
    folder = Path(str(resources.files("sana_sprint"))) / "embedded" / name
    if not folder.is_dir():
        raise WeightsError(f"this installation lacks the embedded model {name!r}: no folder {folder}")
    return folder


def _download(
    repo_id: str,
    variant: str | None,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    fetch = partial(
        download,
        repo_id,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    patterns = [*_SMALL_FILES, *_weight_patterns(variant)]
    folder = fetch(patterns)
    if variant is not None and (plain := _parts_without(variant, folder, repo_id)):
        # One call for everything: a branch that moved in between must not give two halves in two folders.
        folder = fetch([*patterns, *_weight_patterns(None, plain)])
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name` of the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def download(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a Hub repository's files that match one of `patterns`, downloaded if they are not in the cache.

    Raises `WeightsError` with the reason (offline, not found, gated) and the remedy.
    """
    from huggingface_hub import snapshot_download  # lazy: offline use never needs it

    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=list(patterns),
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                token=token,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # the Hub's client raises its HTTP library's, the system's and its own kinds
        raise WeightsError(_hub_failure(repo_id, revision, error)) from error


def _weight_patterns(variant: str | None, folders: Sequence[str] = ("", "*/")) -> list[str]:
    """Glob patterns of the safetensors files of one variant in `folders` ("" or ending in "/")."""
    shard = "-?????-of-?????"
    dotted = "" if variant is None else f".{variant}"
    # A set, since without a variant the two spellings of a shard are one.
    endings = sorted(
        {f"{dotted}.safetensors", f"{dotted}{shard}.safetensors", f"{shard}{dotted}.safetensors"}
    )
    return [f"{folder}{stem}{ending}" for folder in folders for stem in STEMS for ending in endings]


def _parts_without(variant: str, folder: Path, repo_id: str) -> list[str]:
    """Components (folders with a config.json, as "name/" or "") of a snapshot that do not have `variant`."""
    parts = sorted({path.parent for path in (*folder.glob("config.json"), *folder.glob("*/config.json"))})
    without = [part for part in parts if variant not in available_variants(part)]
    if without == parts:
        raise WeightsError(f"no component of {repo_id} has safetensors files of the variant {variant!r}")
    return ["" if part == folder else f"{part.name}/" for part in without]


def _hub_failure(repo_id: str, revision: str | None, error: Exception) -> str:
    """One line on why a download failed, and the remedy."""
    from huggingface_hub import errors

    what = f"{repo_id} (revision {revision})" if revision else repo_id
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms on huggingface.co/{repo_id}, then log in or pass `token`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{what} is neither a folder here nor a model on huggingface.co (a private one needs `token`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit: {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{what} is not a folder here, not complete in the local cache, and the Hub is out of reach or switched "
            "off (`local_files_only`, HF_HUB_OFFLINE): go online once, or pass the path of a folder"
        )
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{what} could not be downloaded: {type(error).__name__}: {first_line}"
