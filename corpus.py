"""
From files to documents: which files a corpus has, and the text of each row of them.

    files = find_files(["texts/*.txt", "more texts"])
    for text in read_documents(files, Reading(), start()): ...

Local files and those of a Hub data set are read in the same way, by the functions of READERS. A
text file is one document, or several between separators. In .jsonl, .json and .parquet files each
row is a document, and only its text column is read. No file and no row is left out without a word.
"""

import bz2
import codecs
import glob
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from data import DataError, brief, probe

CHUNK_BYTES = 1 << 20
BAD_BYTES = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of them
OFFLINE = (
    "offline: python prepare_data.py (the standard library's sources), or --files with texts of "
    "yours"
)


@dataclass
class Reading:
    """How files are read; each field is an option of prepare_data.py."""

    text_key: str = "text"  # the column of the text, or a path such as data.text
    separator: str = ""  # between the documents of a text file; "": the file is one document
    encoding: str = "utf-8"
    skip_unusable: bool = False  # count rows and files that cannot be used instead of raising


class Unusable(DataError):
    """Why a row, or a file that is one document, cannot be used. Readers give it in place of the
    text, since a generator that raised could not go on with the next row."""


# ---- which files ---------------------------------------------------------------------------------


def find_files(patterns):
    """patterns: paths of files, paths of folders (all files below them that are not hidden), or
    glob patterns. A name that exists is a path, even if it has * or ? or [ in it, and so are the
    folders with which a pattern begins.
    -> sorted paths, each file once. Raises DataError, which names the patterns that find nothing.
    """
    paths, nothing, seen = [], [], set()
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        matches = [name] if os.path.lexists(name) else _matches(name)
        files = [file for match in matches for file in _files_below(match)]
        if not files:
            nothing.append(pattern)
        paths += files
    if nothing:
        shown = brief(", ".join(map(repr, nothing)), 500)
        raise DataError(f"--files: no file is found by {shown}, looked for from {os.getcwd()}")

    unique = []
    for path in sorted(paths):
        real = os.path.realpath(path)  # a file can be named twice, or through a link
        if real not in seen:
            seen.add(real)
            unique.append(path)
    _check_kinds(unique)
    return unique


def read_whole(path):
    """-> the text of one UTF-8 file, without a byte-order mark. Raises DataError."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{error.object[error.start]:02x} at position {error.start:,} is no "
            f"UTF-8; convert the file: iconv -f CP1252 -t UTF-8, or -f UTF-16"
        ) from error


def _matches(pattern):
    """-> the paths that a pattern finds. Folders at its beginning that exist are plain names."""
    folder = next(parent for parent in Path(pattern).parents if parent.exists())
    if folder == Path("."):
        return glob.glob(pattern, recursive=True)
    rest = str(Path(pattern).relative_to(folder))
    return glob.glob(os.path.join(glob.escape(str(folder)), rest), recursive=True)


def _files_below(path):
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link leads back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return [file for file in files if os.path.isfile(file) or os.path.islink(file)]


def _check_kinds(paths):
    """Raises DataError for files that have no reader."""
    unknown = [path for path in paths if kind_of(path) not in READERS]
    if unknown:
        raise DataError(
            f"{brief(unknown[0])}: files of kind {kind_of(unknown[0]) or 'none'} are not read "
            f"({len(unknown)} of {len(paths)} files are of such kinds); name only files of kind "
            f"{', '.join(READERS)}, plain or compressed ({', '.join(OPENERS)})"
        )
    if any(path.lower().endswith(".zst") for path in paths) and not importlib.util.find_spec(
        "zstandard"
    ):
        raise DataError("reading .zst takes one package more: pip install zstandard")


def kind_of(path):
    """-> the suffix that tells how a file is read: .txt for a.txt and for a.txt.gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    while suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def standard_library():
    """-> sorted paths of the sources of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = []
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        if path.name.startswith("_sysconfigdata"):  # differs from machine to machine
            continue
        paths.append(str(path))
    return paths


# ---- the Hub -------------------------------------------------------------------------------------


def ask_hub(dataset, revision):
    """Asks for the commit of `revision` (None: the newest), so that a run that continues tomorrow
    reads what it read today. -> (commit, names of all files). Raises DataError."""
    from huggingface_hub import HfApi

    hub = HfApi()
    probe(hub.endpoint, OFFLINE)  # the client would retry for 23 seconds
    try:
        info = hub.dataset_info(dataset, revision=revision, timeout=10)
    except Exception as error:  # not found, gated, a lost connection share no other base class
        raise DataError(
            f"data set {dataset}, revision {revision or 'main'}: {brief(error, 400)}; look for its "
            f"name at {hub.endpoint}/datasets; for a private one: hf auth login"
        ) from error
    return info.sha, [sibling.rfilename for sibling in info.siblings or []]


def commit_of(dataset, revision):
    """The commit that `revision` names: itself, or what the Hub says of a branch, a tag or the
    beginning of a hash. Raises DataError."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else ask_hub(dataset, revision)[0]


