"""Shards of others, as they lie there or fetched from the Hub."""

import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_hub import COMMIT, fake_hub
from prepared import ROOT, content, run
from test_data import llm_c_bytes

from data import TokenBlocks, read_meta, verify, write_shard
from tokenizer import get_tokenizer, tokenizer_name

ENGLISH = "It is a truth universally acknowledged, that a single man.\n" * 100


def write_nanogpt(folder, ids, meta=None):
    """train.bin and val.bin as nanoGPT's prepare.py writes them, and its meta.pkl."""
    for name in "train.bin", "val.bin":
        np.array(ids, np.uint16).tofile(folder / name)
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_adopts_llm_c_s_and_nanogpt_s_shards_as_they_are(here):
    (here / "fineweb_train_000001.bin").write_bytes(llm_c_bytes([50256, 1, 2, 50256, 3]))
    (here / "fineweb_train_000002.bin").write_bytes(llm_c_bytes([4, 5, 6, 7]))
    np.array([1, 2, 50256], np.uint16).tofile(here / "val.bin")
    before = content(here)
    run("--adopt", here, fails="--tokenizer gpt2, bytes, chars")
    run(
        "--adopt",
        here,
        "--tokenizer",
        "bytes",
        fails="000001.bin: token id 50256 is outside bytes's",
    )
    run("--adopt", here, "--tokenizer", "gpt2")
    meta = read_meta(here)
    splits = [(split["tokens"], split["documents"]) for split in meta["splits"].values()]
    assert splits == [(9, 2), (3, 1)]
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("gpt2", 50257, 50256)
    assert verify(here) == 12
    assert content(here) == {**before, "meta.json": (here / "meta.json").read_bytes()}
    blocks = TokenBlocks(here, "train", 2).in_order(0, 3)[0].tolist()
    assert blocks == [[50256, 1], [2, 50256], [4, 5]]
    again = f"rm {here / 'meta.json'}; python prepare_data.py"
    run("--adopt", here, "--tokenizer", "gpt2", fails=again)


def test_adopting_needs_both_splits(here):
    write_shard(here / "train.bin", [1, 2])
    run("--adopt", here, "--tokenizer", "gpt2", fails=r"as \*val\*.bin it has none")
    write_shard(here / "val_of_train.bin", [1, 2])
    run("--adopt", here, "--tokenizer", "gpt2", fails="no name with both.*val_of_train.bin")


# ---- what made the ids ---------------------------------------------------------------------------


def nanogpt_characters(text):
    characters = sorted(set(text))
    stoi = {character: i for i, character in enumerate(characters)}
    itos = dict(enumerate(characters))
    return [stoi[c] for c in text], {"vocab_size": len(itos), "itos": itos, "stoi": stoi}


