import bz2
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import COMMIT, fake_hub
from prepared import ROOT, TEXTS, content, documents, run
from test_tokenizer import write_json_tokenizer

import prepare_data
from data import TokenBlocks, read_meta, read_shard, verify, write_shard
from tokenizer import get_tokenizer

# ---- what comes out ------------------------------------------------------------------------------


def test_the_standard_library(library, capsys):
    run("--shard-tokens", 1000)
    folder = Path("data/stdlib")
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(TEXTS[:120])
    order = [path.read_text() for path in sorted(library.glob("package_?/*.py"))]
    assert train == [
        text for text in order if text in set(train)
    ]  # nothing depends on the order of the workers
    sizes = [shard["tokens"] for shard in read_meta(folder)["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {1000} and len(sizes) > 3
    assert verify(folder) and TokenBlocks(folder, "train", 64).n_blocks > 50
    assert read_meta(folder)["command"] == "python prepare_data.py --shard-tokens 1000 --workers 2"
    assert not (folder / "progress.npz").exists()
    assert f"in {len(train)} documents to train on" in capsys.readouterr().out


def test_validation_documents_are_chosen_by_their_content(here):
    texts = TEXTS[:200] * 2
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""])
    (here / "a.jsonl").write_text(lines)
    run("--files", "a.jsonl", "--tokenizer", "bytes", "--val-share", 0.2, "--out", "a")
    train, val = documents(here / "a", "train"), documents(here / "a", "val")
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts)
    share = [
        text
        for text in texts
        if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        < 0.2 * 2**64
    ]
    assert val == share and 0.1 < len(val) / len(texts) < 0.3


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.bz2", "parquet"])
def test_local_files(here, kind):
    import pyarrow
    import pyarrow.parquet

    texts, folder = TEXTS[:40], here / "texts"
    folder.mkdir()
    if kind.startswith("txt"):
        for i, text in enumerate(texts):
            (gzip.open if kind == "txt.gz" else open)(folder / f"{i:03d}.{kind}", "wt").write(text)
    elif kind.startswith("jsonl"):
        with (bz2.open if kind == "jsonl.bz2" else open)(folder / f"a.{kind}", "wt") as file:
            file.writelines(json.dumps({"body": text, "id": 1}) + "\n" for text in texts)
    else:
        pyarrow.parquet.write_table(
            pyarrow.table({"body": texts}), folder / "a.parquet", row_group_size=7
        )
    run(
        "--files",
        "texts/*",
        "--tokenizer",
        "bytes",
        *([] if kind.startswith("txt") else ["--text-key", "body"]),
    )
    train, val = documents(here / "data/texts", "train"), documents(here / "data/texts", "val")
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]


def test_gpt2_tokens_are_encode_ordinary_s(library, gpt2_cache):
    run("--tokenizer", "gpt2", "--out", "g")
    tokens = read_shard("g/train_000000.bin").tolist()
    train = documents(Path("g"), "train")
    assert tokens == [
        token for text in train for token in [50256, *get_tokenizer("gpt2").encode_ordinary(text)]
    ]
    assert "<|endoftext|>" in train[0]


@pytest.mark.parametrize("tokenizer", ["chars", "mine.json"])
def test_own_tokenizers_are_kept_with_the_data(here, tokenizer):
    if tokenizer == "mine.json":
        write_json_tokenizer(here / tokenizer)
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run("--files", "a.jsonl", "--tokenizer", tokenizer, "--out", "out")
    if tokenizer == "mine.json":
        write_json_tokenizer(here / tokenizer, "</s>")
        argv = "--files", "a.jsonl", "--tokenizer", tokenizer, "--out", "out"
        run(*argv, fails=r"tokenizer_file: mine.json \(.*\) there, mine.json \(.*\) asked")
        (here / tokenizer).unlink()
    assert sorted(documents(here / "out", "train") + documents(here / "out", "val")) == sorted(
        TEXTS
    )
    meta = read_meta(here / "out")
    codec = get_tokenizer(meta["tokenizer"])
    assert (codec.n_vocab, codec.eot_token) == (meta["vocab_size"], meta["eot_token"])
    if tokenizer == "chars":
        assert meta["vocab_size"] == len(set("".join(TEXTS))) + 1


def test_a_tokenizer_that_changes_texts_is_told_of(here, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "cat": 1}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save("words.json")
    (here / "a.txt").write_text("the cat sat")
    run("--files", "a.txt", "--tokenizer", "words.json", "--out", "out")
    assert "does not give every text back" in capsys.readouterr().out


