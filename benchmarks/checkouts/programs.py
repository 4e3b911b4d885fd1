"""Items on programs: the commands, the server, and the emoji recipe's pictures and judge."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from checkouts import fixtures
from checkouts.pipelines import PROMPTS
from checkouts.record import Record, command, item, succeed

# ----- commands -------------------------------------------------------------------------------------------------------


@item("command/generate")
def command_generate(record: Record) -> None:
    record.note("lines", succeed("generate", *PROMPTS, "-n", 2, "--seed", 7, "-o", "drawn"))
    out = succeed(
        "generate", "a red heart", "--seed", 3, "--steps", 4, "--guidance", 5, "--size", "160x96", "--json"
    )
    record.note("json", json.loads(out))
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    more = (
        "--file",
        "prompts.txt",
        "-s",
        9,
        "-o",
        "filed",
        "--steps",
        1,
        "--max-timesteps",
        1.5,
        "--dtype",
        "fp32",
    )
    record.note("file", succeed("generate", *more, "--vae-tiling", "--vae-slicing"))
    lora = f"{fixtures.FOLDER / 'peft.safetensors'}:0.5"
    record.note("lora", command("generate", "a star", "-s", 1, "-o", "lora.png", "--lora", lora)[0])
    succeed("generate", "a star", "-s", 1, "-o", "int8.png", "--quantize", "int8")
    for folder in ("drawn", "filed", "out"):
        record.note_folder(folder, Path(folder))
    with Image.open("lora.png") as picture:
        record.note("lora.png", picture.copy())
    record.note("int8.png", Path("int8.png"))


@item("command/control")
def command_control(record: Record) -> None:
    for name in ("sketch.png", "photo.png"):
        shutil.copy(fixtures.FOLDER / "pictures" / name, name)
    for kind, picture in (("scribble", "sketch.png"), ("canny", "photo.png"), ("none", "photo.png")):
        out = f"control-{kind}"
        words = ("a red heart", "--image", picture, "--kind", kind, "--seed", 5, "-n", 2, "-o", out)
        record.note(kind, succeed("control", *words, "--preview", f"{out}.png", "--scale", 0.8, "--end", 0.7))
        record.note_folder(out, Path(out))
        record.note(f"{out}: seen", Path(f"{out}.png"))


@item("command/info")
def command_info(record: Record) -> None:
    for name, value in json.loads(succeed("info", "emoji", "--json")).items():
        record.note(name, value)


@item("command/export")
def command_export(record: Record) -> None:
    succeed("export", "emoji", "exported", "--dtype", "fp32")
    record.note_folder("folder", Path("exported"))
    succeed("export", "emoji", "transformer.safetensors", "--dtype", "bf16")
    succeed("export", "emoji", "vae.safetensors", "--component", "vae")
    record.note("transformer", Path("transformer.safetensors"))
    record.note("vae", Path("vae.safetensors"))


@item("command/demo")
def command_demo(record: Record) -> None:
    succeed("demo", "-o", "demo")
    record.note_folder("demo", Path("demo"))


@item("command/evaluate")
def command_evaluate(record: Record) -> None:
    """The judge's verdicts on the embedded model's pictures."""
    words = ("evaluate", "compositional", "--count", 16, "--steps", 1, "--steps", 2, "--json")
    record.note("scores", json.loads(succeed(*words)))


# ----- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of the embedded model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "sana_sprint", "serve", "--port", str(port)]
    with Path("server.txt").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/ready").close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended: {Path('server.txt').read_text()[-2000:]}"
                    ) from None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def post(address: str, body: bytes, kind: str) -> dict[str, Any]:
    request = urllib.request.Request(address, body, {"content-type": kind})
    with urllib.request.urlopen(request) as answer:
        made: dict[str, Any] = json.load(answer)
    return made


def multipart(fields: dict[str, str], picture: bytes) -> tuple[bytes, str]:
    """A form's body with a file `image`, and its content type."""
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    head = (
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    body = b"".join(b"--seam\r\n" + part + b"\r\n" for part in (*parts, head + picture)) + b"--seam--\r\n"
    return body, "multipart/form-data; boundary=seam"


def note_answer(record: Record, name: str, answer: dict[str, Any]) -> None:
    for i, entry in enumerate(answer["data"]):
        picture = Image.open(io.BytesIO(base64.b64decode(entry.pop("b64_json"))))
        record.note(f"{name} {i}", picture)
        record.note(f"{name} {i}: settings", getattr(picture, "text", {}))
        record.note(f"{name} {i}: entry", entry)


@item("serve")
def serve(record: Record) -> None:
    cases: dict[str, dict[str, Any]] = {
        "one": {"seed": 1},
        "three": {"seed": 5, "n": 3, "steps": 4, "guidance_scale": 5.0},
        "size": {"seed": 2, "size": "160x96", "steps": 1},
        "jpeg": {"seed": 3, "output_format": "jpeg", "output_compression": 80},
    }
    sketch = (fixtures.FOLDER / "pictures" / "sketch.png").read_bytes()
    with server() as address:
        for name, fields in cases.items():
            body = json.dumps({"prompt": PROMPTS[0], "response_format": "b64_json", **fields}).encode()
            note_answer(record, name, post(f"{address}/v1/images/generations", body, "application/json"))
        form = {"prompt": PROMPTS[0], "seed": "4", "control_kind": "scribble", "n": "2"}
        note_answer(record, "edit", post(f"{address}/v1/images/edits", *multipart(form, sketch)))


# ----- the emoji recipe -----------------------------------------------------------------------------------------------


@item("recipe/emoji")
def recipe(record: Record) -> None:
    from recipes.emoji import scenes, sketches

    for source in (scenes.training_scene, scenes.training_pair, sketches.training_scene):
        for index in (0, 1, 17, 1000, 123_456):
            pixels, captions = source(index)
            name = f"{source.__module__}.{source.__name__} {index}"
            record.note(name, pixels)
            record.note(f"{name}: captions", list(captions))
    pixels = np.asarray(scenes.training_picture(3))
    record.note("picture", pixels)
    record.note("condition", sketches.condition(pixels, 3))
