"""The stages of training, one file each.

`STAGES` is the registry: a run's `stage` -> the module and the class that trains it. They are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_sprint.train.stages.base import Report, Stage

STAGES = {
    "autoencoder": "autoencoder:AutoencoderStage",
    "teacher": "teacher:TeacherStage",
    "adaptation": "adaptation:AdaptationStage",
    "student": "student:StudentStage",
    "control-teacher": "control:ControlTeacherStage",
    "control-student": "control:ControlStudentStage",
}


def make_stage(config: Any, *, report: Report) -> Stage:
    """The stage of a run, with its data and models loaded.

    Raises:
        ValueError: a folder or a source cannot be read, or does not fit.
    """
    module, name = STAGES[config.stage].split(":")
    stage: Stage = getattr(import_module(f"{__name__}.{module}"), name)(config, report=report)
    return stage