def test_one_file_or_few_or_separated_ones(here, capsys):
    text = "\n<|endoftext|>\n".join(TEXTS)
    (here / "input.txt").write_text(text)
    run("--files", "input.txt", "--tokenizer", "bytes", "--out", "one")
    (train,), (val,) = documents(here / "one", "train"), documents(here / "one", "val")
    assert train + val == text and len(val) > 1000
    said = capsys.readouterr().out
    assert "--separator '<|endoftext|>'" in said
    assert f"the longest is cut; from character {len(train):,} on it is for val" in said
    (here / "marked.txt").write_text("\ufeff" + text)
    run("--files", "marked.txt", "--tokenizer", "bytes", "--out", "marked")
    assert content(here / "marked")["val_000000.bin"] == content(here / "one")["val_000000.bin"]
    separator = "--separator", r"\n<|endoftext|>\n"
    run("--files", "input.txt", *separator, "--tokenizer", "bytes", "--out", "many")
    many = documents(here / "many", "train"), documents(here / "many", "val")
    assert sorted(many[0] + many[1]) == sorted(text.strip("\n") for text in TEXTS)
    assert not set(many[0]) & set(many[1])
    (here / "few").mkdir()
    for i, text in enumerate(TEXTS[:10]):
        (here / f"few/{i}.txt").write_text(text)
    run("--files", "few", "--tokenizer", "bytes", "--out", "few_out")
    few = documents(here / "few_out", "train"), documents(here / "few_out", "val")
    assert sorted(few[0] + few[1]) == sorted(TEXTS[:10]) and len(few[1]) == 1


def test_the_home_folder_may_be_written_as_a_tilde(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "a.txt").write_text("some text " * 99)
    run("--files", "a.txt", "--tokenizer", "bytes", "--out", "~/out")
    assert verify(here / "home/out") and not (here / "~").exists()


def test_what_is_left_out_is_counted(here, capsys):
    rows = [{"text": "a" * 50}, {"text": ""}, {"n": 1}, {"text": "b" * 50}, {"text": None}]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--tokenizer", "bytes", "--out", "out"
    run("--files", "a.jsonl", *options, fails="a.jsonl, row 3: no text in column 'text'")
    run("--files", "a.jsonl", *options, "--skip-unusable")
    assert "left out: 2 empty documents, 1 rows or files" in capsys.readouterr().out


LIKE_WINDOWS = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.path.insert(0, {root!r})
import prepare_data
if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method("spawn")
    prepare_data.main(["--files", "*.txt", "--tokenizer", "bytes", "--workers", "1"])
