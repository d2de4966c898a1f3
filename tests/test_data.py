import json
import math
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from adopt import adopt
from data import (
    DataError,
    TokenBlocks,
    brief,
    read_meta,
    read_shard,
    verify,
    write_atomic,
    write_json,
    write_meta,
    write_shard,
)


def llm_c_bytes(tokens, magic=20240520, version=1, n=None, width="H"):
    """A shard as llm.c's data scripts write it, by hand."""
    n = len(tokens) if n is None else n
    return struct.pack("<256i", magic, version, n, *[0] * 253) + struct.pack(
        f"<{len(tokens)}{width}", *tokens
    )


def make_data_set(
    folder, train, val=((1, 2, 3),), vocab_size=50257, command="python prepare_data.py thing"
):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, shards in ("train", train), ("val", val):
        entries = []
        for i, tokens in enumerate(shards):
            file = f"{split}_{i:06d}.bin"
            write_shard(folder / file, tokens)
            crc = zlib.crc32(np.asarray(tokens, np.uint16).tobytes())
            entries.append({"file": file, "tokens": len(tokens), "crc32": f"{crc:08x}"})
        splits[split] = {"tokens": sum(map(len, shards)), "documents": 1, "shards": entries}
    write_meta(
        folder,
        {
            "tokenizer": "gpt2",
            "vocab_size": vocab_size,
            "eot_token": vocab_size - 1,
            "splits": splits,
            "source": {"kind": "test"},
            "command": command,
        },
    )
    return folder


# ---- shards --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(tokens=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=300))
def test_shards_are_llm_c_s_both_ways(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "train_000000.bin"
    write_shard(path, tokens)
    assert path.read_bytes() == llm_c_bytes(tokens)
    read = read_shard(path)
    assert read.dtype == np.uint16 and read.tolist() == tokens


def test_reads_nanogpt_s_headerless_files(tmp_path):
    tokens = np.array([15496, 995, 50256], np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    assert read_shard(tmp_path / "train.bin").tolist() == [15496, 995, 50256]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "0 bytes"),
        (b"ab", "2 bytes"),
        (llm_c_bytes([1, 2, 3])[:-1], "truncated.*3 tokens = 1,030 bytes, it has 1,029"),
        (llm_c_bytes([1, 2, 3]) + b"\0\0", "wrong size.*1,030 bytes, it has 1,032"),
        (llm_c_bytes([1])[:100], "truncated: 100 bytes"),
        (llm_c_bytes([], n=0), "promises 0 tokens"),
        (llm_c_bytes([1], version=2), "version 2"),
        (llm_c_bytes([1, 2], magic=20240801, version=7, width="I"), "20240801.*Llama-3.*uint32"),
        (llm_c_bytes([1, 2], magic=20240326), "20240326.*another kind"),
        (struct.pack(">256i", 20240520, 1, 1, *[0] * 253) + b"\0\1", "big-endian"),
        (np.arange(1, 100, dtype="<u4").tobytes(), "32-bit"),
        (b"odd" * 11, r"33 bytes \(an odd number\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PAR1 and so on", "a parquet file"),
    ],
)
def test_refuses_what_is_no_shard(tmp_path, content, says):
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read_shard(path)
    assert str(path) in str(error.value) and "python prepare_data.py" in str(error.value)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file.*python prepare_data.py"):
        read_shard(tmp_path / "train_000000.bin")


@pytest.mark.quick
def test_what_has_no_place_is_not_helped_by_space(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "a", tmp_path / "folder"):
        with pytest.raises(DataError, match="could not be written .*Make its folder"):
            write_atomic(path, b"")


