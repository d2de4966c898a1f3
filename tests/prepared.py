"""What the tests of prepare_data.py have in common."""

from pathlib import Path

import numpy as np
import pytest

import prepare_data
from data import read_meta, read_shard
from tokenizer import get_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = [f"document {i}:\n\nits text <|endoftext|> is\tnumber {i * i} ☃\n" for i in range(600)]


def run(*argv, fails=None):
    argv = [*map(str, argv), "--workers", "2"]
    if fails is None:
        return prepare_data.main(argv)
    with pytest.raises(SystemExit, match=fails):
        prepare_data.main(argv)


def documents(folder, split):
    """The documents back from the shards."""
    meta = read_meta(folder)
    tokens = np.concatenate(
        [read_shard(folder / shard["file"]) for shard in meta["splits"][split]["shards"]]
    )
    assert tokens[0] == meta["eot_token"]  # it stands before each document
    starts = np.flatnonzero(tokens == meta["eot_token"])
    decode = get_tokenizer(meta["tokenizer"]).decode
    found = [decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]
    described = meta["splits"][split]
    assert (len(found), len(tokens)) == (described["documents"], described["tokens"])
    return found


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
