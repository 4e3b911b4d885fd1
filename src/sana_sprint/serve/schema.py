"""The fields of requests. OpenAI's own fields that have no meaning here are accepted where ignoring them is harmless,
and refused where the client would not get what it asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sana_sprint.controls import BUILT_IN
from sana_sprint.noise import MAX_SEED
from sana_sprint.serve.engine.job import ImageRequest
from sana_sprint.serve.errors import ApiError
from sana_sprint.serve.settings import Settings

OutputFormat = Literal["png", "jpeg", "webp"]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
if TYPE_CHECKING:
    ControlKind = str
else:
    ControlKind = Literal[tuple(BUILT_IN)]  # the other kinds may fetch an annotator's weights
RANDOM_SEED = -1
LARGEST_SEED = MAX_SEED - 2**20  # picture i has seed + i, and no request has so many


class Generation(BaseModel):
    """Body of `/v1/images/generations`. Everything but `prompt` may be left out."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the model's own")
    steps: int | None = Field(None, ge=1, description="network evaluations; 1 to 4 are best")
    guidance_scale: Scale | None = None
    seed: int | None = Field(
        None, ge=RANDOM_SEED, le=LARGEST_SEED, description="picture i has seed + i; -1: random"
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url: a data: URL")
    output_format: OutputFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")

    # Accepted and without effect.
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    # Accepted only where they ask for what happens anyway.
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    negative_prompt: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("must not have half a surrogate pair") from None
        return prompt

    @field_validator("size")
    @classmethod
    def _size_form(cls, size: str | None) -> str | None:
        if size is not None and size != "auto" and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
            raise ValueError(f"must be WIDTHxHEIGHT in pixels, or auto; got: {size[:40]!r}")
        return size

    def check(self, settings: Settings) -> None:
        """Raise ApiError 400 or 404 for what this server does not do. To be called before anything of a field's size is made."""
        if self.model not in (None, settings.model):
            message = f"there is no model {self.model[:80]!r} here, only {settings.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        if not self.prompt.strip():
            raise ApiError(400, "prompt must not be empty", code="empty_prompt", param="prompt")
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            message = "output_compression is for jpeg and webp; a png is always exact"
            raise ApiError(400, message, code="invalid_value", param="output_compression")
        width, height = self._sides()
        for param, value, limit, unit in (
            ("prompt", len(self.prompt), settings.max_prompt_chars, " characters"),
            ("n", self.n or 1, settings.max_n, ""),
            ("steps", self.steps or settings.default_steps, settings.max_steps, ""),
            ("size", (width or 0) * (height or 0), settings.max_pixels, " pixels"),
        ):
            if value > limit:
                message = f"{param} may be at most {limit}{unit}, got: {_shown(value)}"
                raise ApiError(400, message, code="over_limit", param=param)

    def request(self, settings: Settings, **image: Any) -> ImageRequest:
        """The engine's request, after `check`."""
        self.check(settings)
        width, height = self._sides()
        return ImageRequest(
            prompt=self.prompt,
            steps=self.steps or settings.default_steps,
            guidance_scale=self.guidance_scale,
            seed=None if self.seed == RANDOM_SEED else self.seed,
            n=self.n or 1,
            height=height,
            width=width,
            **image,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        """(width, height)"""
        if self.size is None or self.size == "auto":
            return None, None
        width, height = self.size.split("x")
        return int(width), int(height)


def _shown(number: int) -> str:
    """A number in an error message; JSON may have thousands of digits."""
    return str(number) if number < 10**20 else "a number of more than 20 digits"


class Control(BaseModel):
    """How a condition image is used; further fields of edits and jobs."""

    control_kind: ControlKind = "scribble"
    control_scale: Scale = 1.0

    def with_image(self, image: np.ndarray | None) -> dict[str, Any]:
        """The engine's arguments; none without an image."""
        if image is None:
            return {}
        return {"image": image, "control_kind": self.control_kind, "control_scale": self.control_scale}


class Edit(Generation, Control):
    """Fields of `/v1/images/edits` beside its `image`."""

    input_fidelity: str | None = None  # without effect


class JobRequest(Generation, Control):
    """Body of `/v1/jobs`: a generation, or with an `image` an edit."""

    image: str | None = Field(None, description="base64 of a PNG, JPEG or WebP file, or a data: URL of one")
