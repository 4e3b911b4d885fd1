"""The engine: batches equal singles, nobody disturbs others, the queue is bounded, and it survives what fails."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from sana_sprint.precision import NonFiniteError
from sana_sprint.serve.engine import (
    Busy,
    Draining,
    Engine,
    ImageRequest,
    ModelUnavailable,
    Pipelines,
)
from sana_sprint.serve.engine.batch import PromptCache
from sana_sprint.serve.engine.job import Job
from tests.helpers.serve import WAIT_S, assert_close, emoji, result_of, running_engine, watched_network

POISON = 99.0  # a guidance scale that tests give to the request that is to fail
SKETCH = np.full((20, 30, 3), 255, dtype=np.uint8)


def wait_for_state(engine: Engine, state: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while engine.state != state:
        assert time.monotonic() < deadline, f"the engine is {engine.state}, not {state}"
        time.sleep(0.005)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"n": 0},
        {"n": 1.5},
        {"width": 0},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"control_scale": float("inf")},
        {"seed": -1},
        {"control_kind": "photo"},
        {"seed": 2**64 - 1, "n": 2},
        {"prompt": 3},
        {"image": SKETCH[..., 0]},
        {"image": SKETCH.astype(float)},
    ],
)
def test_bad_arguments_are_refused_before_there_is_a_job(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).removeprefix("control_")):
        ImageRequest(**{"prompt": "a cat", **wrong})


def test_random_seeds_differ_between_processes() -> None:
    """In every new process torch's global generator is the same."""
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)
        seeds.append(Job(ImageRequest("a cat", n=2)).seeds)
    assert seeds[0] != seeds[1]  # alike once in 2**32 runs


def test_requests_of_one_shape_are_one_batch_of_the_same_pictures() -> None:
    requests = [
        ImageRequest("a cat", seed=5),
        ImageRequest("two apples on a blue background", seed=8, n=2, guidance_scale=3.0),
        ImageRequest("a red heart", height=128, width=128, seed=1),  # the native size by its number
    ]
    with watched_network() as network, running_engine() as engine:
        network.hold()
        first = engine.submit(ImageRequest("a dog", seed=0))
        network.wait_until_entered()
        jobs = [engine.submit(request) for request in requests]
        network.go_on()
        results = [result_of(job) for job in [first, *jobs]]
        assert network.batches == [1, 4]
    for request, result in zip(requests, results[1:], strict=True):
        alone = emoji()(
            request.prompt,
            1,
            seed=request.seed,
            num_images_per_prompt=request.n,
            guidance_scale=4.5 if request.guidance_scale is None else request.guidance_scale,
        )
        assert result.seeds == alone.seeds
        assert result.times == alone.times
        for picture, expected in zip(result.images, alone.images, strict=True):
            assert_close(picture, expected)


def test_other_shapes_wait_for_their_turn_and_large_requests_are_split() -> None:
    with watched_network() as network, running_engine(max_batch=3) as engine:
        network.hold()
        jobs = [engine.submit(ImageRequest("a dog", seed=0))]
        network.wait_until_entered()
        jobs += [
            engine.submit(ImageRequest("a cat", seed=0, n=5)),
            engine.submit(ImageRequest("a cat", seed=0, height=64, width=128)),
            engine.submit(ImageRequest("a cat", seed=0, n=2)),
        ]
        network.go_on()
        results = [result_of(job) for job in jobs]
        assert network.batches == [1, 3, 2, 1, 2]  # five in two parts, then the other size, then the rest
    assert results[1].seeds == (0, 1, 2, 3, 4)
    assert results[2].images[0].size == (128, 64)
    assert_close(results[1].images[1], results[3].images[1])


def test_a_full_queue_refuses_and_a_cancelled_job_makes_room() -> None:
    with watched_network() as network, running_engine(max_queue=1) as engine:
        network.hold()
        engine.submit(ImageRequest("a dog"))
        network.wait_until_entered()
        waiting = engine.submit(ImageRequest("a cat"))
        with pytest.raises(Busy) as refusal:
            engine.submit(ImageRequest("a cat"))
        assert refusal.value.retry_after_s >= 1
        assert waiting.cancel()
        assert (waiting.status, engine.queued) == ("cancelled", 0)
        another = engine.submit(ImageRequest("a cat"))
        network.go_on()
        assert len(result_of(another).images) == 1
        assert network.batches == [1, 1]  # the cancelled one was never drawn


