"""`sana-sprint train`: the way from a TOML file to a finished folder. What training does is tested elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.cli import train
from tests.helpers.cli import assert_refused, call, subprocess_settings

# Two stages of convolutions on 8 px pictures: the smallest autoencoder there is.
STAGE = """
stage = "autoencoder"
output = "run"
precision = "fp32"
[data]
source = "my_pictures:picture"
[model]
latent_channels = 2
encoder_block_out_channels = [4, 4]
decoder_block_out_channels = [4, 4]
encoder_layers_per_block = [1, 1]
decoder_layers_per_block = [1, 1]
encoder_qkv_multiscales = [[], []]
decoder_qkv_multiscales = [[], []]
[schedule]
steps = 2
batch_size = 2
"""
SOURCE = """
import numpy as np
import torch

def picture(index):
    with open("threads.txt", "a") as file:
        file.write(f"{torch.get_num_threads()}\\n")
    return np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds a stage file and the module that draws its pictures."""
    (tmp_path / "stage.toml").write_text(STAGE)
    (tmp_path / "my_pictures.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the working folder
    monkeypatch.delitem(sys.modules, "my_pictures", raising=False)


def logged() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]


def test_a_stage_is_trained_with_overrides():
    result = call("train", "stage.toml", "schedule.steps=3", "schedule.log_every=1", "seed=5")
    assert result.exit_code == 0, result.output
    assert result.stdout == "run/final\n"
    assert "finished: run/final" in result.stderr
    assert [entry["step"] for entry in logged() if "loss" in entry] == [1, 2, 3]
    assert json.loads(Path("run/config.json").read_text())["seed"] == 5
    assert Path("run/final/config.json").is_file()


def test_a_second_call_continues():
    assert call("train", "stage.toml").exit_code == 0
    result = call("train", "stage.toml", "schedule.steps=4")
    assert result.exit_code == 0
    assert "resuming at step 2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "STAGE.toml"),
        (["absent.toml"], "absent.toml"),
        (["my_pictures.py"], "not valid TOML"),
        (["stage.toml", "schedule.steps"], "schedule.steps"),
        (["stage.toml", "schedule.steps=0"], "schedule.steps"),
        (["stage.toml", "schedule.stps=1"], "stps"),
        (["stage.toml", "stage=nonsense"], "nonsense"),
        (["stage.toml", "--steps", "3"], "--steps"),
    ],
)
def test_wrong_calls_are_refused(arguments, word):
    assert_refused(call("train", *arguments), 2, word)
    assert not Path("run").exists()


@pytest.mark.parametrize("source", ["absent_module:picture", "my_pictures:absent", "absent_folder"])
def test_a_missing_data_source_says_where_it_was_looked_for(source):
    result = call("train", "stage.toml", f"data.source={source}")
    assert_refused(result, 1, source, f"looked for from here: {Path.cwd()}")


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_every_stage_is_found(kind):
    # Each needs the folder of the stage before it, and gets as far as missing it.
    needs = {"teacher": "autoencoder", "student": "teacher"}[kind]
    text = f'stage = "{kind}"\noutput = "run"\n{needs} = "absent_folder"\n'
    if kind == "teacher":
        text += "[text_encoder]\n[model]\n"
    Path("other.toml").write_text(
        text + '[data]\nsource = "my_pictures:picture"\n[schedule]\nsteps = 1\nbatch_size = 1\n'
    )
    assert_refused(call("train", "other.toml"), 1, "absent_folder")


ENDLESS = [
    "schedule.steps=1000000",
    "schedule.save_every=1000000",
    "schedule.log_every=1",
]  # but for a signal


def assert_saved(stderr: str) -> None:
    """The run has one checkpoint, of the last step in its log, and said so."""
    assert "Traceback" not in stderr
    (saved,) = Path("run").glob("checkpoint-*.pt")
    step = int(saved.stem.removeprefix("checkpoint-"))
    assert f"stopped at step {step}, and saved" in stderr
    assert "the same command continues" in stderr
    assert logged()[-1]["step"] == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(number):
    signals_itself = f"""
import os

calls = 0

def signalling(index):
    global calls
    calls += 1
    if calls == 20:
        os.kill(os.getpid(), {int(number)})
    return picture(index)
"""
    Path("my_pictures.py").write_text(SOURCE + signals_itself)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        result = call("train", "stage.toml", "data.source=my_pictures:signalling", *ENDLESS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert_saved(result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_another_process_saves_too(number):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
    code += "from sana_sprint.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "stage.toml", *ENDLESS],
        env=subprocess_settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240  # a busy machine takes long to import torch
        while not Path("run/log.jsonl").is_file() or len(logged()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was logged"
            time.sleep(0.1)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (128 + number, "")
    assert_saved(stderr)


def test_the_second_signal_acts_as_it_always_does():
    def before(*_: object) -> None:
        raise KeyboardInterrupt

    kept = signal.signal(signal.SIGINT, before), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with train.received_signals() as received:
            assert (
                signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            )  # ignored before, as under nohup: so it stays
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, kept[0])
        signal.signal(signal.SIGTERM, kept[1])


@pytest.mark.parametrize(
    ("num_processes", "has_cuda", "is_single"), [("2", False, True), ("1", False, False), ("2", True, False)]
)
def test_threads(monkeypatch, num_processes, has_cuda, is_single):
    before = torch.get_num_threads()
    monkeypatch.setenv("WORLD_SIZE", num_processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    try:
        torch.set_num_threads(2)
        train.set_threads()
        assert torch.get_num_threads() == (1 if is_single else 2)
    finally:
        torch.set_num_threads(before)


def test_two_processes_with_one_thread_each():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {key: value for key, value in subprocess_settings().items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, "-m", "sana_sprint", "train", "stage.toml"],
        env={**settings, "OMP_NUM_THREADS": str(max(2, os.cpu_count() or 2))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/final\n"  # one of the two speaks
    assert done.stderr.count("finished: run/final") == 1
    assert set(Path("threads.txt").read_text().split()) == {"1"}
