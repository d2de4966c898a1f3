import bz2
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from data import TokenBlocks, get_tokenizer, read_meta, read_shard, verify, write_shard
from test_data import gpt2_cache, gpt2_forgotten, llm_c_bytes  # noqa: F401, fixtures

ROOT = Path(__file__).parents[1]
TEXTS = [f"document {i}:\n\nits text <|endoftext|> is\tnumber {i * i} ☃\n" for i in range(600)]

# A small standard library, and a kill -9 just before the `at`-th rename.
RUN = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import prepare_data
real, seen = os.replace, 0
def replace(*names):
    global seen
    seen += 1
    if seen == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
if __name__ == "__main__":
    os.replace = replace
    prepare_data.sysconfig.get_path = lambda name: {library!r}
    prepare_data.CHUNK_CHARACTERS = 2000
    prepare_data.main({argv!r})
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def library(here, monkeypatch):
    folder = here / "library"
    for i, text in enumerate(TEXTS[:120]):
        file = folder / f"package_{i % 7}" / f"module_{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for skipped in "test/a.py", "package_1/tests/a.py", "site-packages/a.py", "_sysconfigdata_linux.py":
        (folder / skipped).parent.mkdir(exist_ok=True)
        (folder / skipped).write_text("SKIPPED")
    (folder / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda name: str(folder))
    return folder


def run(*argv, fails=None):
    argv = [*map(str, argv), "--workers", "2"]
    if fails is None:
        return prepare_data.main(argv)
    with pytest.raises(SystemExit, match=fails):
        prepare_data.main(argv)


def documents(folder, split):
    """The documents back from the shards."""
    meta = read_meta(folder)
    tokens = np.concatenate([read_shard(folder / shard["file"]) for shard in meta["splits"][split]["shards"]])
    assert tokens[0] == meta["eot_token"]  # it stands before each document
    starts = np.flatnonzero(tokens == meta["eot_token"])
    decode = get_tokenizer(meta["tokenizer"]).decode
    found = [decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]
    described = meta["splits"][split]
    assert (len(found), len(tokens)) == (described["documents"], described["tokens"])
    return found


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what comes out -------------------------------------------------------------------------------------------------

def test_the_standard_library(library, capsys):
    run("--shard-tokens", 1000)
    folder = Path("data/stdlib")
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted(TEXTS[:120])
    order = [path.read_text() for path in sorted(library.glob("package_?/*.py"))]
    assert train == [text for text in order if text in set(train)]  # nothing depends on the order of the workers
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
    share = [text for text in texts
             if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") < 0.2 * 2**64]
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
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), folder / "a.parquet", row_group_size=7)
    run("--files", "texts/*", "--tokenizer", "bytes", *([] if kind.startswith("txt") else ["--text-key", "body"]))
    train, val = documents(here / "data/texts", "train"), documents(here / "data/texts", "val")
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]


def test_gpt2_tokens_are_encode_ordinary_s(library, gpt2_cache):  # noqa: F811
    run("--tokenizer", "gpt2", "--out", "g")
    tokens = read_shard("g/train_000000.bin", vocab_size=50257).tolist()
    train = documents(Path("g"), "train")
    assert tokens == [token for text in train for token in [50256, *get_tokenizer("gpt2").encode_ordinary(text)]]
    assert "<|endoftext|>" in train[0]


class FakeHub:
    """Knows one data set, at commit abc."""
    endpoint = "https://hub.test"

    def dataset_info(self, name, revision, timeout):
        if name not in ("someone/texts", prepare_data.OPENWEBTEXT[0]):
            raise OSError("404 Repository Not Found")
        return types.SimpleNamespace(sha=revision or "abc")


