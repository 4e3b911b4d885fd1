"""`sana-sprint serve`: one model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sana_sprint.cli import options
from sana_sprint.cli.common import checked
from sana_sprint.cli.loading import ModelOptions, choose_device, load_pair

if TYPE_CHECKING:
    from sana_sprint.serve.engine import Pipelines

SHUTDOWN_S = 30  # for requests in progress; uvicorn's limit, then the engine's

Host = Annotated[
    str,
    typer.Option("--host", help="Address to listen on. Addresses that other machines can reach need a key."),
]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="SANA_SPRINT_API_KEY",
        show_envvar=True,
        help="The key that clients must send. The variable is safer: other users can see a command's options.",
    ),
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", min=1, help="Waiting requests; further ones get a 429.")
]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Pictures drawn at once.")]
BatchWindow = Annotated[
    float, typer.Option("--batch-window", min=0, help="Milliseconds to wait for requests to draw together.")
]
IdleUnload = Annotated[
    float | None, typer.Option("--idle-unload", min=1, help="Unload the model after this many idle seconds.")
]
MaxPixels = Annotated[
    int,
    typer.Option(
        "--max-pixels", min=1, envvar="SANA_SPRINT_SERVE_MAX_PIXELS", help="Width times height of a picture."
    ),
]
MaxImages = Annotated[
    int, typer.Option("--max-n", min=1, envvar="SANA_SPRINT_SERVE_MAX_N", help="Pictures per request.")
]
MaxSteps = Annotated[
    int,
    typer.Option(
        "--max-steps", min=1, envvar="SANA_SPRINT_SERVE_MAX_STEPS", help="Network evaluations per picture."
    ),
]


def serve(
    model: options.Model = "emoji",
    host: Host = "127.0.0.1",
    port: Port = 7860,
    api_key: ApiKey = None,
    controlnet: options.ControlNet = None,
    max_queue: MaxQueue = 64,
    max_batch: MaxBatch = 16,
    batch_window: BatchWindow = 5.0,
    idle_unload: IdleUnload = None,
    max_pixels: MaxPixels = 2**22,
    max_n: MaxImages = 10,
    max_steps: MaxSteps = 20,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    vae_tiling: options.VaeTiling = False,
    vae_slicing: options.VaeSlicing = False,
    fast: options.Fast = True,
) -> None:
    """Serve a model over HTTP: OpenAI's images API, jobs with progress, and metrics.

    Example: sana-sprint serve --port 7860

    Then: curl localhost:7860/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "a cat"}'
    """
    import uvicorn

    from sana_sprint.serve.app import create_app
    from sana_sprint.serve.engine import Engine
    from sana_sprint.serve.settings import check_bind, make_settings

    checked(lambda: check_bind(host, api_key), hint="give --api-key, or leave --host out")
    settings = checked(
        lambda: make_settings(
            model=serving_name(model),
            api_key=api_key,
            max_pixels=max_pixels,
            max_n=max_n,
            max_steps=max_steps,
            drain_s=SHUTDOWN_S,
        ),
        hint="see `sana-sprint serve --help`, and the variables SANA_SPRINT_SERVE_...",
    )
    wanted = ModelOptions(model, dtype, choose_device(device), vae_tiling, vae_slicing, fast=fast)
    engine = Engine(
        lambda: load_pipelines(wanted, controlnet),
        max_queue=max_queue,
        max_batch=max_batch,
        batch_window_s=batch_window / 1000,
        idle_unload_s=idle_unload,
    )
    typer.echo(f"serving {settings.model} on {address(host, port)} (Ctrl-C to stop)", err=True)
    # The access log would put a line per picture between the messages that matter.
    uvicorn.run(
        create_app(engine, settings),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def load_pipelines(wanted: ModelOptions, controlnet: Path | None = None) -> Pipelines:
    """The pipelines of a model: from text; and following pictures, if it has a ControlNet or one is given."""
    from sana_sprint.serve.engine import Pipelines

    return Pipelines(*load_pair(wanted, controlnet))


def address(host: str, port: int) -> str:
    """As browsers take it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"  # IPv6


def serving_name(model: str) -> str:
    """The model's name for clients: a folder's own name, anything else as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