def hub_files(dataset, config, revision, split):
    """-> paths of the files of a split, hf://datasets/…, in order. Raises DataError."""
    import datasets  # takes 2 seconds, which the other sources do without

    try:
        builder = datasets.load_dataset_builder(dataset, config, revision=revision)
    except Exception as error:  # no such configuration, no data files, a lost connection
        raise DataError(
            f"data set {dataset}: {brief(error, 500)}; --config names one of its configurations"
        ) from error
    files = getattr(builder.config, "data_files", None) or {}
    if split not in files:
        there = brief(", ".join(map(str, files))) or "none"
        raise DataError(f"data set {dataset} has no split {split!r}; pass --split, one of {there}")
    paths = list(map(str, files[split]))
    _check_kinds(paths)
    return paths


# ---- documents -----------------------------------------------------------------------------------


def start():
    """-> the position before the first document: files read to their end, rows read of the next
    one and how many of these were not empty, and what became of all rows so far."""
    return {"file": 0, "row": 0, "of_file": 0, "documents": 0, "empty": 0, "skipped": 0}


def read_documents(files, reading, position):
    """Yields the texts after `position`, and keeps `position` up to date. Empty texts are counted.

    Raises DataError for a file that cannot be read, and for a file or a row without a text unless
    reading.skip_unusable: then these are counted."""
    while position["file"] < len(files):
        path = files[position["file"]]
        rows = _read_file(path, reading)
        for text in itertools.islice(rows, position["row"], None):
            position["row"] += 1
            if isinstance(text, Unusable):
                _skip(position, reading, f"{_place(path, reading, position['row'])}: {text}")
            elif not text.removeprefix("\ufeff"):
                position["empty"] += 1
            else:
                position["documents"] += 1
                position["of_file"] += 1
                yield text
        counted = reading.skip_unusable and position["row"] > 0  # as empty rows
        if not position["of_file"] and not counted:
            _skip(position, reading, f"{path}: there is no text in this file")
        position.update(file=position["file"] + 1, row=0, of_file=0)


def _skip(position, reading, reason):
    if not reading.skip_unusable:
        raise DataError(f"{reason}; or leave out and count what cannot be used: --skip-unusable")
    position["skipped"] += 1
    position["of_file"] += 1


def _place(path, reading, row):
    """-> what a message calls a row: its file and its number; only the file if that is one text."""
    if READERS[kind_of(path)] is not read_text:
        return f"{path}, row {row}"
    return f"{path}, document {row}" if reading.separator else path


def _read_file(path, reading):
    """Yields the text of each row, or Unusable. Raises DataError, which names the file."""
    row = 0
    try:
        with _open(path) as packed, _decompressed(packed, path) as file:
            for text in READERS[kind_of(path)](file, reading):
                row += 1
                yield text
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # the readers' libraries raise what they like
        remedy = "fetch or write it again if it is damaged or cut short"
        if path.startswith("hf://"):
            remedy = "when the cause is gone, the same command continues"
        raise DataError(
            f"{path}: could not be read after row {row} ({brief(error)}); {remedy}"
        ) from error


def _open(path):
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(path, "rb")
    return open(path, "rb")


def _decompressed(file, path):
    opener = OPENERS.get(os.path.splitext(path)[1].lower())
    return opener(file) if opener else file


def _open_zst(file):
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


# ---- text ----------------------------------------------------------------------------------------


def read_text(file, reading):
    """The documents of a text file: all of it, or what stands between separators."""
    if reading.separator:
        for text in _pieces(_decoded(file, reading.encoding), reading.separator):
            yield _problem(text, reading.encoding) or text.strip("\r\n")
    else:
        text = "".join(_decoded(file, reading.encoding))
        yield _problem(text, reading.encoding) or text