def test_the_hub_is_asked_for_one_commit(here, monkeypatch):
    import datasets
    import huggingface_hub
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    asked, real = [], datasets.load_dataset

    def load_dataset(**keywords):
        asked.append(keywords)
        return real("json", data_files="a.jsonl", split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(prepare_data, "probe", lambda url, remedy: None)
    argv = ["someone/texts", "--config", "small", "--tokenizer", "bytes", "--val-share", 0.1]
    run(*argv)
    common = {"path": "someone/texts", "name": "small", "split": "train", "streaming": True}
    assert asked == [{**common, "revision": "abc"}]
    assert read_meta("data/texts-small")["source"]["revision"] == "abc"
    assert len(documents(Path("data/texts-small"), "train") + documents(Path("data/texts-small"), "val")) == 600
    run(*argv)  # finds it made, whatever the newest commit is now
    run(*argv, "--revision", "def", fails="revision abc there, def asked")
    run("openwebtext", "--tokenizer", "bytes", "--val-share", 0.1)
    assert len(asked) == 2 and (asked[1]["path"], asked[1]["name"], asked[1]["revision"]) == prepare_data.OPENWEBTEXT
    run("someone/else", "--tokenizer", "bytes", fails="someone/else, revision main: 404.*https://hub.test/datasets")


# ---- stopping, continuing, finding it made --------------------------------------------------------------------------

def in_a_process(cwd, library, at):
    """prepare_data.py with tiny shards, killed before its `at`-th rename. -> exit status"""
    cwd.mkdir(exist_ok=True)
    argv = ["--shard-tokens", "700", "--workers", "2", "--val-share", "0.3"]
    code = RUN.format(root=str(ROOT), at=at, library=str(library), argv=argv)
    (cwd / "run.py").write_text(code)  # a file, for where workers are not forked they load it again
    return subprocess.run([sys.executable, "run.py"], cwd=cwd, capture_output=True, timeout=60).returncode


def test_killed_anywhere_it_ends_with_the_same_bytes(library, here):
    assert in_a_process(here / "whole", library, at=0) == 0
    expected = content(here / "whole/data/stdlib")
    assert len(expected) > 8
    for at in 1, 2, 4, 9:
        cwd = here / f"killed_{at}"
        assert in_a_process(cwd, library, at) == -9
        assert "meta.json" not in content(cwd / "data/stdlib")
        assert in_a_process(cwd, library, at=0) == 0
        assert content(cwd / "data/stdlib") == expected
    cwd, kills = here / "killed_often", 0
    while in_a_process(cwd, library, at=6):  # just enough for the shards of a chunk and their progress
        kills += 1
        assert kills < 12
    assert kills > 1 and content(cwd / "data/stdlib") == expected


def test_killed_workers_do_not_stay(library, here):
    in_a_process(here / "killed", library, at=3)
    time.sleep(0.5)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(process / "cwd") != str(here / "killed"), (process / "cmdline").read_bytes()
        except OSError:
            pass  # ended meanwhile, or another user's


def test_streaming_sources_continue_where_they_were(here, monkeypatch):
    for i in range(2):
        (here / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[i::2]))
    monkeypatch.setattr(prepare_data, "CHUNK_DOCUMENTS", 32)
    argv = ["--files", "?.jsonl", "--tokenizer", "bytes", "--shard-tokens", "5000", "--out", "out"]
    run(*argv)
    expected = content(here / "out")
    (here / "out").rename(here / "expected")
    saves, real = [], prepare_data.save_progress

    def stop(out, options, position, splits):
        real(out, options, position, splits)
        saves.append(position["consumed"])
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "save_progress", stop)
    run(*argv, fails="stopped; the same command continues")
    assert 0 < saves[-1] < 600 and "progress.npz" in content(here / "out")
    run(*argv)
    assert content(here / "out") == expected


def test_a_finished_data_set_is_reused_and_a_damaged_one_refused(library, capsys):
    run()
    path = Path("data/stdlib/train_000000.bin")
    before = path.stat().st_mtime_ns
    run()
    assert "already prepared" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    run(fails="train_000000.bin: checksum .* start over: rm -rf data/stdlib; python prepare_data.py")


def test_other_options_are_refused_and_named(library, monkeypatch):
    run("--shard-tokens", 1000)
    run("--shard-tokens", 2000, fails="shard_tokens 1000 there, 2000 asked.*rm -rf data/stdlib; python prepare_data.py")
    real = prepare_data.Split.write

    def fail(split):
        real(split)
        if len(split.shards) == 2:
            prepare_data.save_progress(split.out, {"tokenizer": "gpt2"}, {}, [])
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Split, "write", fail)
    run("--shard-tokens", 1000, "--out", "b", fails="stopped")
    run("--shard-tokens", 1000, "--out", "b", fails="tokenizer gpt2 there, bytes asked")


