"""The jobs that are kept for their clients: how long, and in how much memory."""

from __future__ import annotations

import pytest
from PIL import Image

from sana_sprint.resolutions import Size
from sana_sprint.serve.engine import ImageRequest, Job, Result
from sana_sprint.serve.errors import ApiError
from sana_sprint.serve.schema import Generation
from sana_sprint.serve.service import JOB_BYTES, JobStore
from sana_sprint.serve.settings import Settings

SIDE = 64
PICTURE_BYTES = SIDE * SIDE * 3
FIELDS = Generation(prompt="a cat")


def finish(job: Job) -> None:
    pictures = [Image.new("RGB", (SIDE, SIDE)) for _ in job.seeds]
    size = Size(SIDE, SIDE, SIDE, SIDE)
    job.finish(Result(pictures, job.seeds, (1.5, 0.0), size, {}, None, 0, "float32"))


def added(store: JobStore, n: int = 1) -> Job:
    job = Job(ImageRequest("a cat", n=n))
    store.add(job, FIELDS)
    return job


def is_kept(store: JobStore, job: Job) -> bool:
    try:
        return store.get(job.id) == (job, FIELDS)
    except ApiError as error:
        return (error.status, error.code) != (404, "job_not_found")


def test_ended_jobs_fit_into_their_memory_and_open_ones_always_stay() -> None:
    store = JobStore(Settings(max_kept_bytes=2 * (PICTURE_BYTES + JOB_BYTES)))
    waiting = added(store)
    jobs = [added(store) for _ in range(3)]
    for job in jobs:
        finish(job)
    assert [is_kept(store, job) for job in jobs] == [False, True, True]
    finish(large := added(store, n=20))
    assert not is_kept(store, large)
    assert [is_kept(store, job) for job in jobs] == [False, True, True]  # it pushed none of them out
    assert is_kept(store, waiting)


def test_cancelled_jobs_take_little_but_not_nothing() -> None:
    store = JobStore(Settings(max_kept_bytes=3 * JOB_BYTES))
    jobs = [added(store) for _ in range(4)]
    for job in jobs:
        job.cancel()
    assert [is_kept(store, job) for job in jobs] == [False, True, True, True]


def test_ended_jobs_are_kept_for_a_time() -> None:
    store = JobStore(Settings(keep_jobs_s=0.0))
    job = added(store)
    assert is_kept(store, job)
    finish(job)
    assert not is_kept(store, job)


def test_a_job_that_ended_before_it_is_added_is_kept() -> None:
    store = JobStore(Settings())
    finish(job := Job(ImageRequest("a cat")))
    store.add(job, FIELDS)
    assert is_kept(store, job)


@pytest.mark.parametrize("wrong", [{"max_n": 0}, {"keep_jobs_s": -1}, {"colour": "red"}, {"api_key": " "}])
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_settings_come_from_the_environment_too_and_do_not_show_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SANA_SPRINT_SERVE_MAX_BODY_BYTES", "1000")
    settings = Settings(api_key="a-secret", max_n=3)  # type: ignore[arg-type]
    assert (settings.max_body_bytes, settings.max_n, settings.max_steps) == (1000, 3, 20)
    assert "a-secret" not in repr(settings)
    with pytest.raises(ValueError, match="ASCII") as refused:
        Settings(api_key="a-s\u00e9cret")  # type: ignore[arg-type]
    assert "cret" not in str(refused.value)
