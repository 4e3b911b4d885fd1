"""From a name to a folder, with a pretended Hub; and model_index.json."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from sana_sprint.weights import ModelIndex, WeightsError, read_model_index, resolve_folder, write_model_index

REPO = "someone/Sana_Sprint_0.6B_1024px_diffusers"
SMALL = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "vae/config.json",
}
PLAIN = {
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
}
FP16 = {
    "text_encoder/model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
}
BF16 = {"vae/diffusion_pytorch_model.bf16.safetensors"}
OLDER_BF16 = {"transformer/diffusion_pytorch_model-00001-of-00001.bf16.safetensors"}
NEVER = {
    ".gitattributes",
    "README.md",
    "Sana_Sprint.safetensors",
    "checkpoints/Sana_Sprint.pth",
    "images/teaser.png",
    "text_encoder/pytorch_model.bin",
    "transformer/diffusion_pytorch_model.bin",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository; `.calls` are the keyword arguments, `.got` the files of the last call's folder."""

    class Hub:
        files = SMALL | PLAIN | FP16 | BF16 | OLDER_BF16 | NEVER
        calls: list[dict] = []  # noqa: RUF012  (one instance)

        def snapshot_download(self, repo_id, *, allow_patterns, **options):
            self.calls.append({"repo_id": repo_id, "allow_patterns": allow_patterns, **options})
            self.got = {name for name in self.files if any(fnmatchcase(name, p) for p in allow_patterns)}
            folder = tmp_path / "snapshots" / str(len(self.calls))
            for name in self.got:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            self.folder = folder
            return str(folder)

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def failing_hub(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


# Folders


def test_a_folder_is_itself(tmp_path, hub):
    assert resolve_folder(tmp_path) == resolve_folder(str(tmp_path)) == tmp_path
    assert not hub.calls


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_folder("~/mine") == tmp_path / "mine"


def test_a_folder_goes_before_a_hub_id(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    assert resolve_folder(REPO) == Path(REPO)
    assert not hub.calls


def test_the_embedded_model_comes_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr("sana_sprint.weights.hub.resources.files", lambda package: tmp_path / package)
    with pytest.raises(WeightsError, match="installation lacks the embedded model 'emoji'"):
        resolve_folder("emoji")
    model = tmp_path / "sana_sprint" / "embedded" / "emoji"
    model.mkdir(parents=True)
    assert resolve_folder("emoji") == model
    # The name means the embedded model even where a folder is called so; a path means that folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert resolve_folder("emoji") == model
    assert resolve_folder("./emoji") == resolve_folder(Path("emoji")) == Path("emoji")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "emojj",
        "./missing/model",
        "/missing/model",
        "a/b/c",
        "own er/model",
        "owner/",
        "owner/-model",
        "owner/a--b",
        "owner/a..b",
        "owner/model.git",
        "C:\\models\\sana",
        "https://huggingface.co/owner/model",
        "owner/" + "m" * 97,
        Path("owner/model"),
    ],
)
def test_a_name_that_means_nothing_says_what_is_allowed(name, hub):
    with pytest.raises(WeightsError) as caught:
        resolve_folder(name)
    message = str(caught.value)
    assert repr(str(name)) in message
    for allowed in ("'emoji'", "folder", "'owner/name'"):
        assert allowed in message
    assert not hub.calls


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(WeightsError, match="a model is a folder"):
        resolve_folder(str(file))


def test_a_revision_of_a_folder_cannot_be_honoured(tmp_path):
    with pytest.raises(WeightsError, match=r"only a Hub model has revisions.*'v2'"):
        resolve_folder(tmp_path, revision="v2")


# The Hub


def test_only_configs_and_plain_safetensors_are_fetched(hub):
    assert resolve_folder(REPO) == hub.folder
    assert hub.got == SMALL | PLAIN


