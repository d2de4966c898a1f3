"""A path is a path, and no file and no row is left out without a word."""

import bz2
import gzip
import json
import lzma
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
from corpus import Reading, find_files, read_documents, start
from data import DataError


def read(*patterns, **options):
    """All documents, and the position after them."""
    position = start()
    return list(read_documents(find_files(patterns), Reading(**options), position)), position


def refusal(*patterns, **options):
    with pytest.raises(DataError) as error:
        read(*patterns, **options)
    assert len(str(error.value)) <= 1000
    return str(error.value)


def write_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")


# ---- names ---------------------------------------------------------------------------------------

NAMES = [
    "plain.txt",
    "Interview [part 1].txt",
    "doc*.txt",
    "doc?.txt",
    "a::b.txt",
    "x#1.txt",
    "100%25.txt",
    "with space.txt",
    'quote\'d "name".txt',
    "-dash.txt",
    "ünïcödé ☃.txt",
    "{a,b}.txt",
    "UPPER.TXT",
    "two.dots.v2.txt",
    "line\nend.txt",
]


@pytest.mark.parametrize("how", ["each by name", "pattern", "folder", "all three"])
def test_every_name_is_read_once(here, how):
    folder = here / "texts"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"content of {name}")
    named = {
        "each by name": [str(folder / name) for name in NAMES],
        "pattern": ["texts/*"],
        "folder": ["texts"],
    }
    named["all three"] = sum(named.values(), [])
    documents, position = read(*named[how])
    assert sorted(documents) == sorted(f"content of {name}" for name in NAMES)
    assert position["documents"] == position["file"] == len(NAMES)


def test_what_exists_under_a_pattern_s_name_is_that_file(here):
    for name in "doc*.txt", "doc1.txt", "[a].txt", "a.txt":
        (here / name).write_text(name)
    assert read("doc*.txt")[0] == ["doc*.txt"]
    assert read("[a].txt")[0] == ["[a].txt"]
    assert read("doc[*1].txt")[0] == ["doc*.txt", "doc1.txt"]


@pytest.mark.parametrize("folder", ["a [b] c", "texts*", "what?", "one/[two]"])
def test_the_folders_that_a_pattern_begins_with_are_no_pattern(here, folder):
    (here / folder).mkdir(parents=True)
    (here / "a b c").mkdir()  # what the first would mean as a pattern
    for name in "one.txt", "two.txt", "three.md":
        (here / folder / name).write_text(name)
    assert read(f"{folder}/*.txt")[0] == ["one.txt", "two.txt"]
    assert read(str(here / folder / "t*"))[0] == ["three.md", "two.txt"]
    assert len(read(f"{folder}/**/*")[0]) == 3


