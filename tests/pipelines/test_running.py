"""Running calls: what they are asked for by a callback or another thread, and how they are interrupted."""

import concurrent.futures
import threading

import pytest
import torch

from sana_sprint import SanaSprintPipeline
from tests.helpers.pipeline import PROMPT, tiny_pipeline

LONG_WAIT = 60  # seconds until a test that hangs fails


@pytest.fixture
def pipe():
    return tiny_pipeline()


def draw(pipe, steps, **settings):
    return pipe(PROMPT, steps, seed=0, output_type="latent", **settings)


def test_before_the_first_call(pipe):
    assert pipe.interrupt is False
    for name in ("guidance_scale", "attention_kwargs", "num_timesteps"):
        with pytest.raises(AttributeError, match="not called yet"):
            getattr(pipe, name)
    pipe._interrupt = True  # nothing runs; as published, a call begins uninterrupted
    assert draw(pipe, 3).num_inference_steps == 3


def test_an_interrupted_call_says_how_to_draw_its_picture_again(pipe):
    def stop(pipeline, i, t, tensors):
        pipeline._interrupt = i == 1

    output = draw(pipe, 4, callback_on_step_end=stop)
    assert (output.num_inference_steps, output.times[-1]) == (2, 0.0)
    again = draw(pipe, 2, timesteps=output.times)
    torch.testing.assert_close(again.images, output.images, atol=1e-6, rtol=0)  # the same steps in fp32


def test_an_interruption_can_be_taken_back_in_the_same_callback(pipe):
    def waver(pipeline, i, t, tensors):
        pipeline._interrupt = True
        pipeline._interrupt = False

    assert draw(pipe, 3, callback_on_step_end=waver).num_inference_steps == 3


def test_threads_read_and_interrupt_their_own_calls(pipe):
    """Both calls are between their first and second step when one of them is interrupted."""
    both_are_in = threading.Barrier(2)
    whole, alone = draw(pipe, 3), draw(pipe, 2)

    def run(steps, interrupts):
        seen = []

        def callback(pipeline, i, t, tensors):
            if i == 0:
                both_are_in.wait(LONG_WAIT)
                pipe._interrupt = interrupts
                both_are_in.wait(LONG_WAIT)
            seen.append((pipeline is pipe, pipe.num_timesteps, pipe.guidance_scale, pipe.interrupt))

        return draw(pipe, steps, callback_on_step_end=callback, guidance_scale=4.5), seen

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stopped, other = pool.submit(run, 2, True), pool.submit(run, 3, False)
        output, seen = stopped.result(LONG_WAIT)
        assert seen == [(True, 2, 4.5, True)]
        assert output.num_inference_steps == 1
        assert not torch.equal(output.images, alone.images)
        output, seen = other.result(LONG_WAIT)
        assert seen == [(True, 3, 4.5, False)] * 3
        assert torch.equal(output.images, whole.images)


def test_a_thread_without_a_call_interrupts_all_that_run(pipe):
    """As a stop button does."""
    both_are_in, stopped = threading.Barrier(3), threading.Event()

    def run(_):
        def callback(pipeline, i, t, tensors):
            both_are_in.wait(LONG_WAIT)
            assert stopped.wait(LONG_WAIT)

        return draw(pipe, 4, callback_on_step_end=callback).num_inference_steps

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(run, range(2))
        both_are_in.wait(LONG_WAIT)
        pipe._interrupt = True
        stopped.set()
        assert list(found) == [1, 1]
    assert draw(pipe, 4).num_inference_steps == 4


def test_a_call_inside_a_callback_is_a_call_of_its_own(pipe):
    inner = []

    def stop(pipeline, i, t, tensors):
        pipeline._interrupt = True

    def callback(pipeline, i, t, tensors):
        if i == 0:
            inner.append(draw(pipe, 4, callback_on_step_end=stop, guidance_scale=2.0))
        assert (pipe.num_timesteps, pipe.guidance_scale, pipe.interrupt) == (3, 4.5, False)

    output = draw(pipe, 3, callback_on_step_end=callback)
    assert (output.num_inference_steps, inner[0].num_inference_steps) == (3, 1)
    assert torch.equal(output.images, draw(pipe, 3).images)


def test_pipelines_that_share_components_are_interrupted_apart(pipe):
    other = SanaSprintPipeline.from_pipe(pipe)

    def stop(pipeline, i, t, tensors):
        other._interrupt = True  # no call of that one runs

    assert draw(pipe, 2, callback_on_step_end=stop).num_inference_steps == 2


def test_a_call_that_failed_leaves_no_running_call_behind(pipe):
    def fail(pipeline, i, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, 2, callback_on_step_end=fail)
    pipe._interrupt = True
    assert pipe.interrupt is False  # of the call that failed: nothing was running
    assert draw(pipe, 2).num_inference_steps == 2
