"""Whether two checkouts give the same outputs, bit by bit: `python benchmarks/compare_checkouts.py OLD NEW`.

For changes of structure, which must not move a number. Both checkouts run the same items (`--list` names them) in a process
each, at the same time and on one thread each, with random weights that OLD has written; hashes of all tensors and files are
compared. Prints a table, and exits with 1 if anything differs or fails. `--only "training/*"` runs some items; `--allow
"command/info: vocabulary"` names an output, as item and name, that differs on purpose.

    git worktree add --detach ../old v0.1.0
    python benchmarks/compare_checkouts.py ../old .
    python benchmarks/compare_checkouts.py ../old . --speed

`--speed` measures instead: a process of each checkout keeps its model, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from checkouts.environment import environment

BENCHMARKS = Path(__file__).resolve().parent


def main() -> None:
    arguments = parse()
    if arguments.list:
        print("\n".join(list_items(arguments.only)))
        return
    if arguments.speed:
        from checkouts.speed import compare_speed

        compare_speed(arguments.old, arguments.new, arguments.rounds, arguments.only, arguments.threads or 2)
        return
    arguments.threads = arguments.threads or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.keep is None else arguments.keep
        folder.mkdir(parents=True, exist_ok=True)
        run_probes(arguments, folder)
        sides = folder / "old" / "records", folder / "new" / "records"
        rows = [compare_item(*sides, name, arguments.allow) for name in found(folder)]
    report(rows)
    if not rows:
        raise SystemExit("no item has run")
    raise SystemExit(int(any(row["difference"] for row in rows)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?", default=BENCHMARKS.parent, help="a folder of a checkout")
    parser.add_argument("new", type=Path, nargs="?", default=BENCHMARKS.parent, help="another one")
    parser.add_argument("--only", action="append", metavar="GLOB", help="items by name; may be repeated")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="GLOB", help="outputs that may differ"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the items")
    parser.add_argument("--threads", type=int, help="of each process: 1 if left out, 2 for --speed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep all outputs in this new folder")
    parser.add_argument("--speed", action="store_true", help="measure time and peak memory instead")
    parser.add_argument("--rounds", type=int, default=9, help="of --speed")
    return parser.parse_args()


# ----- running --------------------------------------------------------------------------------------------------------


def probe(checkout: Path, threads: int, work: Path, *words: object) -> subprocess.Popen[bytes]:
    """A process that runs `checkouts/probe.py` in the folder `work`."""
    work.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, "-m", "checkouts.probe", *map(str, words)]
    log = (work / "log.txt").open("wb")
    return subprocess.Popen(
        call, cwd=work, env=environment(checkout, threads, work), stdout=log, stderr=subprocess.STDOUT
    )


def list_items(patterns: list[str] | None) -> list[str]:
    code = "from checkouts import probe; from checkouts.record import ITEMS; print('\\n'.join(ITEMS))"
    own = environment(BENCHMARKS.parent, 1, Path(tempfile.gettempdir()))
    out = subprocess.run([sys.executable, "-c", code], env=own, check=True, capture_output=True, text=True)
    return [name for name in out.stdout.split() if any(fnmatch(name, each) for each in patterns or ["*"])]


def run_probes(arguments: argparse.Namespace, folder: Path) -> None:
    """Fixtures, then the items of both checkouts side by side."""
    fixtures = folder.resolve() / "fixtures"
    made = probe(arguments.old, 2 * arguments.threads, folder / "make", "--make", fixtures)
    if made.wait():
        raise SystemExit((folder / "make" / "log.txt").read_text(encoding="utf-8"))
    sides = {"old": arguments.old, "new": arguments.new}
    running = {
        side: probe(
            checkout, arguments.threads, folder / side, "records", fixtures, *(arguments.only or ["*"])
        )
        for side, checkout in sides.items()
    }
    for side, process in running.items():
        if process.wait():
            raise SystemExit(f"{side}: " + (folder / side / "log.txt").read_text(encoding="utf-8")[-4000:])


def found(folder: Path) -> list[str]:
    """Names of the items that have run, in their order."""
    outs = [folder / side / "records" for side in ("old", "new")]
    paths = sorted(
        (path for out in outs for path in out.rglob("facts.json")), key=lambda p: p.stat().st_mtime
    )
    return list(dict.fromkeys(str(path.parent).partition("/records/")[2] for path in paths))


# ----- comparing ------------------------------------------------------------------------------------------------------


def compare_item(old: Path, new: Path, item: str, allowed: list[str]) -> dict[str, Any]:
    """The item's row: how many outputs it has, what differs first, and how many differ as they may."""
    row: dict[str, Any] = {
        "item": item,
        "outputs": 0,
        "seconds": (0.0, 0.0),
        "difference": None,
        "allowed": 0,
    }
    if missing := [
        str(side.parent.name) for side in (old, new) if not (side / item / "facts.json").is_file()
    ]:
        return {**row, "difference": f"has not run in {missing[0]}"}
    facts = [json.loads((side / item / "facts.json").read_text(encoding="utf-8")) for side in (old, new)]
    row["seconds"] = tuple(each["seconds"] for each in facts)
    if any(each["error"] for each in facts):
        return {**row, "difference": f"failed: old {facts[0]['error']}; new {facts[1]['error']}"}
    was, now = (json.loads((side / item / "entries.json").read_text(encoding="utf-8")) for side in (old, new))
    row["outputs"] = len(was)
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    differing = [name for name in changed if not any(fnmatch(f"{item}: {name}", glob) for glob in allowed)]
    row["allowed"] = len(changed) - len(differing)
    if not was:
        row["difference"] = "nothing was noted"
    elif differing:
        first = differing[0]
        what = describe(was.get(first), now.get(first), [side / item for side in (old, new)], first)
        row["difference"] = f"{len(differing)} differ, the first: {first}: {what}"
        row["all"] = differing
    return row


