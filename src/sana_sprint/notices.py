"""Warnings in the log that are given once in a process."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log `message` as a warning, the first time only."""
    logger.warning(message)
