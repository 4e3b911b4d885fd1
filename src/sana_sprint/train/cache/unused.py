"""Finds the cache files that no run reads, so that they can be deleted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.text_encoder import PromptEncoder, load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.cache.embeddings import embedding_files
from sana_sprint.train.cache.latents import captions_of, latent_files
from sana_sprint.train.cache.trajectories import TrajectoriesConfig, trajectory_files, trajectory_settings
from sana_sprint.train.config import (
    AnyRun,
    AutoencoderRun,
    ControlStudentRun,
    ControlTeacherRun,
    StudentRun,
    TeacherRun,
)
from sana_sprint.train.data import open_source
from sana_sprint.train.models.controlled import ConditionSource
from sana_sprint.train.stages.captions import FrozenTextRun, instructions
from sana_sprint.weights import load_model, resolve_folder

FOLDERS = ("latents", "embeddings", "trajectories")
_PART = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.partial-\d+")
_ABANDONED = 24 * 3600  # seconds since the last write, after which nobody is finishing a file


def unused_files(folder: Path, runs: Iterable[AnyRun]) -> list[Path]:
    """Files of the caches in this folder that none of the runs reads, and parts that were never finished.

    Only files that are named as the caches name theirs are looked at; a part that is younger than a day may be being
    written.

    Raises:
        ValueError: a run keeps its caches in another folder, its source or models cannot be read, or its captions
            cannot be known, because its latents are not all there.
    """
    used = {path.resolve() for run in runs for path in files_of_run(run, folder)}
    found = [path for name in FOLDERS for path in sorted((folder / name).glob("*")) if path.is_file()]
    oldest = time.time() - _ABANDONED
    return [
        path
        for path in found
        if (_PART.fullmatch(path.name) and path.resolve() not in used)
        or (_UNFINISHED.fullmatch(path.name) and path.stat().st_mtime < oldest)
    ]


def files_of_run(config: AnyRun, folder: Path) -> list[Path]:
    """The files in this folder that the run reads; errors as of `unused_files`."""
    if config.output.parent.resolve() != folder.resolve():
        raise ValueError(f"the run {config.output} has its caches in {config.output.parent}, not in {folder}")
    if isinstance(config, AutoencoderRun):
        return []
    if isinstance(config, TeacherRun):
        models = weights = config.autoencoder
    else:
        models = resolve_folder(str(config.teacher))
        weights = models / "vae"
    autoencoder = load_model(AutoencoderDC, weights, dtype=torch.float32)
    data = config.data
    source = open_source(data.source, max_bad=data.max_bad_fraction)
    latents, facts = latent_files(folder, source, data.num_samples, autoencoder, data.size)
    if isinstance(config, TeacherRun):
        return latents
    texts = _text_files(config, folder, latents, models) if config.cache_text else []
    name = _condition(config)
    if name is not None:
        multiple = autoencoder.spatial_compression_ratio
        conditions = ConditionSource(source, name, size=data.size, multiple=multiple)
        files, conditions_facts = latent_files(folder, conditions, data.num_samples, autoencoder)
        latents += files
        facts["conditions"] = str(conditions_facts)
    return latents + texts + _trajectory_files(config, folder, models, facts)


def _text_files(config: FrozenTextRun, folder: Path, latents: list[Path], models: Path) -> list[Path]:
    if not all(path.is_file() for path in latents):
        raise ValueError(
            f"the latents of the run {config.output} are not all there, so its captions are not known: "
            "start it once, or leave its text to be made again by cache_text = false"
        )
    captions = [text for texts in captions_of(latents) for text in texts]
    encoder = PromptEncoder(
        load_tokenizer(models / "tokenizer"), load_text_encoder(models / "text_encoder").requires_grad_(False)
    )
    return [
        path
        for instruction in instructions(config).values()
        for path in embedding_files(folder, captions, encoder, instruction=instruction)
    ]


def _trajectory_files(
    config: FrozenTextRun, folder: Path, models: Path, latents: Mapping[str, str]
) -> list[Path]:
    section = config.sections().get("trajectories") if isinstance(config, StudentRun) else None
    if not isinstance(config, StudentRun) or not isinstance(section, TrajectoriesConfig):
        return []
    teacher: list[nn.Module] = [
        load_model(SanaTransformer2DModel, models / "transformer", dtype=torch.float32)
    ]
    if isinstance(config, ControlStudentRun):
        teacher.append(load_model(SanaControlNetModel, config.controlnet, dtype=torch.float32))
    text_encoder = load_text_encoder(models / "text_encoder")
    settings = trajectory_settings(config, latents, text_encoder, *teacher)
    return trajectory_files(folder, section, settings)


def _condition(config: FrozenTextRun) -> str | None:
    if isinstance(config, ControlTeacherRun):
        return config.control.condition
    return config.condition if isinstance(config, ControlStudentRun) else None
