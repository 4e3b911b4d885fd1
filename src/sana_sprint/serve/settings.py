"""The limits of a server. All of them hold before a request reaches the queue."""

import ipaddress
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """How the server presents itself and what it accepts.

    What is not given is read from the environment: SANA_SPRINT_SERVE_MAX_BODY_BYTES and so on.

    model: its name in `/v1/models`, in answers and in PNG files.
    api_key: what clients must send as `Authorization: Bearer ...`. None is for loopback only.
    max_pixels: width times height of a picture.
    max_n, max_steps, max_prompt_chars: of a request.
    max_body_bytes: of a request's body, files included.
    max_upload_pixels: of a picture sent to the server, checked before it is decoded.
    max_kept_bytes: memory for ended jobs of the jobs API; those not asked for the longest are dropped first.
    keep_jobs_s: how long an ended job can be fetched.
    drain_s: how long what is in the queue may take at shutdown.
    """

    model_config = SettingsConfigDict(
        env_prefix="SANA_SPRINT_SERVE_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    model: str = "emoji"
    api_key: SecretStr | None = None
    default_steps: Count = 2
    max_pixels: Count = 2**22
    max_n: Count = 10
    max_steps: Count = 20
    max_prompt_chars: Count = 4000
    max_body_bytes: Count = 20 * 2**20
    max_upload_pixels: Count = 2**24
    max_kept_bytes: Count = 2**29
    keep_jobs_s: Seconds = 600.0
    drain_s: Seconds = 30.0

    @field_validator("api_key")
    @classmethod
    def _key_fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        text = None if key is None else key.get_secret_value()
        if text is not None and not (text.isascii() and text.strip()):
            raise ValueError("the API key must be made of ASCII characters and not be empty")
        return key


def make_settings(**values: object) -> Settings:
    """Settings of these values and the environment's; raises ValueError with one line for the first that is wrong."""
    try:
        return Settings(**values)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}") from None


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
