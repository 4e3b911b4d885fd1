"""What a server allows. All limits hold before a request reaches the queue."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the server presents itself and what it accepts.

    model: its name in `/v1/models`, in answers and in PNG files.
    api_key: what clients must send as `Authorization: Bearer ...`. None is for loopback only.
    max_pixels: width times height of a picture.
    max_n, max_steps, max_prompt_chars: of a request.
    max_body_bytes: of a request's body, files included.
    max_upload_pixels: of a picture sent to the server, checked before it is decoded.
    max_kept_pictures: results of the jobs API that wait to be fetched; the oldest are dropped first.
    keep_jobs_s: how long an ended job can be fetched.
    drain_s: how long what is in the queue may take at shutdown.
    """

    model: str = "emoji"
    api_key: str | None = None
    default_steps: int = 2
    max_pixels: int = 2**22
    max_n: int = 10
    max_steps: int = 20
    max_prompt_chars: int = 4000
    max_body_bytes: int = 20 * 2**20
    max_upload_pixels: int = 2**24
    max_kept_pictures: int = 128
    keep_jobs_s: float = 600.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("the API key must be made of ASCII characters and not be empty")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, api_key: str | None) -> None:
    """Raise ValueError for an address that others can reach without an API key."""
    if api_key is None and not is_loopback(host):
        raise ValueError(f"serving on {host}, which other machines can reach, needs an API key")