"""


def test_a_console_that_is_not_utf8_and_the_start_of_workers_on_windows(here):
    (here / "☃ [a].txt").write_text("a text of some length " * 9)
    (here / "x.txt").write_text("another text of some length " * 9)
    (here / "run.py").write_text(LIKE_WINDOWS.format(root=str(ROOT)), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (folder,) = (here / "data").iterdir()
    assert verify(folder) > 400
    (here / "x.txt").unlink()
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 1 and b"Traceback" not in done.stderr


def parquet(**columns):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=50)
    return file.getvalue()


CARD = b"""---
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: lines
  data_files:
  - split: train
    path: lines/*.jsonl.gz
---
"""


def test_texts_of_the_hub(here):
    """Through the real clients, from a Hub on this machine; columns that differ between files."""
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    files = {
        "README.md": CARD,
        "small/a.parquet": parquet(text=TEXTS[:200]),
        "small/b.parquet": parquet(url=["u"] * 400, text=TEXTS[200:]),
        "lines/a.jsonl.gz": gzip.compress(lines.encode()),
    }
    command = [sys.executable, ROOT / "prepare_data.py", "--tokenizer", "bytes", "--workers", "2"]
    with fake_hub({"someone/texts": files}, here / "home") as (environment, asked):

        def prepare(*arguments):
            options = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
            return subprocess.run([*command, *arguments], cwd=here, **options)

        for config in "small", "lines":
            done = prepare("someone/texts", "--config", config)
            assert done.returncode == 0, done.stderr
            folder = here / f"data/texts-{config}"
            assert sorted(documents(folder, "train") + documents(folder, "val")) == sorted(TEXTS)
            assert read_meta(folder)["source"]["revision"] == COMMIT
        asked.clear()
        assert "already prepared" in prepare("someone/texts", "--config", "small").stdout
        assert not asked  # whatever the newest commit is now
        for revision in ("main", COMMIT):
            done = prepare("someone/texts", "--config", "small", "--revision", revision)
            assert "already prepared" in done.stdout
        other = hashlib.sha1(b"def").hexdigest()
        for arguments, says in {
            ("someone/texts", "--config", "small", "--revision", "def"): f"{other} asked",
            ("someone/texts", "--config", "large"): "Available: ['small', 'lines']",
            ("someone/texts", "--config", "lines", "--split", "test", "--out", "x"): "one of train",
            ("someone/tpyo",): f"look for its name at {environment['HF_ENDPOINT']}/datasets",
            ("openwebtext",): f"{prepare_data.OPENWEBTEXT[0]}, revision 79d93d786212f7344586290",
        }.items():
            done = prepare(*arguments)
            assert done.returncode == 1 and says in done.stderr, done.stderr
            assert "Traceback" not in done.stderr and len(done.stderr) < 1100
    assert {path.name for path in (here / "data").iterdir()} == {"texts-small", "texts-lines"}


# ---- errors --------------------------------------------------------------------------------------


def test_errors_that_need_another_command(here):
    (here / "a.txt").write_text("x")
    (here / "b.parquet").write_bytes(b"no parquet")
    (here / "c.pdf").write_text("?")
    (here / "bad.txt").write_bytes(b"a\xff")
    tokenizer = "--tokenizer", "bytes"
    run("--files", "a.txt", *tokenizer, fails="too little text .* at least two characters")
    run("--files", "x*.txt", *tokenizer, fails=r"no file is found by 'x\*.txt'")
    run("--files", "c.pdf", *tokenizer, fails="c.pdf: files of kind .pdf are not read")
    run("--files", "b.parquet", *tokenizer, "--out", "b", fails="b.parquet: .*after row 0")
    run("--files", "bad.txt", *tokenizer, "--out", "c", fails="bad.txt: byte 0xff at position 1")
    run("--tokenizer", "o200k_base", "--out", "d", fails="o200k_base has 200,019 ids.*uint16")
    run("--out", "/proc/nowhere", fails="/proc/nowhere: this folder could not be made.*--out")
    write_shard(here / "train.bin", [1])
    run("--out", here, fails="--adopt .* --tokenizer gpt2")


def test_options_that_the_files_cannot_follow(here, capsys):
    (here / "a.txt").write_text("one text, and another")
    (here / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (here / "a.parquet").write_bytes(parquet(text=TEXTS))
    tokenizer = "--tokenizer", "bytes"
    run("--files", "a.txt", *tokenizer, "--text-key", "body", fails="kind .txt")
    run("--files", "a.jsonl", *tokenizer, "--separator", "x", fails="text files.* kind .jsonl")
    run("--files", "a.parquet", *tokenizer, "--encoding", "cp1252", fails=".parquet files say")
    run("--files", "a.txt", *tokenizer, "--separator", "<|end|>", "--out", "out")
    assert "the separator '<|end|>' stands in none of these files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["x/y", "--files", "a"],
        ["--revision", "a"],
        ["--val-share", "1"],
        ["--workers", "0"],
        ["--shard-tokens", str(2**31)],
        ["--separator", ""],
        ["--encoding", "klingon"],
        ["--encoding", "base64"],
        ["--train-shards", "2"],
        ["--text-key", "body"],
        ["--separator", "x"],
        ["--files", "a.txt", "--config", "small"],
        ["--adopt", "a", "--val-share", "0.1"],
        ["kjj0/fineweb10B-gpt2", "--tokenizer", "bytes"],
    ],
)
def test_options_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(argv)
    assert "error: " in capsys.readouterr().err


def test_a_file_s_name_is_no_data_set(here, capsys):
    (here / "a.txt").write_text("x")
    with pytest.raises(SystemExit):
        prepare_data.main(["a.txt"])
    assert "a.txt is a file or folder of this machine: --files a.txt" in capsys.readouterr().err


def test_without_a_network_it_says_so_within_seconds(here, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # refuses, with a network or without
    begun = time.monotonic()
    run("openwebtext", fails="could not be reached .*offline: python prepare_data.py .*--files")
    assert time.monotonic() - begun < 6
    assert not Path("data").exists()