def test_cancelling_one_job_of_a_batch_leaves_the_others_alone() -> None:
    with watched_network() as network, running_engine(batch_window_s=10.0, max_batch=2) as engine:
        network.hold()
        stays = engine.submit(ImageRequest("a cat", steps=2, seed=3))
        leaves = engine.submit(ImageRequest("a dog", steps=2, seed=4))
        network.wait_until_entered()
        assert leaves.cancel()
        network.go_on()
        result = result_of(stays)
        assert network.batches == [2, 2]
    assert (stays.status, leaves.status) == ("done", "cancelled")
    assert_close(result.images[0], emoji()("a cat", 2, seed=3).images[0])


def test_nobody_waiting_stops_the_steps() -> None:
    with watched_network() as network, running_engine() as engine:
        network.hold()
        job = engine.submit(ImageRequest("a cat", steps=4))
        network.wait_until_entered()
        job.cancel()
        network.go_on()
        result_of(engine.submit(ImageRequest("a dog")))
        assert len(network.batches) == 2  # one of the four, then the next job's


def test_nobody_waiting_stops_the_decoder_between_tiles() -> None:
    tiles = []
    pipeline = emoji()
    pipeline.enable_vae_tiling(tile_size=64, overlap=0)
    with running_engine() as engine:
        jobs = []

        def on_tile(*_: object) -> None:
            tiles.append(1)
            jobs[0].cancel()

        handle = pipeline.vae.decoder.register_forward_hook(on_tile)
        try:
            with watched_network() as network:
                network.hold()
                jobs.append(engine.submit(ImageRequest("a cat")))
                network.go_on()
                with pytest.raises(CancelledError):
                    result_of(jobs[0])
                engine.close()
        finally:
            handle.remove()
            pipeline.disable_vae_tiling()
    assert jobs[0].status == "cancelled"
    assert len(tiles) == 1  # of four


def test_a_picture_that_is_not_finite_fails_alone() -> None:
    def spoil(output: torch.Tensor, guidance: torch.Tensor) -> None:
        output[guidance == POISON] = float("nan")

    with watched_network(spoil), running_engine(batch_window_s=10.0, max_batch=3) as engine:
        jobs = [engine.submit(ImageRequest("a cat", seed=1, guidance_scale=g)) for g in (4.0, POISON, 5.0)]
        for job in (jobs[0], jobs[2]):
            assert len(result_of(job).images) == 1
        with pytest.raises(NonFiniteError, match="step 1 of 1"):
            result_of(jobs[1])
        assert [job.status for job in jobs] == ["done", "failed", "done"]


def test_out_of_memory_fails_that_request_only() -> None:
    failures = [MemoryError("out of memory")]

    def fail_once(*_: object) -> None:
        if failures:
            raise failures.pop()

    with watched_network(fail_once), running_engine() as engine:
        with pytest.raises(MemoryError):
            result_of(engine.submit(ImageRequest("a cat")))
        assert engine.state == "ready"
        assert len(result_of(engine.submit(ImageRequest("a cat"))).images) == 1


def test_prompts_are_encoded_once_and_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encoder = emoji().prompt_encoder
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda prompts, **settings: encoded.extend(prompts) or encode(prompts, **settings)
    )
    cache = PromptCache(2)
    assert len(cache(emoji(), ["a cat", "a dog", "a cat"])) == 3
    assert encoded == ["a cat", "a dog"]
    cache(emoji(), ["a cat"])
    cache(emoji(), ["a bird"])  # pushes out the dog, which was used longest ago
    cache(emoji(), ["a cat"])
    assert encoded == ["a cat", "a dog", "a bird"]
    cache(emoji(), ["a dog"])
    assert encoded[-1] == "a dog"
    assert len(cache(emoji(), ["1", "2", "3"])) == 3  # a batch may need more than is kept


def test_an_idle_model_is_freed_and_comes_back() -> None:
    loaded: list[weakref.ref[Any]] = []

    def load() -> Pipelines:
        pipelines = Pipelines(emoji())
        loaded.append(weakref.ref(pipelines))
        return pipelines

    with running_engine(load, idle_unload_s=0.05) as engine:
        result_of(engine.submit(ImageRequest("a cat")))
        wait_for_state(engine, "unloaded")
        assert loaded[-1]() is None
        assert gc.get_freeze_count() == 0
        assert len(result_of(engine.submit(ImageRequest("a cat"))).images) == 1
        assert len(loaded) >= 2


def test_nothing_looks_through_a_loaded_model_for_garbage() -> None:
    """Doing so holds up every thread of the server for a quarter of a second."""
    with running_engine() as engine:
        result_of(engine.submit(ImageRequest("a cat")))
        assert gc.get_freeze_count() > 0


