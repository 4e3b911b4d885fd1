"""The engine: one thread that owns the model, the queue in front of it, its jobs and its batches."""

from sana_sprint.serve.engine.batch import ModelFacts, Pipelines
from sana_sprint.serve.engine.job import Busy, Draining, ImageRequest, Job, ModelUnavailable, Result
from sana_sprint.serve.engine.queue import BatchReport, Engine

__all__ = [
    "BatchReport",
    "Busy",
    "Draining",
    "Engine",
    "ImageRequest",
    "Job",
    "ModelFacts",
    "ModelUnavailable",
    "Pipelines",
    "Result",
]