def test_a_first_attempt_that_wrote_nothing_binds_to_nothing(here):
    (here / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    argv = ["--files", "a.jsonl", "--tokenizer", "bytes", "--out", "a"]
    run(*argv, fails="no text in column 'text'.*--text-key, one of body")
    run(*argv, "--text-key", "body")
    assert verify(here / "a")


# ---- errors ---------------------------------------------------------------------------------------------------------

def test_errors_that_need_another_command(here):
    (here / "a.txt").write_text("one document")
    (here / "b.parquet").write_bytes(b"no parquet")
    (here / "c.md").write_text("?")
    (here / "bad.txt").write_bytes(b"a\xff")
    tokenizer = "--tokenizer", "bytes"
    run("--files", "a.txt", *tokenizer, fails="none of 1 documents is in val at --val-share 0.05.*more documents")
    run("--files", "a.txt", *tokenizer, "--val-share", 0.99999, fails="in train")
    run("--files", "x*.txt", *tokenizer, fails=r"--files 'x\*.txt' finds no file")
    run("--files", "a.txt", "b.parquet", *tokenizer, fails="kind .parquet, .txt; give one kind")
    run("--files", "c.md", *tokenizer, fails="files of kind .md; give")
    run("--files", "b.parquet", *tokenizer, "--out", "b", fails="stopped after 0 documents.*[Pp]arquet")
    run("--files", "bad.txt", *tokenizer, "--out", "c", fails="UnicodeDecodeError")
    run("--tokenizer", "o200k_base", "--out", "d", fails="'o200k_base'.*uint16")
    write_shard(here / "train.bin", [1])
    run("--out", here, fails="--adopt .* --tokenizer gpt2")


@pytest.mark.parametrize("argv", [["x/y", "--files", "a"], ["--revision", "a"], ["--val-share", "1"],
                                  ["--workers", "0"], ["--shard-tokens", str(2**31)]])
def test_options_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(argv)
    assert "error: " in capsys.readouterr().err


def test_without_a_network_it_says_so_within_seconds(here, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # refuses, so that the test runs alike with a network
    begun = time.monotonic()
    run("openwebtext", fails="could not be reached .*offline: python prepare_data.py .*--files")
    assert time.monotonic() - begun < 6
    assert not Path("data").exists()


def test_a_full_disk_is_survived(library):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "
            "sys.path.insert(0, {!r}); import prepare_data; prepare_data.sysconfig.get_path = lambda name: {!r}; "
            "prepare_data.main(['--shard-tokens', '100000', '--workers', '1'])").format(str(ROOT), str(library))
    full = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert full.returncode == 1 and "train_000000.bin: could not be written (File too large)" in full.stderr
    assert "Traceback" not in full.stderr and set(content(Path("data/stdlib"))) == {"progress.npz"}


def test_a_full_disk_is_survived_and_space_lets_it_go_on(small_disk, here, monkeypatch):
    """A real one: the shards that are whole stay, the one that is not goes, and in the end nothing differs."""
    disk, grow = small_disk
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text * 40}) + "\n" for text in TEXTS))
    monkeypatch.setattr(prepare_data, "CHUNK_DOCUMENTS", 32)
    argv = ["--files", "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", 100_000, "--val-share", 0.2]
    run(*argv, "--out", here / "whole")
    run(*argv, "--out", disk / "out", fails="could not be written .No space left on device.*Free .* bytes and run this again")
    left = content(disk / "out")
    assert "progress.npz" in left and not any(name.endswith(".tmp") for name in left) and len(left) > 2
    assert all(left[name] == (here / "whole" / name).read_bytes() for name in left if name.endswith(".bin"))
    grow()
    run(*argv, "--out", disk / "out")
    whole, there = content(here / "whole"), content(disk / "out")
    assert {**whole, "meta.json": 0} == {**there, "meta.json": 0}           # which names the command, and so --out


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """What the Hub answers for a name that it does not know."""
    def do_GET(self):
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_name_that_the_hub_does_not_know(here):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        done = subprocess.run([sys.executable, ROOT / "prepare_data.py", "someone/tpyo", "--tokenizer", "bytes"], cwd=here,
                              env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
                              capture_output=True, text=True, timeout=60)
        hub.shutdown()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: data set someone/tpyo, revision main: " in done.stderr
    assert f"look for its name at {endpoint}/datasets" in done.stderr
    assert not list(here.iterdir())


# ---- adopting -------------------------------------------------------------------------------------------------------

def test_adopts_llm_c_s_and_nanogpt_s_shards_as_they_are(here):
    (here / "fineweb_train_000001.bin").write_bytes(llm_c_bytes([50256, 1, 2, 50256, 3]))
    (here / "fineweb_train_000002.bin").write_bytes(llm_c_bytes([4, 5, 6, 7]))
    np.array([1, 2, 50256], np.uint16).tofile(here / "val.bin")
    before = content(here)
    run("--adopt", here, fails="--tokenizer gpt2 or bytes")
    run("--adopt", here, "--tokenizer", "bytes", fails="fineweb_train_000001.bin: token id 50256 is outside bytes's")
    run("--adopt", here, "--tokenizer", "gpt2")
    meta = read_meta(here)
    assert [(split["tokens"], split["documents"]) for split in meta["splits"].values()] == [(9, 2), (3, 1)]
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("gpt2", 50257, 50256)
    assert verify(here) == 12
    assert content(here) == {**before, "meta.json": (here / "meta.json").read_bytes()}
    assert TokenBlocks(here, "train", 2).in_order(0, 3)[0].tolist() == [[50256, 1], [2, 50256], [4, 5]]
    run("--adopt", here, "--tokenizer", "gpt2", fails=f"rm {here / 'meta.json'}; python prepare_data.py")


def test_adopting_needs_both_splits(here):
    write_shard(here / "train.bin", [1, 2])
    run("--adopt", here, "--tokenizer", "gpt2", fails=r"as \*val\*.bin it has none")
    write_shard(here / "val_of_train.bin", [1, 2])
    run("--adopt", here, "--tokenizer", "gpt2", fails="no name with both.*val_of_train.bin")