def test_a_model_that_does_not_load_is_told_and_tried_again() -> None:
    attempts = []

    def load() -> Any:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("no such folder")
        return emoji()

    with running_engine(load) as engine:
        assert engine.state == "failed"
        with pytest.raises(ModelUnavailable, match="no such folder"):
            result_of(engine.submit(ImageRequest("a cat")))
        assert len(result_of(engine.submit(ImageRequest("a cat"))).images) == 1


def test_closing_finishes_what_is_queued_and_takes_nothing_new() -> None:
    with watched_network() as network, running_engine() as engine:
        network.hold()
        jobs = [engine.submit(ImageRequest("a cat"))]
        network.wait_until_entered()
        jobs.append(engine.submit(ImageRequest("a dog", steps=2)))
        closing = threading.Thread(target=engine.close)
        closing.start()
        wait_for_state(engine, "draining")
        with pytest.raises(Draining):
            engine.submit(ImageRequest("a cat"))
        network.go_on()
        closing.join(WAIT_S)
        assert [job.status for job in jobs] == ["done", "done"]
        assert engine.state == "stopped"


def test_closing_does_not_wait_for_ever() -> None:
    with watched_network() as network:
        engine = Engine(emoji)
        network.hold()
        jobs = [engine.submit(ImageRequest("a cat", steps=2)), engine.submit(ImageRequest("a dog"))]
        network.wait_until_entered()
        closing = threading.Thread(target=engine.close, args=(0,))
        closing.start()
        for job in jobs:
            with pytest.raises(CancelledError):
                result_of(job)
        network.go_on()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        assert len(network.batches) == 1


def test_listeners_see_every_step_and_cannot_do_harm() -> None:
    seen: list[tuple[str, int]] = []
    ended = threading.Event()

    def listen(job: Any) -> None:
        seen.append((job.status, job.progress[0]))
        if job.status == "done":
            ended.set()
        raise RuntimeError("a closed connection")

    with watched_network() as network, running_engine() as engine:
        network.hold()
        blocker = engine.submit(ImageRequest("a dog"))
        network.wait_until_entered()
        job = engine.submit(ImageRequest("a cat", steps=2, n=2))
        job.subscribe(listen)
        network.go_on()
        result_of(blocker)
        result_of(job)
        assert ended.wait(WAIT_S)
    assert seen == [("queued", 0), ("running", 0), ("running", 2), ("running", 4), ("done", 4)]
    assert job.progress == (4, 4)


def test_without_controlnet_an_image_is_refused() -> None:
    with running_engine() as engine, pytest.raises(ValueError, match="no ControlNet"):
        engine.submit(ImageRequest("a cat", image=SKETCH))


def test_a_controlnet_gets_each_request_with_its_own_image() -> None:
    calls: list[dict[str, Any]] = []

    def control(*, image: Any, kind: str, controlnet_conditioning_scale: float, **arguments: Any) -> Any:
        calls.append({"image": image, "kind": kind, "scale": controlnet_conditioning_scale})
        return emoji()(**arguments)

    other = np.zeros_like(SKETCH)
    with running_engine(lambda: Pipelines(emoji(), control), batch_window_s=10.0, max_batch=2) as engine:
        jobs = [
            engine.submit(ImageRequest("a cat", image=image, control_scale=0.5)) for image in (SKETCH, other)
        ]
        for job in jobs:
            assert len(result_of(job).images) == 1
    assert [(call["kind"], call["scale"]) for call in calls] == [("scribble", 0.5)]
    assert [np.asarray(image).max() for image in calls[0]["image"]] == [255, 0]


def test_sketches_are_let_go_when_their_jobs_have_ended() -> None:
    def control(*, image: Any, kind: str, controlnet_conditioning_scale: float, **arguments: Any) -> Any:
        return emoji()(**arguments)

    with watched_network() as network, running_engine(lambda: Pipelines(emoji(), control)) as engine:
        network.hold()
        running = engine.submit(ImageRequest("a cat", image=SKETCH))
        network.wait_until_entered()
        waiting, left = (engine.submit(ImageRequest("a cat", image=SKETCH)) for _ in range(2))
        left.cancel()
        assert left.request.image is None  # it will never be drawn
        assert running.request.image is waiting.request.image is SKETCH
        running.cancel()
        network.go_on()
        result_of(waiting)
        engine.close()
    assert [job.request.image for job in (running, waiting)] == [None, None]
    assert [job.has_image for job in (running, waiting, left)] == [True, True, True]