def test_one_model_at_the_root_of_a_repository(hub):
    hub.files = {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"}
    resolve_folder("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers")
    assert hub.got == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_options_reach_the_hub(hub, tmp_path):
    resolve_folder(REPO, revision="v2", cache_dir=tmp_path, token="secret", local_files_only=True)
    (call,) = hub.calls
    del call["allow_patterns"]
    assert call == {
        "repo_id": REPO,
        "revision": "v2",
        "cache_dir": str(tmp_path),
        "token": "secret",
        "local_files_only": True,
    }


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("fp16", SMALL | FP16 | {"vae/diffusion_pytorch_model.safetensors"}),
        ("bf16", SMALL | BF16 | OLDER_BF16 | {name for name in PLAIN if name.startswith("text_encoder/")}),
    ],
)
def test_a_variant_comes_with_the_plain_files_of_parts_that_lack_it(hub, variant, expected):
    assert resolve_folder(REPO, variant=variant) == hub.folder
    assert hub.got == expected  # all in one folder


def test_a_variant_that_every_part_has_is_one_call(hub):
    hub.files = SMALL | FP16 | {"vae/diffusion_pytorch_model.fp16.safetensors"} | PLAIN
    resolve_folder(REPO, variant="fp16")
    assert len(hub.calls) == 1
    assert not hub.got & PLAIN


def test_a_variant_that_no_part_has(hub):
    with pytest.raises(WeightsError, match=f"^no component of {REPO} has .* variant 'int4'"):
        resolve_folder(REPO, variant="int4")


def test_a_variant_is_not_a_pattern(hub):
    with pytest.raises(WeightsError, match=re.escape("'*'")):
        resolve_folder(REPO, variant="*")
    assert not hub.calls


def response():
    return SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.GatedRepoError("403", response=response()), "gated: accept its terms"),
        (errors.RepositoryNotFoundError("404", response=response()), "neither a folder here nor a model on"),
        (errors.RevisionNotFoundError("404", response=response()), "no such branch, tag or commit: 'v9'"),
        (errors.LocalEntryNotFoundError("cannot find"), "not complete in the local cache"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (
            errors.HfHubHTTPError("500 Server Error\nmore", response=response()),
            "HfHubHTTPError: 500 Server Error",
        ),
        (PermissionError("read-only cache"), "PermissionError: read-only cache"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_a_failed_download_is_one_line_that_says_why(monkeypatch, error, expected):
    failing_hub(monkeypatch, error)
    with pytest.raises(WeightsError) as caught:
        resolve_folder(REPO, revision="v9")
    message = str(caught.value)
    assert REPO in message
    assert expected in message
    assert "\n" not in message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}])
def test_the_real_client_offline(tmp_path, options):
    """Not pretended: the tests run with HF_HUB_OFFLINE=1, and the cache is empty."""
    with pytest.raises(WeightsError, match="out of reach or switched off"):
        resolve_folder(REPO, cache_dir=tmp_path, **options)


# model_index.json

INDEX = ModelIndex(
    class_name="SanaSprintPipeline",
    components={
        "scheduler": ("diffusers", "SCMScheduler"),
        "text_encoder": ("transformers", "Gemma2Model"),
        "controlnet": None,
    },
    options={"requires_safety_checker": False},
)


def test_model_index_round_trip(tmp_path):
    write_model_index(tmp_path / "pipeline", INDEX)
    assert read_model_index(tmp_path / "pipeline") == INDEX
    assert [path.name for path in (tmp_path / "pipeline").iterdir()] == ["model_index.json"]
    content = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", content.pop("_diffusers_version"))
    assert content == {
        "_class_name": "SanaSprintPipeline",
        "scheduler": ["diffusers", "SCMScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "controlnet": [None, None],
        "requires_safety_checker": False,
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"vae": ["diffusers", "AutoencoderDC"]}, "must name a pipeline class"),
        ({"_class_name": ["pipeline.py", "Custom"]}, "must name a pipeline class"),
        ({"_class_name": "P", "vae": ["diffusers"]}, "component 'vae' must be"),
        ({"_class_name": "P", "vae": ["diffusers", None]}, "component 'vae' must be"),
        ({"_class_name": "P", "../vae": ["diffusers", "AutoencoderDC"]}, "name is an identifier"),
        ({"_class_name": "P", "..": ["diffusers", "AutoencoderDC"]}, "name is an identifier"),
    ],
)
def test_a_model_index_of_another_form(tmp_path, content, expected):
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=re.escape(expected)) as caught:
        read_model_index(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_model_index(tmp_path):
    with pytest.raises(WeightsError, match=r"no model_index\.json in"):
        read_model_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="it is a part of a pipeline"):
        read_model_index(tmp_path)