def describe(was: Any, now: Any, folders: list[Path], name: str) -> str:
    """How an output differs."""
    if was is None or now is None:
        return "is new" if was is None else "is gone"
    if "tensor" in was and "tensor" in now:
        if (was["shape"], was["dtype"]) != (now["shape"], now["dtype"]):
            return f"{was['dtype']} {was['shape']} became {now['dtype']} {now['shape']}"
        from safetensors import safe_open

        tensors = []
        for folder in folders:
            with safe_open(folder / "tensors.safetensors", framework="pt") as reader:
                tensors.append(reader.get_tensor(name).double())
        error = (tensors[0] - tensors[1]).abs()
        return f"max abs error {error.max():.3g} of {tensors[0].abs().max():.3g}, {int((error > 0).sum())} numbers"
    return first_difference(was.get("value"), now.get("value"))


def first_difference(was: Any, now: Any, path: str = "") -> str:
    """The first place at which two JSON values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if was.get(key) != now.get(key) or (key in was) != (key in now):
                return first_difference(was.get(key), now.get(key), f"{path}.{key}")
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (one, other) in enumerate(zip(was, now, strict=True)):
            if one != other:
                return first_difference(one, other, f"{path}[{i}]")
    return f"{path} {json.dumps(was)[:200]} became {json.dumps(now)[:200]}"


def report(rows: list[dict[str, Any]]) -> None:
    print("| item | outputs | s old | s new | |\n|---|---|---|---|---|")
    for row in rows:
        old, new = row["seconds"]
        verdict = row["difference"] or (
            "equal" if not row["allowed"] else f"equal but for {row['allowed']} allowed"
        )
        print(f"| {row['item']} | {row['outputs']} | {old:.1f} | {new:.1f} | {verdict} |")
    different = [row for row in rows if row["difference"]]
    outputs = sum(row["outputs"] for row in rows)
    print(
        f"\n{len(rows)} items, {outputs} outputs: {len(rows) - len(different)} items equal, {len(different)} different"
    )
    for row in different:
        for name in row.get("all", [])[:20]:
            print(f"  {row['item']}: {name}")


if __name__ == "__main__":
    main()