def test_home_links_and_folders_in_folders(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    deep = here / "texts/a/b"
    deep.mkdir(parents=True)
    (deep / "deep.txt").write_text("deep")
    (here / "texts/top.txt").write_text("top")
    (here / "texts/.hidden.txt").write_text("hidden")
    (here / "other/c").mkdir(parents=True)
    (here / "other/c/linked.txt").write_text("linked")
    os.symlink(here / "other", here / "texts/other")
    os.symlink(deep / "deep.txt", here / "texts/link.txt")
    os.symlink(here / "texts", deep / "circle")
    assert read("~/texts")[0] == ["deep", "linked", "top"]
    assert sorted(read("texts/**/*.txt", "~/texts/top.txt")[0]) == ["deep", "linked", "top"]


def test_each_pattern_that_finds_nothing_is_named(here):
    (here / "a.txt").write_text("a")
    (here / "empty folder").mkdir()
    os.symlink("nowhere", here / "dangling.txt")
    said = refusal("a.txt", "b*.txt", "c.txt", "empty folder", "dangling.txt")
    assert "'b*.txt', 'c.txt', 'empty folder', 'dangling.txt'" in said and "a.txt'," not in said
    assert "x0.txt" in refusal(*(f"x{i}.txt" for i in range(10_000)))


def test_a_kind_that_is_not_read_is_named(here):
    (here / "a.txt").write_text("a")
    (here / "b.pdf").write_bytes(b"%PDF")
    (here / "c").write_text("c")
    said = refusal(str(here))
    assert "b.pdf: files of kind .pdf are not read (2 of 3" in said and ".parquet" in said
    assert "kind none" in refusal("c")


# ---- files that cannot be read as they are -------------------------------------------------------

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_and_those_cut_short(here, kind, suffix):
    random.seed(0)
    rows = [{"text": "".join(random.choices("abcdef ", k=500))} for _ in range(200)]
    content = "\n".join(map(json.dumps, rows)).encode()
    name = f"a.{kind}{suffix}"
    whole = PACK[suffix](content)
    (here / name).write_bytes(whole)
    expected = [content.decode()] if kind == "txt" else [row["text"] for row in rows]
    assert read(name)[0] == expected
    for cut in whole[: len(whole) // 2], b"", b"not packed at all":
        (here / name).write_bytes(cut)
        said = refusal(name)
        assert name in said and ("fetch or write it again" in said or "no text" in said)


def test_zst(here):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("one", "two")]
    (here / "a.jsonl.zst").write_bytes(b"".join(frames))  # two frames, as parallel packers write
    assert read("a.jsonl.zst")[0] == ["one", "two"]


@pytest.mark.parametrize("separator", ["", "---"])
def test_another_encoding_is_refused_with_its_place_and_remedy(here, separator):
    text = "naïve café, ☃"
    (here / "a.txt").write_text("good")
    (here / "b.txt").write_bytes(("ü" * 700_000 + "caf").encode() + b"\xe9 and more")
    said = refusal("a.txt", "b.txt", separator=separator)
    assert "b.txt" in said and "byte 0xe9 at position 1,400,003" in said and "cp1252" in said
    documents, position = read("a.txt", "b.txt", separator=separator, skip_unusable=True)
    assert documents == ["good"] and position["skipped"] == 1
    (here / "c.txt").write_bytes("café".encode("cp1252"))
    assert read("c.txt", encoding="cp1252")[0] == ["café"]
    for encoding in "utf-16", "utf-32", "utf-16-le", "shift_jis":
        ours = "カフェ" if encoding == "shift_jis" else text
        (here / "d.txt").write_bytes(ours.encode(encoding))
        assert read("d.txt", encoding=encoding)[0] == [ours]
        assert "d.txt" in refusal("d.txt")
        (here / "d.jsonl").write_bytes(f'{{"text": "{ours}"}}\n'.encode(encoding) if encoding
                                       == "shift_jis" else b'{"text": "a"}\n')  # fmt: skip
    (here / "e.txt").write_bytes("plain ascii".encode("utf-16"))
    assert "--encoding utf-16" in refusal("e.txt")
    (here / "e.txt").write_bytes("plain ascii".encode("utf-16-le"))  # valid UTF-8, with zeros
    assert "--encoding utf-16-le" in refusal("e.txt")


@pytest.mark.quick
def test_a_byte_order_mark_does_not_hide_the_first_row(here):
    row = json.dumps({"text": "one"})
    for name in "a.jsonl", "a.json":
        (here / name).write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n" + row.encode())
        assert read(name)[0] == ["one", "one"]
    (here / "b.json").write_bytes(b"\xef\xbb\xbf[" + row.encode() + b"]")
    assert read("b.json")[0] == ["one"]


@pytest.mark.quick
def test_an_empty_file_is_an_error_or_counted(here):
    (here / "a.txt").write_text("a")
    (here / "b.txt").write_text("")
    (here / "c.txt").write_bytes(b"\xef\xbb\xbf")
    (here / "d.jsonl").write_text("")
    (here / "e.jsonl").write_text('{"text": ""}\n{"text": null}\n\n')
    assert "b.txt: there is no text in this file; or leave out" in refusal("a.txt", "b.txt")
    for name in "c.txt", "d.jsonl", "e.jsonl":
        assert f"{name}: there is no text" in refusal(name)
    documents, position = read("*.txt", "*.jsonl", skip_unusable=True)
    assert documents == ["a"] and position["file"] == 5
    assert position["skipped"] + position["empty"] == 2 + 1 + 3


# ---- documents of a text file --------------------------------------------------------------------


@settings(max_examples=100)
@given(
    pieces=st.lists(st.text("ab\n<|>", max_size=20), min_size=1, max_size=20),
    separator=st.sampled_from(["<|>", "\n", "\n\n", "ab"]),
    size=st.integers(1, 30),
)
def test_separators_are_found_wherever_the_chunks_end(pieces, separator, size):
    whole = separator.join(pieces)
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert list(corpus._pieces(iter(chunks), separator)) == whole.split(separator)


def test_a_long_document_between_separators_takes_no_longer_than_its_length(here):
    (here / "a.txt").write_text("x" * 40_000_000 + "<|endoftext|>y")
    begun = time.monotonic()
    assert list(map(len, read("a.txt", separator="<|endoftext|>")[0])) == [40_000_000, 1]
    assert time.monotonic() - begun < 5


def test_separated_documents_and_line_ends(here):
    (here / "a.txt").write_bytes(b"one\r\n\n<|end|>\ntwo\n  lines\n<|end|>\n")
    assert read("a.txt", separator="<|end|>")[0] == ["one", "two\n  lines"]
    assert read("a.txt")[0] == ["one\r\n\n<|end|>\ntwo\n  lines\n<|end|>\n"]  # as it is


# ---- rows ----------------------------------------------------------------------------------------


def test_other_columns_may_be_of_any_type_and_come_late(here):
    rows = [{"text": f"row {i}", "meta": None} for i in range(3000)]
    rows += [{"text": "late", "meta": {"lang": "en"}, "new": [1, "x"]}, {"text": "int", "meta": 7}]
    write_lines(here / "a.jsonl", *rows)
    write_lines(here / "b.jsonl", {"id": "x", "text": "b"}, {"id": 1, "text": "c"})
    documents, _ = read("a.jsonl", "b.jsonl")
    assert documents == [row["text"] for row in rows] + ["b", "c"]


def test_parquet_reads_the_text_s_column_alone(here):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", None, "b"]}), here / "a.parquet")
    other = {"url": [1], "text": ["c"], "data": [{"text": "d", "n": 1}], "parts": [["x", "y"]]}
    pq.write_table(pa.table(other), here / "b.parquet")
    ends, no_utf8 = pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")
    other = {"text": ["fine"], "broken": pa.StringArray.from_buffers(1, ends, no_utf8)}
    pq.write_table(pa.table(other), here / "d.parquet")
    assert read("d.parquet")[0] == ["fine"]
    assert "d.parquet: could not be read" in refusal("d.parquet", text_key="broken")
    pq.write_table(pa.table({"text": pa.array([b"\xff"], pa.binary())}), here / "c.parquet")
    documents, position = read("a.parquet", "b.parquet")
    assert documents == ["a", "b", "c"] and position["empty"] == 1
    assert read("b.parquet", text_key="data.text")[0] == ["d"]
    said = refusal("b.parquet", text_key="body")
    assert (
        "b.parquet: no text in column 'body'; pass --text-key, one of url, text, data.text" in said
    )
    assert "b.parquet, row 1: column 'parts' holds a list" in refusal("b.parquet", text_key="parts")
    assert "c.parquet, row 1: column 'text' holds a bytes" in refusal("c.parquet")
    whole = (here / "a.parquet").read_bytes()
    for damaged in whole[: len(whole) // 2], b"no parquet":
        (here / "a.parquet").write_bytes(damaged)
        assert "a.parquet: could not be read after row 0" in refusal("a.parquet")


UNUSABLE = [
    ({"body": "x", "n": 1}, "no text in column 'text'; pass --text-key, one of body;"),
    ({"data": {"text": "x"}}, "one of data.text;"),
    ({"n": 1, "turns": [{"text": "x"}]}, "this row has n (a int), turns (a list); write files"),
    ({}, "no text in column 'text'; this row is empty; write files that have one text in a row"),
    ({"text": 3}, "holds a int, not text: 3"),
    ({"text": ["a" * 10**6]}, "holds a list, not text: ['aaa"),
    ({"text": {"de": "x"}}, "pass --text-key, one of text.de"),
    ("[1, 2]", "[1, 2] is no object with columns"),
    ('"just a string"', "just a string is no object"),
    ("{broken", "no JSON"),
    ("[" * 100_000, "no JSON"),
]


@pytest.mark.quick
@pytest.mark.parametrize("row, says", UNUSABLE)
def test_a_row_that_cannot_be_used_is_named_or_counted(here, row, says):
    write_lines(here / "a.jsonl", {"text": "one"}, row, {"text": "two"})
    said = refusal("a.jsonl")
    assert said.startswith("a.jsonl, row 2: ") and says in said and "--skip-unusable" in said
    documents, position = read("a.jsonl", skip_unusable=True)
    assert documents == ["one", "two"] and position["skipped"] == 1


def test_bytes_of_another_encoding_in_one_row(here):
    (here / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "two"}\n')
    assert "a.jsonl, row 2: byte 0xe9 at position 13 is no UTF-8" in refusal("a.jsonl")
    documents, position = read("a.jsonl", skip_unusable=True)
    assert documents == ["one", "two"] and position["skipped"] == 1


def test_a_json_list_and_json_lines_alike(here):
    rows = [{"text": "one"}, {"text": "two"}]
    (here / "list.json").write_text(json.dumps(rows, indent=2))
    write_lines(here / "lines.json", *rows)
    write_lines(here / "lines.ndjson", *rows)
    for name in "list.json", "lines.json", "lines.ndjson":
        assert read(name)[0] == ["one", "two"]
    (here / "bad.json").write_text('[{"text": "one"}')
    assert "bad.json: could not be read" in refusal("bad.json")


def test_a_column_s_name_may_have_a_dot(here):
    write_lines(here / "a.jsonl", {"data.text": "whole", "data": {"text": "part"}})
    assert read("a.jsonl", text_key="data.text")[0] == ["whole"]


# ---- continuing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(8))
def test_reading_continues_after_any_document(here, after):
    write_lines(here / "a.jsonl", {"text": "1"}, {"text": ""}, {"text": "2"}, {"n": 1}, "{}")
    (here / "b.txt").write_text("3|4||5")
    (here / "c.txt").write_text("")
    write_lines(here / "d.jsonl", {"text": "6"}, {"text": "7"}, {"text": None})
    options = {"separator": "|", "skip_unusable": True}
    everything, last = read(".", **options)
    assert everything == list("1234567") and (last["empty"], last["skipped"]) == (4, 2)
    position = start()
    texts = read_documents(find_files(["."]), Reading(**options), position)
    first = [text for _, text in zip(range(after), texts)]
    position = json.loads(json.dumps(position))  # as a file of progress keeps it
    rest = list(read_documents(find_files(["."]), Reading(**options), position))
    assert [*first, *rest] == everything and position == last
