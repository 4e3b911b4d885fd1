"""The rules that keep the code small and one-directional, checked on the source text."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sana_sprint

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PACKAGE = "sana_sprint"
MAX_FILE_LINES = 460  # SANA and DC-AE are one file each
MAX_FUNCTION_LINES = 60

# A module may import modules of lower levels, and of its own level inside its own folder. Level 0 imports nothing of
# ours. A folder's entry holds for every module in it that has no entry of its own.
LEVELS = {
    "trigflow": 0,
    "resolutions": 0,
    "prompts": 0,
    "torch_private": 0,
    "vocabulary": 0,
    "notices": 0,
    "precision": 0,
    "noise": 1,
    "stopping": 0,
    "config": 0,
    "models": 1,
    "sampling": 1,
    "scheduler": 2,
    "images": 1,
    "weights": 1,
    "backends": 2,
    "lora": 2,
    "controls": 2,
    "quantize": 3,
    "pipelines": 4,
    "train": 4,
    "evaluate": 5,
    "serve": 5,
    "cli": 6,
    "__main__": 7,
}

# Roots that only one machine has. A path of a URL or a relative one has a word character or a dot before it.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work|opt)/\w[^\s`'\")]*|(?<![\w.])/tmp/\w+/")


def module_name(path: Path) -> str:
    """`.../sana_sprint/models/layers.py` -> `models.layers`; a package is named by its folder, the root is ''."""
    parts = path.relative_to(SRC / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in sorted((SRC / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MODULES = [name for name in FILES if name]  # without the root, whose job is to name modules of every level


def level(name: str) -> int:
    """The level of a module by its longest entry in LEVELS."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in LEVELS:
            return LEVELS[prefix]
    raise AssertionError(
        f"{name} has no level: add it to LEVELS, where it belongs in the one-way flow of data"
    )


def imported(name: str) -> list[str]:
    """Absolute dotted names of everything that a module imports, lazily or not, down to the imported name."""
    package = f"{PACKAGE}.{name}".split(".")
    if FILES[name].name != "__init__.py":
        package.pop()
    names = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def our_imports(name: str) -> set[str]:
    """The modules of ours that a module imports; the root package counts as ''."""
    found = set()
    for target in imported(name):
        if target.split(".")[0] == PACKAGE:
            inner = target.removeprefix(PACKAGE).removeprefix(".")
            found.add(inner if inner in FILES else inner.rpartition(".")[0])
    return found


def levels_table() -> str:
    """The table of `docs/architecture.md`: every level from the bottom up, with its modules and folders."""
    rows = []
    for number in sorted(set(LEVELS.values())):
        names = [name.replace(".", "/") for name, each in LEVELS.items() if each == number]
        rows.append(f"level {number}  {'  '.join(names)}")
    return "\n".join(rows)


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    own = level(name)
    for target in our_imports(name):
        if target == "":
            ours = {
                used.removeprefix(f"{PACKAGE}.") for used in imported(name) if used.split(".")[0] == PACKAGE
            }
            from_root = {used for used in ours if "." not in used} - set(FILES)
            assert from_root == {"__version__"}, "inside the package only __version__ comes from its root"
            continue
        same_folder = "." in name and name.split(".")[0] == target.split(".")[0]
        is_down = level(target) < own or (level(target) == own > 0 and same_folder)
        owns = target.startswith(f"{name}.")  # a folder's __init__ may name its own modules
        assert is_down or owns, f"{name} (level {own}) imports {target} (level {level(target)})"


def test_every_level_is_of_something_that_exists():
    folders = {".".join(name.split(".")[:end]) for name in FILES for end in range(1, name.count(".") + 2)}
    assert set(LEVELS) <= set(FILES) | folders


def test_the_architecture_page_shows_these_levels():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert f"```\n{levels_table()}\n```" in page, "run: python -m tests.test_architecture"


@pytest.mark.parametrize("name", MODULES)
def test_every_import_of_ours_exists(name):
    assert our_imports(name) - {""} <= set(FILES)


@pytest.mark.parametrize(("one", "other"), [("pipelines", "train"), ("train", "pipelines")])
def test_pipelines_and_train_are_strangers(one, other):
    for name in MODULES:
        if name.split(".")[0] == one:
            assert not {target for target in our_imports(name) if target.split(".")[0] == other}, name


