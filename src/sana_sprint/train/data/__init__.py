"""Sources of training pictures: one stream of samples for every format."""

from sana_sprint.train.data.pictures import channels_last, fit, pictures
from sana_sprint.train.data.readers.base import Sample, Unreadable
from sana_sprint.train.data.source import VALIDATION_START, Source, open_source

__all__ = [
    "VALIDATION_START",
    "Sample",
    "Source",
    "Unreadable",
    "channels_last",
    "fit",
    "open_source",
    "pictures",
]
