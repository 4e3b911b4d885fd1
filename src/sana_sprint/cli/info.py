"""`sana-sprint info`: what a model folder holds, read from its configs and the headers of its weight files."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from sana_sprint.cli.common import CommandError

# safetensors' names of number formats; others are shown as they are.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64"}
INDEX_SUFFIX = ".index.json"  # of the file that says which shard holds which tensor
SHOWN_WORDS = 12
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Components without weights, by the end of their class names.
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "TokenizersBackend")


@dataclass
class Component:
    """One folder. `parameters` counts numbers of all tensors once, `dtypes` says how many are stored in which type."""

    class_name: str
    parameters: int = 0
    bytes: int = 0  # of all files in the folder
    dtypes: dict[str, int] = field(default_factory=dict)
    variants: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def info(
    model: Annotated[
        str, typer.Argument(help="'emoji' (comes with the package), a folder, or a Hub id owner/name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a Hub model that is not on this machine yet.")
    ] = False,
) -> None:
    """Show what a model consists of, without loading it."""
    folder = _find(model, download=download)
    index, parts = _parts(folder)
    components = {name: _inspect(path, class_name) for name, (path, class_name) in parts.items()}
    summary = {
        "model": model,
        "folder": str(folder),
        "pipeline": index,
        "native_size": _native_size(parts),
        "vocabulary": _vocabulary(folder),
        "parameters": sum(component.parameters for component in components.values()),
        "bytes": sum(component.bytes for component in components.values()),
        "components": {name: asdict(component) for name, component in components.items()},
    }
    typer.echo(json.dumps(summary, indent=2) if as_json else "\n".join(_lines(summary)))
    if broken := [name for name, component in components.items() if component.problems]:
        first = components[broken[0]].problems[0]
        raise CommandError(
            f"{model} is not complete ({', '.join(broken)}): {first}",
            hint="copy or download the folder again",
        )


def _find(model: str, *, download: bool) -> Path:
    from sana_sprint.weights import WeightsError, resolve_folder

    try:
        return resolve_folder(model, local_files_only=not download)
    except WeightsError as error:
        hint = "a model is 'emoji', a folder, or a Hub id owner/name"
        if not download and "local_files_only" in str(error):
            hint = f"fetch it with `sana-sprint info {model} --download`"
        raise CommandError(str(error), hint=hint) from error


def _parts(folder: Path) -> tuple[str | None, dict[str, tuple[Path, str]]]:
    """(pipeline class or None for a single component, component name -> (its folder, class name))"""
    from sana_sprint.weights import read_model_index
    from sana_sprint.weights.files import CONFIG_NAME, read_json

    if (folder / CONFIG_NAME).is_file() and not (folder / "model_index.json").is_file():
        config = read_json(folder / CONFIG_NAME)
        class_name = config.get("_class_name") or next(iter(config.get("architectures") or ["unknown"]))
        return None, {folder.resolve().name: (folder, str(class_name))}
    index = read_model_index(folder)
    present = {name: (folder / name, what[1]) for name, what in index.components.items() if what is not None}
    branch = folder / "controlnet" / CONFIG_NAME
    if branch.is_file():  # need not be listed: the pipeline from text does without it
        present.setdefault(
            "controlnet", (branch.parent, str(read_json(branch).get("_class_name", "unknown")))
        )
    return index.class_name, present


# ----- one component --------------------------------------------------------------------------------------------------


def _inspect(folder: Path, class_name: str) -> Component:
    from sana_sprint.weights import available_variants
    from sana_sprint.weights.files import file_names

    component = Component(class_name)
    if not folder.is_dir():
        component.problems.append(f"no folder {folder}")
        return component
    files = [folder / name for name in file_names(folder)]
    component.bytes = sum(path.stat().st_size for path in files)
    component.variants = [variant for variant in available_variants(folder) if variant]
    # A variant repeats the plain files' tensors: those come last, so that their formats are shown.
    files.sort(key=lambda path: not any(f".{variant}." in path.name for variant in component.variants))
    tensors: dict[str, tuple[int, str]] = {}
    for path in (path for path in files if path.suffix == ".safetensors"):
        try:
            for key, entry in read_header(path).items():
                tensors[key] = (math.prod(entry["shape"]), entry["dtype"])
        except ValueError as error:
            component.problems.append(str(error))
    for count, kind in tensors.values():
        name = DTYPES.get(kind, kind)
        component.dtypes[name] = component.dtypes.get(name, 0) + count
    component.parameters = sum(component.dtypes.values())
    component.problems += _missing(folder, files, has_tensors=bool(tensors), class_name=class_name)
    return component


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file; reads nothing else of it.

    Raises:
        ValueError: not a whole safetensors file.
    """
    from sana_sprint.weights.files import impostor

    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is {impostor(path) or 'not safetensors, or cut short'}") from error
    if end != size:
        raise ValueError(f"{path} has {size} bytes, its header says {end}")
    return header


