"""Every form of a data source gives the same samples; what is damaged is named, counted and limited."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_sprint.train.data import VALIDATION_START, Unreadable, open_source
from sana_sprint.train.data.prefetch import read_ahead
from sana_sprint.train.data.source import RecordSource
from tests.helpers.data import CAPTIONS, WRITERS, Writer, encoded, pixels, png, write_folder, write_jsonl

PICTURES = [png(i) for i in range(3)]


@pytest.fixture(params=WRITERS, ids=str)
def write(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


def opened(path: Path, **settings: Any) -> RecordSource:
    source = open_source(str(path), **settings)
    assert isinstance(source, RecordSource)
    return source


def test_every_form_holds_the_same_samples(write: Writer, tmp_path: Path) -> None:
    source = opened(write(tmp_path, PICTURES, CAPTIONS))
    assert source.training == [0, 1, 2]
    for position in (2, 0, 1):  # in any order
        image, captions = source.sample(position)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, pixels(PICTURES[position]))
        assert captions == CAPTIONS[position]
    assert len({source.name(position) for position in range(3)}) == 3


def test_a_hash_is_of_the_content_and_of_nothing_else(write: Writer, tmp_path: Path) -> None:
    def digest(name: str, pictures: list[bytes], captions: Any) -> str:
        return opened(write(tmp_path / name, pictures, captions)).digest(range(3))

    before = digest("a", PICTURES, CAPTIONS)
    assert digest("elsewhere", PICTURES, CAPTIONS) == before
    assert digest("recaptioned", PICTURES, [*CAPTIONS[:2], ("a red picture",)]) != before
    changed = bytearray(PICTURES[2])
    changed[-20] ^= 1  # one bit of the data, neither name nor size
    assert digest("changed", [*PICTURES[:2], bytes(changed)], CAPTIONS) != before
    assert digest("swapped", [PICTURES[1], PICTURES[0], PICTURES[2]], CAPTIONS) != before


def test_the_stream_visits_every_picture_once_an_epoch(tmp_path: Path) -> None:
    pictures = [png(i) for i in range(7)]
    source = opened(write_folder(tmp_path, pictures, [[str(i)] for i in range(7)]))
    stream = [int(source(i)[1][0]) for i in range(21)]
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [int(opened(tmp_path)(i)[1][0]) for i in (9, 3, 20)] == [stream[9], stream[3], stream[20]]


def test_validation_pictures_are_never_trained_on(tmp_path: Path) -> None:
    source = opened(write_folder(tmp_path, [png(0)] * 100, [[str(i)] for i in range(100)]))
    trained = {source(i)[1][0] for i in range(98)}
    shown = {source(VALIDATION_START + i)[1][0] for i in range(5)}
    assert (len(trained), len(shown)) == (98, 2)
    assert not trained & shown


def test_a_set_that_grows_keeps_its_validation_pictures() -> None:
    class Blank(list[Any]):
        name = str

    small, large = (RecordSource(Blank([None] * n), report=print, max_bad=0) for n in (149, 20_000))
    assert list(small.validation) == [49, 99] == list(large.validation)[:2]
    assert list(small.training) == list(large.training)[: len(small.training)]
    assert (len(large.validation), len(large.training)) == (128, 20_000 - 128)


def test_an_unreadable_picture_is_replaced_named_and_told_once(write: Writer, tmp_path: Path) -> None:
    said: list[str] = []
    source = opened(
        write(tmp_path, [PICTURES[0], b"no picture", PICTURES[2]], CAPTIONS), report=said.append, max_bad=0.4
    )
    seen = [source(i)[1] for i in range(9)]
    assert set(seen) == {CAPTIONS[0], CAPTIONS[2]}
    assert list(source.skipped) == [source.name(1)]
    assert said == [f"skipped {source.name(1)}: no picture that can be decoded"]
    with pytest.raises(Unreadable, match="no picture that can be decoded"):
        source.sample(1)


def test_more_than_the_limit_stops(write: Writer, tmp_path: Path) -> None:
    source = opened(write(tmp_path, [PICTURES[0], b"no picture", PICTURES[2]], CAPTIONS), max_bad=0.3)
    with pytest.raises(ValueError, match=r"1 of 3 samples cannot be used, more than 30\.0%"):
        list(map(source, range(3)))


def test_a_set_without_any_readable_picture_ends(tmp_path: Path) -> None:
    source = opened(write_folder(tmp_path, [b"", b"\x89PNG"], [[], []]), max_bad=1.0)
    with pytest.raises(ValueError, match=r"none of 2 pictures can be read.*0000\.png|0001\.png"):
        source(0)


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_cut_picture_is_unreadable(kind: str, cut: float, tmp_path: Path) -> None:
    data = encoded(Image.open(io.BytesIO(png(0, (64, 64)))), kind)
    (tmp_path / f"cut.{kind.lower()}").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(Unreadable, match=rf"cut\.{kind.lower()}: ."):
        opened(tmp_path).sample(0)


def test_missing_files_and_bad_rows_are_samples_like_others(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, PICTURES, CAPTIONS)
    bad = [
        '{"image": "absent.png"}',
        "{broken",
        "[1]",
        '{"caption": "no path"}',
        '{"image": "pictures/0000.png"}',
    ]
    path.write_text(path.read_text() + "\n".join(bad))
    source = opened(path)
    for position, word in (
        (3, "No such file"),
        (4, "not JSON"),
        (5, "not a JSON object"),
        (6, "no picture's path"),
    ):
        with pytest.raises(Unreadable, match=word) as error:
            source.sample(position)
        assert error.value.name.startswith(
            f"{path}:{position + 3}"
        )  # two blank lines lie between the first rows
    assert source.sample(7)[1] == ("",)


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("a.txt", " one \n\n two\n", ("one", "two")),
        ("a.txt", "\ufeffwith a mark", ("with a mark",)),
        ("a.txt", "\n", ("",)),
        ("a.caption", "one", ("one",)),
        ("a.json", '{"prompt": "one", "text_2": ["two", "one", "", 3], "width": 5}', ("one", "two")),
        ("b.txt", "another's", ("",)),
    ],
)
def test_captions_beside_a_picture(name: str, text: str, captions: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert opened(tmp_path).sample(0)[1] == captions


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"\xff\xfe\xfa"), ("a.json", b"{"), ("a.json", b"[]")])
def test_captions_that_cannot_be_read_are_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Unreadable, match=r"a\.png: its captions: "):
        opened(tmp_path).sample(0)


def test_a_folder_is_read_at_any_depth_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.JPG", "deep/er/a.png", "._b.jpg", ".thumbnails/b.png", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(0))
    source = opened(tmp_path)
    assert [source.name(i) for i in source.training] == [
        str(tmp_path / "b.JPG"),
        str(tmp_path / "deep/er/a.png"),
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata_is_a_table(name: str, tmp_path: Path) -> None:
    path = WRITERS[Path(name).suffix[1:]](tmp_path, PICTURES, CAPTIONS)
    path.rename(tmp_path / name)
    assert opened(tmp_path).sample(1)[1] == CAPTIONS[1]


def test_parquet_with_paths(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_folder(tmp_path / "pictures", PICTURES, [[]] * 3)
    rows = {"path": ["pictures/0000.png", None, "absent.png"], "prompt": ["one", "two", "three"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "set.parquet")
    source = opened(tmp_path / "set.parquet")
    np.testing.assert_array_equal(source.sample(0)[0], pixels(PICTURES[0]))
    with pytest.raises(Unreadable, match=r"set\.parquet:1: column 'path' has neither bytes nor a path"):
        source.sample(1)
    with pytest.raises(Unreadable, match=r"set\.parquet:2: No such file"):
        source.sample(2)


def test_threads_read_a_row_group_of_parquet_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    source = opened(WRITERS["parquet"](tmp_path, [png(i) for i in range(7)], [["x"]] * 7))
    read, real = [], parquet.ParquetFile.read_row_group

    def counted(self: Any, group: int, **settings: Any) -> Any:
        read.append(group)
        return real(self, group, **settings)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    assert len(list(read_ahead(source.sample, range(7)))) == 7
    assert sorted(read) == [0, 0, 1, 2]  # six rows in three groups of the first file, one in the second


def test_the_headers_of_a_tar_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(WRITERS["tar"](tmp_path, PICTURES, CAPTIONS))
    monkeypatch.setattr(tarfile, "open", None)
    for position in (2, 0, 1):
        np.testing.assert_array_equal(source.sample(position)[0], pixels(PICTURES[position]))


def test_a_function_may_give_any_number_of_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\ndef picture(i): return np.full((2, 2, 3), i, np.uint8)\n"
    code += "def one(i): return picture(i), 'one'\ndef two(i): return picture(i), ['one', 'two']\n"
    (tmp_path / "drawn_here.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sources = [open_source(f"drawn_here:{name}") for name in ("picture", "one", "two")]
    assert [source(3)[1] for source in sources] == [("",), ("one",), ("one", "two")]
    assert sources[0](3)[0].max() == 3
    assert sources[0].name(3) == "drawn_here:picture(3)"
    before = sources[1].digest(range(8))
    assert before == open_source("drawn_here:one").digest(range(8)) != sources[2].digest(range(8))
    (tmp_path / "drawn_here.py").write_text(code + "# the same pictures, but who could know\n")
    assert sources[1].digest(range(8)) != before
    monkeypatch.delitem(sys.modules, "drawn_here")


def _cut_tar(folder: Path) -> Path:
    path = WRITERS["tar"](folder, PICTURES, CAPTIONS) / "a.tar"
    path.write_bytes(path.read_bytes()[:700])
    return path


def _gzipped(folder: Path) -> Path:
    import gzip

    path = WRITERS["tar"](folder, PICTURES, CAPTIONS) / "a.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def _two_kinds(folder: Path) -> Path:
    return WRITERS["tar"](WRITERS["parquet"](folder, PICTURES, CAPTIONS), PICTURES, CAPTIONS)


def _written(name: str, data: bytes) -> Any:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def _no_column(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"url": ["x"]}), folder / "set.parquet")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "neither a folder nor"),
        (lambda folder: folder, "has no pictures; looked for .avif"),
        (_cut_tar, "cannot read the tar"),
        (_gzipped, "must be whole and uncompressed"),
        (_two_kinds, "sets of several kinds, such as a.tar and a.parquet: name one file"),
        (_written("set.parquet", b"PAR1"), "cannot read the parquet file"),
        (_no_column, "no picture column; looked for image, .* among url"),
        (_written("set.jsonl", b""), "has no rows"),
        (_written("set.csv", b"image,caption\n"), "has no rows"),
        (_written("set.csv", "image,caption\na.png,caf\u00e9\n".encode("latin-1")), "cannot read the table"),
        (_written("set.zip", b""), "neither a folder nor"),
        (lambda _: "tests.helpers.data:absent", "cannot be imported"),
    ],
)
def test_bad_sources_are_named(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(str(make(tmp_path)))


def test_parquet_without_pyarrow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS["parquet"](tmp_path, PICTURES, CAPTIONS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pyarrow"):
        open_source(str(path))


def test_jsonl_keeps_unicode_line_separators_inside_a_caption(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, PICTURES[:1], [["x"]])
    path.write_text(json.dumps({"image": "pictures/0000.png", "caption": "one\u2028two"}, ensure_ascii=False))
    assert opened(path).sample(0)[1] == ("one\u2028two",)