@pytest.mark.parametrize("name", FILES)
def test_diffusers_is_only_a_reference_for_tests(name):
    assert "diffusers" not in {target.split(".")[0] for target in imported(name)}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "torch_private"])
def test_what_torch_does_not_document_is_used_in_one_module(name):
    """No `torch._name`, at any depth below torch, and no operations of its libraries."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            is_private = re.match(r"torch(\.\w+)*\._(?!_)", path) or path.startswith(
                ("torch.ops.onednn", "torch.ops.mkldnn")
            )
            assert not is_private, f"{name} uses {path}: put it into torch_private"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.body[0].lineno  # without the signature: published ones are long
            assert length < MAX_FUNCTION_LINES, f"{name}.{node.name} is too long"


def test_docstrings_begin_with_a_verb_or_a_noun():
    """A clause such as "What is drawn" makes the reader find the noun that it stands for."""
    for name in tracked_files():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    first = (ast.get_docstring(node) or "").partition(" ")[0]
                    assert first not in {"What", "Who", "Where", "Which"}, (
                        f"{name}: {ast.get_docstring(node)}"
                    )


def test_public_names_are_sorted_and_importable():
    assert sana_sprint.__all__ == sorted(sana_sprint.__all__)
    assert set(sana_sprint._HOME) | {"__version__"} == set(sana_sprint.__all__) <= set(dir(sana_sprint))
    for name in sana_sprint.__all__:
        assert getattr(sana_sprint, name) is not None
    with pytest.raises(AttributeError, match="Pipelin"):
        sana_sprint.Pipelin  # noqa: B018  (a misspelt name)


# Others are not imported: some need a package that is only there on some machines.
@pytest.mark.parametrize("name", [name for name in MODULES if "__all__" in FILES[name].read_text("utf-8")])
def test_names_listed_in_all_exist(name):
    # ruff (RUF022) keeps every __all__ sorted.
    module = importlib.import_module(f"{PACKAGE}.{name}")
    for exported in getattr(module, "__all__", []):
        assert hasattr(module, exported), f"{name}.__all__ lists {exported}"


@pytest.mark.parametrize("module", ["sana_sprint", "sana_sprint.cli"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_changelog_starts_with_this_version():
    versions = re.findall(
        r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] in {"Unreleased", sana_sprint.__version__}
    released = [version for version in versions if version != "Unreleased"]
    assert released[:1] in ([], [sana_sprint.__version__])


def test_no_tracked_file_names_a_path_of_one_machine():
    for name in tracked_files():
        data = (ROOT / name).read_bytes()
        if b"\0" in data:  # weights and pictures
            continue
        found = MACHINE_PATH.search(data.decode("utf-8"))
        assert found is None, f"{name} names {found.group()}"


def test_readme_file_map_is_true():
    """Lines of the README's "map" section that begin with a file or folder name begin with a real one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(
        r"^#+ [^\n]*\bmap\b[^\n]*\n(.*?)(?=^#+ |\Z)", readme, re.MULTILINE | re.DOTALL | re.IGNORECASE
    )
    assert section is not None, "the README has no file map"
    files = tracked_files()
    known = {f"/{name}" for name in files} | {
        f"/{parent}/" for name in files for parent in Path(name).parents
    }
    firsts = re.findall(r"^[\s│├└─|*`-]*([\w.][\w./-]*)", section.group(1), re.MULTILINE)
    named = [first for first in firsts if first.endswith("/") or "." in first.strip(".")]
    assert named, "the map names no file"
    for first in named:
        assert any(path.endswith(f"/{first}") for path in known), f"the README's map names {first}"


def test_tests_cannot_reach_the_network():
    import socket

    # 192.0.2.0/24 is reserved for documentation: nothing answers there even without the guard.
    with pytest.raises(RuntimeError, match="must not use the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(RuntimeError, match="must not use the network"):
        socket.getaddrinfo("example.com", 80)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


if __name__ == "__main__":
    written = re.sub(
        r"```\nlevel 0.*?\n```",
        f"```\n{levels_table()}\n```",
        ARCHITECTURE.read_text("utf-8"),
        flags=re.DOTALL,
    )
    ARCHITECTURE.write_text(written, encoding="utf-8")