def test_a_character_level_set_of_nanogpt(here):
    ids, meta = nanogpt_characters(ENGLISH)
    write_nanogpt(here, ids, meta)
    for tokenizer in "bytes", "gpt2":
        run("--adopt", here, "--tokenizer", tokenizer, fails="meta.pkl: .*--tokenizer chars")
    assert not (here / "meta.json").exists()
    run("--adopt", here, "--tokenizer", "chars")
    adopted = read_meta(here)
    codec = get_tokenizer(adopted["tokenizer"])
    first = TokenBlocks(here, "train", 50).in_order(0, 1)[0][0].tolist()
    assert codec.decode(first) == ENGLISH[:50]
    assert adopted["vocab_size"] == codec.n_vocab == meta["vocab_size"] + 1
    assert tokenizer_name(adopted["tokenizer"]).startswith(f"{meta['vocab_size']}-character")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize(
    "ids",
    [
        nanogpt_characters(ENGLISH)[0],
        nanogpt_characters("".join(map(chr, range(200, 400))) * 50)[0],
        np.random.default_rng(0).integers(0, 256, 10_000).tolist(),
    ],
)
def test_ids_of_another_tokenizer_without_a_word_beside_them(here, tokenizer, ids):
    write_nanogpt(here, ids)
    says = "no bytes of UTF-8 text" if tokenizer == "bytes" else "no id is above 255"
    run("--adopt", here, "--tokenizer", tokenizer, fails=says)
    assert not (here / "meta.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        "naïve ☃ 漢字 \t\r\n" * 400,
        "\x1b[1ma heading in bold letters, then\x1b[0m plain text\n" * 99,
    ],
)
def test_bytes_of_text_are_adopted(here, text):
    write_nanogpt(here, [256, *text.encode()])
    run("--adopt", here, "--tokenizer", "bytes")
    assert read_meta(here)["splits"]["train"]["documents"] == 1


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize(
    "meta, says",
    [
        (Trap(), "could not be read .UnpicklingError: it refers to pathlib"),
        ({"vocab_size": 3}, "could not be read .KeyError"),
        ({"itos": ["the", "cat"]}, "not one of characters"),
        (b"\x80", "could not be read"),
    ],
)
def test_a_meta_pkl_that_is_something_else(here, meta, says):
    write_nanogpt(here, [0, 1] * 100, meta)
    run("--adopt", here, "--tokenizer", "chars", fails=says)
    assert not Path("trapped").exists()
    (here / "meta.pkl").unlink()
    run("--adopt", here, "--tokenizer", "chars", fails="meta.pkl: --tokenizer chars takes")


def test_shards_of_uint32_are_refused(here):
    header = struct.pack("<256i", 20240801, 7, 2, *[0] * 253)
    for name in "train_0.bin", "val_0.bin":
        (here / name).write_bytes(header + struct.pack("<2I", 128_000, 5))
    run(
        "--adopt",
        here,
        "--tokenizer",
        "gpt2",
        fails="Llama-3 shard.*only .* uint16 tokens are read",
    )


# ---- from the Hub --------------------------------------------------------------------------------


def test_fineweb_by_name(here):
    """Through the real client, from a Hub on this machine: stopped, continued, and in part."""
    name = "kjj0/fineweb10B-gpt2"
    files = {"README.md": b"", "fineweb_val_000000.bin": llm_c_bytes([50256, 300, 301])}
    for i in range(1, 5):
        files[f"fineweb_train_{i:06d}.bin"] = llm_c_bytes([50256, *[i] * 10])
    missing = files.pop("fineweb_train_000003.bin")
    command = [sys.executable, ROOT / "prepare_data.py", name]
    folder = here / "data/fineweb10B-gpt2"
    with fake_hub({name: files}, here / "home") as (environment, asked):

        def fetch(*arguments):
            options = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
            return subprocess.run([*command, *arguments], cwd=here, **options)

        done = fetch("--train-shards", "9")
        assert done.returncode == 1 and "has 3 of them" in done.stderr
        done = fetch("--train-shards", "2")
        assert done.returncode == 0, done.stderr
        meta = read_meta(folder)
        assert [len(split["shards"]) for split in meta["splits"].values()] == [2, 1]
        assert meta["tokenizer"] == "gpt2" and meta["source"]["revision"] == COMMIT
        assert verify(folder) == 2 * 11 + 3
        assert "already prepared" in fetch("--train-shards", "2").stdout
        for revision in ("main", COMMIT):
            done = fetch("--train-shards", "2", "--revision", revision)
            assert "already prepared" in done.stdout
        assert "has 2 training shards" in fetch().stderr
        other = fetch("--train-shards", "2", "--revision", "b" * 40).stderr
        assert f"revision {COMMIT}; pass another --out" in other
        (folder / "meta.json").unlink()
        files["fineweb_train_000003.bin"] = missing
        asked.clear()
        done = fetch()
        assert done.returncode == 0, done.stderr
        fetched = {line.split("/")[-1] for line in asked if line.startswith("GET /datasets")}
        assert fetched == {"fineweb_train_000003.bin", "fineweb_train_000004.bin"}
        assert verify(folder) == 4 * 11 + 3
        done = fetch("--out", "/proc/nowhere")
        assert done.returncode == 1 and "Traceback" not in done.stderr