def _decoded(file, encoding):
    """Yields str chunks of a binary file. Bytes that are no text become lone surrogates, which
    _problem finds once it is known in which row they are."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    while chunk := file.read(CHUNK_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _pieces(chunks, separator):
    """Yields what stands between the separators in the joined chunks."""
    pending, fresh, size = "", [], 0
    for chunk in chunks:
        fresh.append(chunk)
        size += len(chunk)
        if size >= len(pending):  # else a long piece would be searched again with every chunk
            *whole, pending = (pending + "".join(fresh)).split(separator)
            yield from whole
            fresh, size = [], 0
    yield from (pending + "".join(fresh)).split(separator)


def _problem(text, encoding):
    """-> Unusable if this text is in another encoding, else None."""
    bad = None if text.isascii() else BAD_BYTES.search(text)
    if bad:
        before = text[: bad.start()].encode(encoding, "surrogatepass")
        byte = ord(bad[0]) - 0xDC00
        remedy = "pass the --encoding that this file has"
        if encoding == "utf-8":
            remedy = (
                "if it is Windows' or Latin-1: --encoding cp1252, or, for this file alone, "
                "iconv -f CP1252 -t UTF-8"
            )
        if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            remedy = "it looks like UTF-16: --encoding utf-16"
        return Unusable(
            f"byte 0x{byte:02x} at position {len(before):,} is no {encoding.upper()}; {remedy}"
        )
    start = text[:1000]
    if start.count("\0") > len(start) / 4:  # ASCII text as UTF-16 is valid UTF-8, with zeros
        return Unusable("every other byte is 0: it looks like UTF-16; pass --encoding utf-16-le")
    return None


# ---- rows ----------------------------------------------------------------------------------------


def read_json_lines(file, reading):
    """The texts of a .jsonl file: one object a line. An empty line is an empty text."""
    yield from _json_lines(_decoded(file, reading.encoding), reading)


def _json_lines(chunks, reading):
    lines = _pieces(chunks, "\n")
    previous = next(lines)
    for line in lines:
        yield _text_of_line(previous, reading)
        previous = line
    if previous.strip():  # usually nothing stands after the last line's end
        yield _text_of_line(previous, reading)


def _text_of_line(line, reading):
    """-> the text, or Unusable."""
    if not line.strip():
        return ""
    problem = _problem(line, reading.encoding)
    if problem:
        return problem
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return Unusable(f"no JSON ({brief(error)}) in {brief(line, 80)!r}")
    return _text_of(row, reading.text_key)


def read_json(file, reading):
    """The texts of a .json file: a list of objects, or one object a line."""
    chunks = _decoded(file, reading.encoding)
    first = next(chunks)
    if not first.lstrip("\ufeff \t\r\n").startswith("["):
        yield from _json_lines(itertools.chain([first], chunks), reading)
        return
    text = first + "".join(chunks)
    problem = _problem(text, reading.encoding)
    if problem:
        yield problem
        return
    for row in json.loads(text.removeprefix("\ufeff")):
        yield _text_of(row, reading.text_key)


def read_parquet(file, reading):
    """The texts of a .parquet file; no other column is read."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    key = reading.text_key
    columns = [table.schema.column(i).path for i in range(len(table.schema))]
    if not any(column == key or column.startswith(key + ".") for column in columns):
        there = brief(", ".join(columns)) or "none"
        raise DataError(f"no text in column {key!r}; pass --text-key, one of {there}")
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for row in batch.to_pylist():
            yield _text_of(row, key)


def _text_of(row, key):
    """row: what a line or a row of a table holds. -> the text in column `key`, "" if it is null,
    or Unusable."""
    if not isinstance(row, dict):
        return Unusable(f"{brief(row)} is no object with columns; write {{{key!r}: …}} lines")
    value = row
    for part in [key] if key in row else key.split("."):
        if not isinstance(value, dict) or part not in value:
            return Unusable(f"no text in column {key!r}; {_remedy(row)}")
        value = value[part]
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        return Unusable(
            f"column {key!r} holds a {kind}, not text: {brief(value, 80)}; {_remedy(row)}"
        )
    return value


def _remedy(row):
    """What to do about a row that has no text in the column that was asked for."""
    if columns := _text_columns(row):
        return f"pass --text-key, one of {brief(', '.join(columns))}"
    kinds = [f"{name} (a {type(value).__name__})" for name, value in row.items()]
    there = f"this row has {brief(', '.join(kinds))}" if kinds else "this row is empty"
    return f"{there}; write files that have one text in a row"


def _text_columns(row, prefix=""):
    """-> the names of a row's columns that hold text, with the path to those inside others."""
    names = []
    for name, value in row.items():
        if isinstance(value, str):
            names.append(prefix + name)
        elif isinstance(value, dict):
            names += _text_columns(value, f"{prefix}{name}.")
    return names


TEXT_KINDS = (".txt", ".md", ".py")
READERS = {
    **dict.fromkeys(TEXT_KINDS, read_text),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
}
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
