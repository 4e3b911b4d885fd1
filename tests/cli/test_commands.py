"""`sana-sprint` as a whole, and its `generate`."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import sana_sprint
from sana_sprint import resolutions
from sana_sprint.cli import COMMANDS, common, drawing, generate, loading
from sana_sprint.cli.pictures import MAX_SLUG_BYTES, slug
from sana_sprint.images import INFOTEXT_KEY, read_settings
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.weights import hub
from tests.helpers.cli import assert_refused, call, save_tiny_model, subprocess_settings, succeed

PROMPT = "a red cat"
EMBEDDED = Path(sana_sprint.__file__).parent / "embedded" / "emoji"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _in_empty_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is empty, and the tiny model is the default one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANA_SPRINT_MODEL", str(tiny))


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=np.int64)


def drawn(*arguments: object, **settings: Any) -> dict[str, Any]:
    """The JSON object of a `generate` call."""
    report: dict[str, Any] = json.loads(succeed("generate", *arguments, "--json", **settings))
    return report


# ----- the whole ------------------------------------------------------------------------------------------------------


def test_help_and_version_load_nothing_heavy():
    calls = [["--help"], ["--version"], [], *([command, "-h"] for command in COMMANDS)]
    code = (
        "import sys\nfrom sana_sprint.cli import app\n"
        f"for call in {calls!r}:\n"
        "    try:\n        app(call)\n    except SystemExit as end:\n        assert not end.code, (call, end.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=subprocess_settings(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == len(calls) - 1
    assert f"sana-sprint {sana_sprint.__version__}\n" in done.stdout


def test_package_runs_as_a_module():
    command = [sys.executable, "-m", "sana_sprint", "nonsense"]
    done = subprocess.run(command, env=subprocess_settings(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such command 'nonsense'\nhint: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command):
    assert succeed(command, "-h") == succeed(command, "--help")
    assert f"  {command} " in succeed("--help")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("genrate", "hint: did you mean `sana-sprint generate`?"),
        ("two cats", 'hint: to draw that, run `sana-sprint generate "two cats"`'),
        ("xyz", f"hint: the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_unknown_command_gets_the_right_hint(name, hint):
    result = call(name, prog_name="sana-sprint")
    assert_refused(result, 2, name)
    assert result.stderr.splitlines()[1] == hint


def test_interrupt_is_clean(monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_pipeline", interrupted)
    result = call("generate", PROMPT)
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "interrupted")


def test_missing_extra_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # importing it raises ModuleNotFoundError
    assert_refused(call("generate", PROMPT, "--clean-caption"), 1, "pip install 'sana-sprint[caption]'")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("first line\nsecond line"), "error: first line second line\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "error: not enough memory\nhint: make smaller pictures",
        ),
        (MemoryError("decode"), "error: not enough memory\n"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_failures_are_one_line_and_a_hint(monkeypatch, error, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(generate, "load_pipeline", fail)
    result = call("generate", PROMPT)
    assert_refused(result, 1, words)
    assert "Traceback" not in result.stderr
    result = call("generate", PROMPT, env={common.DEBUG_VARIABLE: "1"})
    assert "Traceback" in result.stderr
    assert words in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("cannot be")

    monkeypatch.setattr(generate, "load_pipeline", fail)
    assert isinstance(call("generate", PROMPT).exception, AssertionError)


@pytest.mark.parametrize(("value", "is_plain"), [("1", True), ("", False)])
def test_no_color_is_honoured(monkeypatch, value, is_plain):
    monkeypatch.setenv("NO_COLOR", value)
    assert common.console().no_color is is_plain


# ----- generate: pictures ---------------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_pipeline(tiny):
    report = drawn(
        "a red cat",
        "dogs on the moon",
        "-n",
        2,
        "--seed",
        7,
        "--steps",
        3,
        "--guidance",
        3,
        "--size",
        "40x24",
    )
    pipeline = SanaSprintPipeline.from_pretrained(tiny)
    expected = pipeline(
        ["a red cat", "dogs on the moon"],
        num_inference_steps=3,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        width=40,
        height=24,
        seed=7,
    )
    assert report["seeds"] == [7, 8, 9, 10]
    assert report["files"] == [
        "out/a-red-cat-7.png",
        "out/a-red-cat-8.png",
        "out/dogs-on-the-moon-9.png",
        "out/dogs-on-the-moon-10.png",
    ]
    assert report["prompt"] == ["a red cat", "dogs on the moon"]
    for file, picture in zip(report["files"], expected.images, strict=True):
        # One level of 255: batches of another size round differently before the last rounding.
        assert np.abs(pixels(file) - np.asarray(picture, dtype=np.int64)).max() <= 1
    assert tuple(report["times"]) == expected.times
    assert (report["steps"], report["guidance"], report["dtype"], report["device"]) == (
        3,
        3.0,
        "float32",
        "cpu",
    )
    assert report["size"] == {"width": 40, "height": 24}
    assert report["model_size"] == {"width": expected.model_width, "height": expected.model_height}
    assert report["truncated"] == [False, False]
    assert all(seconds > 0 for seconds in report["timings"].values())


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ([], [1.5708, 1.3, 0]),
        (["--intermediate-timesteps", "1.1"], [1.5708, 1.1, 0]),
        (["--max-timesteps", "1.5"], [1.5, 1.3, 0]),
        (["--steps", "1", "--max-timesteps", "1.2"], [1.2, 0]),
    ],
)
def test_times_reach_the_model(options, times):
    report = drawn(PROMPT, "--seed", 1, *options)
    assert report["times"] == times
    with Image.open(report["files"][0]) as picture:
        assert read_settings(picture)["times"] == times


def test_a_line_per_picture_on_stdout():
    result = call("generate", PROMPT, "-n", 2, "--seed", 7, "-o", "made/here")
    assert result.stdout == "made/here/a-red-cat-7.png\tseed 7\nmade/here/a-red-cat-8.png\tseed 8\n"
    assert result.stderr == ""
    assert pixels("made/here/a-red-cat-8.png").shape == (32, 32, 3)


def test_many_pictures_take_several_calls(monkeypatch):
    sizes = []
    whole = SanaSprintPipeline.__call__

    def counted(self: Any, prompt: Any, **arguments: Any) -> Any:
        sizes.append(len(arguments["seed"]))
        return whole(self, prompt, **arguments)

    monkeypatch.setattr(SanaSprintPipeline, "__call__", counted)
    monkeypatch.setattr(resolutions, "PIXELS_AT_ONCE", 3 * 32 * 32)
    report = drawn("a cat", "dogs", "-n", 4, "--seed", 0)
    assert sizes == [3, 3, 2]
    assert report["seeds"] == list(range(8))
    alone = drawn("dogs", "--seed", 5, "-o", "alone")
    # As above: a picture made alone may differ by one level.
    assert np.abs(pixels(report["files"][5]) - pixels(alone["files"][0])).max() <= 1


@pytest.mark.parametrize("options", [[], ["--seed", "-1"]])
def test_random_seed_is_shown_and_makes_the_picture_again(options):
    state = torch.get_rng_state()
    first = drawn(PROMPT, *options)
    torch.set_rng_state(state)  # in every new process torch's global generator is the same
    second = drawn(PROMPT, *options)
    assert first["seeds"] != second["seeds"]  # alike once in 2**32 calls
    again = drawn(PROMPT, "--seed", first["seeds"][0], "-o", "again")
    assert Path(again["files"][0]).read_bytes() == Path(first["files"][0]).read_bytes()
    assert (pixels(first["files"][0]) != pixels(second["files"][0])).any()


def test_settings_are_in_the_file(tiny):
    (file,) = drawn(PROMPT, "--seed", 7, "--size", "40x24", "--dtype", "fp32")["files"]
    with Image.open(file) as picture:
        settings, text = read_settings(picture), picture.text[INFOTEXT_KEY]
    assert settings == {
        "prompt": PROMPT,
        "seed": 7,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "times": [1.5708, 1.3, 0.0],
        "width": 40,
        "height": 24,
        "model_width": settings["model_width"],
        "model_height": settings["model_height"],
        "model": str(tiny),
        "dtype": "float32",
        "version": f"sana-sprint {sana_sprint.__version__}",
    }
    assert text == f"{PROMPT}\nSteps: 2, CFG scale: 4.5, Seed: 7, Size: 40x24, Model: {tiny}"


@pytest.mark.parametrize(("dtype", "name"), [("auto", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_dtypes(dtype, name):
    assert drawn(PROMPT, "--dtype", dtype)["dtype"] == name


def test_memory_options_reach_the_autoencoder(monkeypatch):
    switched = []
    for kind in ("tiling", "slicing"):
        monkeypatch.setattr(
            SanaSprintPipeline, f"enable_vae_{kind}", lambda _, kind=kind: switched.append(kind)
        )
    succeed("generate", PROMPT)
    assert switched == []
    succeed("generate", PROMPT, "--vae-tiling", "--vae-slicing")
    assert switched == ["tiling", "slicing"]


def test_model_without_guidance_needs_none(tiny, tmp_path):
    from tests.helpers.pipeline import TRANSFORMER, tiny_pipeline

    folder = tmp_path / "unguided"
    tiny_pipeline({**TRANSFORMER, "guidance_embeds": False}).save_pretrained(folder)
    assert drawn(PROMPT, "--model", folder)["guidance"] is None
    assert_refused(call("generate", PROMPT, "--model", folder, "--guidance", 3), 1, "guidance")


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the small model is not in this checkout")
def test_the_default_model_draws(monkeypatch):
    monkeypatch.delenv("SANA_SPRINT_MODEL")
    report = drawn("two apples on a blue background", "--steps", 1, "--seed", 7)
    assert (report["model"], report["size"]) == ("emoji", {"width": 128, "height": 128})
    red, _, blue = pixels(report["files"][0])[:6, :6].mean((0, 1))  # a corner is background
    assert blue > red


# ----- generate: files ------------------------------------------------------------------------------------------------


def test_no_file_in_a_folder_is_replaced():
    files = [drawn(PROMPT, "--seed", seed)["files"][0] for seed in (7, 7, 7)]
    assert files == ["out/a-red-cat-7.png", "out/a-red-cat-7-2.png", "out/a-red-cat-7-3.png"]


def test_a_named_file_is_written_and_replaced():
    assert succeed("generate", PROMPT, "--seed", 1, "-o", "new/cat.PNG") == "new/cat.PNG\tseed 1\n"
    before = pixels("new/cat.PNG")
    succeed("generate", PROMPT, "--seed", 2, "-o", "new/cat.PNG")
    assert (pixels("new/cat.PNG") != before).any()
    assert [path.name for path in Path("new").iterdir()] == ["cat.PNG"]


def test_finished_pictures_survive_an_interrupt(monkeypatch):
    def stops(*arguments: Any, **settings: Any) -> Any:
        yield next(drawing.draw(*arguments, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "draw", stops)
    result = call("generate", PROMPT, "-n", 3, "--seed", 7)
    assert (result.exit_code, result.stdout) == (130, "out/a-red-cat-7.png\tseed 7\n")
    assert pixels("out/a-red-cat-7.png").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Two apples, on a blue background!", "two-apples-on-a-blue-background"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\autoexec.bat", "c-autoexec-bat"),
        ("🍎🍌", "picture"),
        ("Красное яблоко", "красное-яблоко"),
        ("赤いリンゴ" * 40, ("赤いリンゴ" * 4)),
        ("word " * 99, "word-" * 11 + "word"),
        ("a\nb\0c", "a-b-c"),
    ],
)
def test_slugs(prompt, name):
    assert slug(prompt) == name
    assert len(name.encode()) <= MAX_SLUG_BYTES


def test_lines_for_a_pipe_go_to_stdout_though_the_bar_is_on_a_terminal(capsys):
    terminal = Console(file=SimpleNamespace(write=lambda _: 0, flush=lambda: None, isatty=lambda: True))
    drawing.print_line(Progress(console=terminal), "out/[red]cat-7.png")
    assert capsys.readouterr().out == "out/[red]cat-7.png\n"


# ----- generate: prompts ----------------------------------------------------------------------------------------------


def test_prompts_come_from_stdin_arguments_and_files():
    Path("list.txt").write_bytes("\ufeffa moon\r\n\r\n  the egg \n".encode())
    piped = {"input": "a cat\n\nred dogs\n"}
    assert drawn(**piped)["prompt"] == ["a cat", "red dogs"]
    assert drawn("-", **piped)["prompt"] == ["a cat", "red dogs"]
    assert drawn("egg", "-", "moon", **piped)["prompt"] == ["egg", "a cat", "red dogs", "moon"]
    assert drawn("--file", "list.txt", **piped)["prompt"] == ["a moon", "the egg"]
    assert drawn("egg", "-f", "list.txt", **piped)["prompt"] == ["egg", "a moon", "the egg"]
    assert drawn(" egg ", **piped)["prompt"] == "egg"


def test_a_prompt_that_is_cut_is_reported():
    long = "red cat " * 400
    result = call("generate", long, "a dog", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["truncated"] == [True, False]
    assert result.stderr.startswith("warning: too long, the last ")
    assert result.stderr.count("\n") == 1


def test_resizing_is_told():
    assert call("generate", PROMPT, "--size", "32").stderr == ""
    assert call("generate", PROMPT, "--size", "64").stderr == "note: drawn at 32x32, then resized to 64x64\n"


# ----- generate: refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no prompt"),
        ([""], "a prompt is empty"),
        (["cat", "  "], "a prompt is empty"),
        (["cat", "--unknown"], "--unknown"),
        (["cat", "--stpes", "2"], "--stpes"),
        (["cat", "--steps", "0"], "got: 0"),
        (["cat", "--steps", "two"], "--steps"),
        (["cat", "--steps", "1.5"], "--steps"),
        (["cat", "-n", "0"], "got: 0"),
        (["cat", "-n", str(10**12)], f"got: {10**12}"),
        (["cat", "--steps", str(10**12)], f"got: {10**12}"),
        (["cat", "--seed", "-2"], "got: -2"),
        (["cat", "--seed", str(2**64)], str(2**64)),
        (["cat", "--seed", str(2**64 - 1), "-n", "2"], str(2**64)),
        (["cat", "--size", "0"], "0x0"),
        (["cat", "--size", "64x"], "64x"),
        (["cat", "--size", "-64"], "-64"),
        (["cat", "--size", "1e3"], "1e3"),
        (["cat", "--size", "64x0"], "64x0"),
        (["cat", "--size", "100000"], "100000x100000"),
        (["cat", "--guidance", "-1"], "got: -1"),
        (["cat", "--guidance", "nan"], "got: nan"),
        (["cat", "--guidance", "inf"], "got: inf"),
        (["cat", "--max-timesteps", "1.6"], "got: 1.6"),
        (["cat", "--max-timesteps", "0"], "got: 0"),
        (["cat", "--intermediate-timesteps", "1.6"], "got: 1.6"),
        (["cat", "--intermediate-timesteps", "1", "--steps", "4"], "not for 4"),
        (["cat", "--dtype", "fp8"], "fp8"),
        (["cat", "--device", "tpu"], "tpu"),
        (["cat", "--device", "cpu:1"], "cpu:1"),
        (["cat", "-o", "cat.jpg"], "cat.jpg"),
        (["cat", "-o", "-"], "stdout"),
        (["cat", "-n", "2", "-o", "cat.png"], "2 pictures"),
        (["cat", "-o", "taken.txt"], "taken.txt"),
        (["cat", "-o", "taken.txt/folder"], "taken.txt"),
        (["--file", "absent.txt"], "absent.txt"),
        (["--file", "blank.txt"], "no prompt"),
        (["--file", "latin.txt"], "UTF-8"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_loaded(monkeypatch, arguments, word):
    Path("taken.txt").write_text("x")
    Path("blank.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(SanaSprintPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = call("generate", *arguments)
    assert_refused(result, 2, word)
    assert sorted(path.name for path in Path().iterdir()) == ["blank.txt", "latin.txt", "taken.txt"]


def test_a_model_that_cannot_be_loaded_fails(tiny, monkeypatch):
    assert_refused(call("generate", PROMPT, "--model", "nonsense"), 1, "nonsense")
    assert_refused(call("generate", PROMPT, "--model", tiny / "vae"), 1, "model_index.json")
    monkeypatch.setattr(hub, "EMBEDDED_MODELS", ("lost",))
    assert_refused(call("generate", PROMPT, "--model", "lost"), 1, "lacks the embedded model")


# ----- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_cuda", "has_mps", "wanted", "chosen"),
    [
        (0, False, "auto", "cpu"),
        (2, True, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cuda:2", None),
        (0, False, "cuda", None),
        (0, False, "mps", None),
    ],
)
def test_devices(monkeypatch, num_cuda, has_mps, wanted, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    if chosen is None:
        with pytest.raises(common.UsageError, match=wanted):
            loading.choose_device(wanted)
    else:
        assert loading.choose_device(wanted) == chosen


# ----- loading --------------------------------------------------------------------------------------------------------


def test_fast_turns_on_what_cuda_offers_and_nothing_elsewhere():
    class Pipeline:
        def __init__(self, error=None):
            self.calls, self.error = [], error

        def enable_fused_kernels(self):
            self.calls.append("kernels")
            if self.error:
                raise self.error

        def enable_cuda_graphs(self):
            self.calls.append("graphs")

    for device, error in (("cuda", None), ("cuda:1", ValueError("without Triton"))):
        pipeline = Pipeline(error)
        loading.accelerate(pipeline, device)
        assert pipeline.calls == ["kernels", "graphs"]
    for device in ("cpu", "mps"):
        pipeline = Pipeline()
        loading.accelerate(pipeline, device)
        assert not pipeline.calls


def test_garbage_is_collected_again_after_loading(monkeypatch):
    seen = []
    monkeypatch.setattr(loading, "quieten", lambda: seen.append(gc.isenabled()))
    loading.load_pipeline(loading.ModelOptions("emoji"))
    with pytest.raises(common.CommandError):
        loading.load_pipeline(loading.ModelOptions("no-such-model"))
    assert (seen, gc.isenabled()) == ([False, False], True)
    gc.unfreeze()