def _missing(folder: Path, files: list[Path], *, has_tensors: bool, class_name: str) -> list[str]:
    """Files missing from a component's folder."""
    from sana_sprint.weights.files import read_json

    problems = []
    for index in (path for path in files if path.name.endswith(INDEX_SUFFIX)):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [name for name in shards if not (folder / name).is_file()]
        problems += [f"{index} lists {len(shards)} shards, {len(absent)} missing"] if absent else []
    if not has_tensors and not problems and not class_name.endswith(WEIGHTLESS):
        problems.append(f"{folder} has no safetensors weights")
    return problems


# ----- the whole ------------------------------------------------------------------------------------------------------


def _native_size(parts: dict[str, tuple[Path, str]]) -> int | None:
    """Side in pixels of the square picture the model was trained on, if the folder tells."""
    from sana_sprint.resolutions import native_size
    from sana_sprint.weights.files import CONFIG_NAME, read_json

    paths = [parts[name][0] / CONFIG_NAME for name in ("transformer", "vae") if name in parts]
    if len(paths) < 2 or not all(path.is_file() for path in paths):
        return None
    transformer, vae = map(read_json, paths)
    stages = vae.get("encoder_block_out_channels")
    if not isinstance(stages, list) or not isinstance(transformer.get("sample_size"), int):
        return None
    # Every stage after the first halves the sides.
    return native_size(int(transformer["sample_size"]), 2 ** (len(stages) - 1))


def _vocabulary(folder: Path) -> list[str] | None:
    """The words that the model was taught, sorted; None if the folder does not say."""
    from sana_sprint import vocabulary

    found = vocabulary.read(folder)
    return None if found is None else sorted(found.words)


def _lines(summary: dict[str, Any]) -> list[str]:
    native = summary["native_size"]
    facts = {
        "model": summary["model"],
        "folder": summary["folder"],
        "pipeline": summary["pipeline"] or "none: a single component",
        "picture": f"{native}x{native}" if native else "unknown",
        "parameters": f"{summary['parameters']:,}",
        "size": readable_bytes(summary["bytes"]),
    }
    if (words := summary["vocabulary"]) is not None:
        facts["words"] = f"{len(words)}: {', '.join(words[:SHOWN_WORDS])}, ... (all with --json)"
    rows = [("component", "class", "parameters", "stored as", "size")]
    for name, part in summary["components"].items():
        kinds = ", ".join(kind for kind, _ in Counter(part["dtypes"]).most_common()) or "-"
        kinds += "".join(f", variant {variant}" for variant in part["variants"])
        count = f"{part['parameters']:,}" if part["parameters"] else "-"
        rows.append((name, part["class_name"], count, kinds, readable_bytes(part["bytes"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [*(f"{name:<11} {value}" for name, value in facts.items()), "", *table]


def readable_bytes(count: int) -> str:
    """1234567 -> "1.2 MB" (decimal units, as disks and download pages have them)."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}" if unit != "B" else f"{count} B"