@pytest.mark.parametrize("tokens", [[], [-1], [65536], np.array([70000]), [1.5], [[1, 2]], 1])
def test_writes_only_what_fits(tmp_path, tokens):
    with pytest.raises(DataError):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, [1, 2, 3])
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DataError, match="could not be written.*201,024 bytes"):
            write_shard(path, np.ones(100_000, np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hard", [4096, 64])
def test_more_shards_than_open_files_are_allowed(hard, tmp_path):
    """The process raises its own limit; where it may not, it says what to do, and that is not to
    delete the data."""
    folder = make_data_set(tmp_path, [range(10)] * 100)
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            read = rows(TokenBlocks(folder, "train", 4).in_order(0, 200))
            os._exit(0 if read == 100 * [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]] else 1)
        except DataError as error:
            os._exit(2 if "ulimit -n 65536" in str(error) and "rm -rf" not in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if hard == 4096 else 2)


def test_scan_matches_zlib_over_many_parts():
    tokens = np.random.default_rng(0).integers(0, 50257, 600_001).astype(np.uint16)
    tokens[-1] = 60000
    assert data.scan(tokens) == (f"{zlib.crc32(tokens.tobytes()):08x}", 60000)


# ---- meta.json -----------------------------------------------------------------------------------


def test_missing_meta_names_the_command_that_makes_it(tmp_path):
    for name, command in [
        ("stdlib", "python prepare_data.py"),
        ("openwebtext", "python prepare_data.py openwebtext"),
        ("mine", r"--files 'texts/\*.txt' --out"),
    ]:
        with pytest.raises(DataError, match=f"meta.json: no such file.*{command}"):
            read_meta(tmp_path / "data" / name)
    write_shard(tmp_path / "fineweb_train_000001.bin", [1])
    with pytest.raises(
        DataError, match=f"python prepare_data.py --adopt {tmp_path} --tokenizer gpt2"
    ):
        read_meta(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tokenizer": "gpt2"}'])
def test_damaged_meta_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError, match="meta.json: damaged"):
        read_meta(tmp_path)


def test_verify_finds_each_kind_of_damage(tmp_path):
    folder = make_data_set(tmp_path, [range(100), range(50)])
    assert verify(folder) == 153
    assert [verify(folder, rank, 2) for rank in range(2)] == [103, 50]  # train_0 and val_0; train_1
    path = folder / "train_000001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"\1\1")
    verify(folder, 0, 2)  # not its share
    with pytest.raises(
        DataError,
        match="train_000001.bin: checksum.*start over: rm -rf.*python prepare_data.py thing",
    ):
        verify(folder, 1, 2)
    write_shard(path, range(49))
    with pytest.raises(DataError, match="49 tokens, but meta.json says 50"):
        verify(folder)
    path.unlink()
    with pytest.raises(
        DataError, match="train_000001.bin: No such file.*python prepare_data.py thing"
    ):
        verify(folder)
    make_data_set(tmp_path, [range(100)], vocab_size=99)
    with pytest.raises(DataError, match="token id 99 is outside the vocabulary of 99"):
        verify(folder)


# ---- what machines and people bring --------------------------------------------------------------


@pytest.mark.quick
def test_no_message_is_longer_than_a_screen():
    error = DataError("a.txt: " + "x" * 10**6 + " pass --text-key")
    assert len(str(error)) <= 1000
    assert str(error).startswith("a.txt: ") and str(error).endswith(" pass --text-key")
    assert str(DataError("short")) == "short"
    assert len(brief(ValueError("y" * 10**6))) < 250 and brief(ValueError("z")) == "ValueError: z"
    assert brief(["x" * 10**6]).startswith("['xxx") and brief("a\n\n b") == "a b"


@pytest.fixture
def read_only_disk(tmp_path):
    """A data set on a file system that is mounted read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        make_data_set(disk / "set", [range(100)])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk / "set"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_folder_is_read_and_writing_there_is_one_clear_line(read_only_disk):
    assert verify(read_only_disk) == 103
    assert rows(TokenBlocks(read_only_disk, "train", 4).in_order(0, 1)) == [[0, 1, 2, 3, 4]]
    with pytest.raises(DataError, match="meta.json: could not be written .*[Rr]ead-only.*writable"):
        write_meta(read_only_disk, {})
    with pytest.raises(DataError, match="cannot be written.*folder of links.*ln -s"):
        adopt(read_only_disk, "gpt2", "the command")
    with pytest.raises(DataError, match="could not be written .No such file"):
        write_atomic(read_only_disk.parent.parent / "nowhere" / "file", b"")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_data_set(tmp_path / "set", [range(10)])
    assert verify("~/set") == 13 and TokenBlocks("~/set", "train", 4).n_blocks == 2


def test_without_the_modules_that_windows_lacks(tmp_path):
    folder = make_data_set(tmp_path, [range(10)])
    code = (
        "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; import data; "
        f"print(data.TokenBlocks({str(folder)!r}, 'train', 4).in_order(0, 1)[0].tolist())"
    )
    root = Path(data.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[[0, 1, 2, 3]]\n", done.stderr


# ---- which tokens a step sees --------------------------------------------------------------------


def slow_blocks(shards, block_size):
    """The oracle: every block of every shard, cut by hand."""
    return [
        list(tokens[b * block_size : b * block_size + block_size + 1])
        for tokens in shards
        for b in range((len(tokens) - 1) // block_size)
    ]


def rows(batch):
    """idx and targets back to blocks of block_size + 1 tokens; targets must be idx moved by one."""
    idx, targets = batch
    assert (
        idx.dtype == targets.dtype == torch.int64
        and idx.is_contiguous()
        and targets.is_contiguous()
    )
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    return torch.cat([idx, targets[:, -1:]], 1).tolist()


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), block_size=st.integers(1, 12))
def test_blocks_in_order_are_the_oracle_s(lengths, block_size, tmp_path_factory):
    shards = [(np.arange(n) + 1000 * i).tolist() for i, n in enumerate(lengths)]
    folder = make_data_set(tmp_path_factory.mktemp("set"), shards)
    expected = slow_blocks(shards, block_size)
    if not expected:
        with pytest.raises(DataError, match=f"block_size={block_size}"):
            TokenBlocks(folder, "train", block_size)
        return
    blocks = TokenBlocks(folder, "train", block_size)
    assert blocks.n_blocks == len(expected)
    assert rows(blocks.in_order(0, blocks.n_blocks)) == expected
    assert rows(blocks.in_order(blocks.n_blocks - 1, 1)) == expected[-1:]
    with pytest.raises(DataError, match="evaluate fewer"):
        blocks.in_order(0, blocks.n_blocks + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shards = [(np.arange(n) + 1000 * i).tolist() for i, n in enumerate((50, 9, 33))]
    return make_data_set(tmp_path_factory.mktemp("set"), shards, val=[range(40)])


@settings(max_examples=25)
@given(
    sequences=st.integers(1, 60),
    ranks=st.integers(1, 4),
    micro_steps=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_a_step_sees_the_same_whoever_reads_it_and_an_epoch_sees_all_once(
    folder, sequences, ranks, micro_steps, seed
):
    sequences *= ranks * micro_steps
    count = sequences // (ranks * micro_steps)
    whole = TokenBlocks(folder, "train", 4, seed)
    steps = -(-2 * whole.n_blocks // sequences)  # two epochs at least
    seen = []
    for step in range(steps):
        together = rows(whole.batch(step, sequences, 0, sequences))
        assert len(together) == sequences
        seen += together
    for step in reversed(
        range(steps)
    ):  # a fresh reader (another rank, or a resume) that comes in another order
        part = TokenBlocks(folder, "train", 4, seed)
        apart = [
            row
            for i in range(ranks * micro_steps)
            for row in rows(part.batch(step, sequences, i * count, count))
        ]
        assert apart == seen[step * sequences : (step + 1) * sequences]
        if steps - step > 2:
            break
    n = whole.n_blocks
    every = sorted(rows(whole.in_order(0, n)))
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == every
    assert seen[:n] != seen[n : 2 * n] and seen[:n] != every  # 22 blocks: chance is 1 in 22!


def test_seeds_differ_and_the_order_never_changes_between_versions(folder):
    first = TokenBlocks(folder, "train", 4, seed=0)._permutation(0)
    assert first.dtype == np.uint32
    # Written down at the first version: a change here silently changes what every resumed run sees.
    assert first[:8].tolist() == [0, 21, 2, 11, 20, 17, 9, 1]
    assert first.tolist() != TokenBlocks(folder, "train", 4, seed=1)._permutation(0).tolist()


def test_keeps_at_most_two_permutations(folder):
    blocks = TokenBlocks(folder, "train", 4)
    for step in range(5):
        blocks.batch(step, blocks.n_blocks, 0, 1)
    assert list(blocks._permutations) == [3, 4]


def test_errors_name_what_to_change(folder, tmp_path):
    with pytest.raises(
        DataError,
        match="longest shard of split 'val' has 40 tokens.*block_size=40 takes 41.*at most 39",
    ):
        TokenBlocks(folder, "val", 40)
    with pytest.raises(DataError, match="no split 'test', there are train, val"):
        TokenBlocks(folder, "test", 4)
    with pytest.raises(DataError, match="seed=-1"):
        TokenBlocks(folder, "train", 4, seed=-1)
    one_token = make_data_set(tmp_path, [[1]])
    with pytest.raises(
        DataError, match="has 1 tokens.*takes 2; prepare more text"
    ):  # no "at most 0"
        TokenBlocks(one_token, "train", 1)
    with pytest.raises(AssertionError):
        TokenBlocks(folder, "train", 4).batch(0, 8, 4, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a GPU")
def test_pins(folder):
    assert all(
        t.is_pinned() for t in TokenBlocks(folder, "train", 4, pin_memory=True).batch(0, 4, 0, 4)
    )


@pytest.mark.quick
def test_a_json_file_is_one_that_any_program_reads(tmp_path):
    """Strict readers refuse NaN, and tools that look at text files want a newline at the end."""
    found = {"loss": math.nan, "gains": (1.5, math.inf), "rows": [{"step": 3, "loss": -math.inf}]}
    write_json(tmp_path / "found.json", found)
    text = (tmp_path / "found.json").read_text()
    expected = {"loss": None, "gains": [1.5, None], "rows": [{"step": 3, "loss": None}]}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert text.endswith("}\n") and not (tmp_path / "found.json.tmp").exists()
