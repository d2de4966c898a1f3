"""
The splits of a corpus: which documents are in train and in val, and their way into shards.

A hash of its content decides for each document, so no text is in both splits, however often the
corpus has it. In a small corpus a split could then be empty, or much larger or smaller than was
asked: plan_splits reads all of it and chooses another border, or cuts one document in two.
"""

import hashlib
import io
import json

import numpy as np

from data import PROGRESS, DataError, scan, write_atomic, write_shard
from tokenizer import clean

ENOUGH = 1 << 14  # characters in each split: then the rest of the corpus need not be looked at


# ---- which split ---------------------------------------------------------------------------------


def fingerprint(text):
    """-> an integer below 2**64 that depends on the text alone."""
    digest = hashlib.blake2b(clean(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def plan_splits(texts, val_share):
    """texts: all documents of the corpus, read only as far as needed; 0 < val_share < 1.
    -> {"val_below": documents with a smaller fingerprint are in val,
        "cut": None, or [fingerprint, position]: this one document is cut there, its end is in val}.
    Raises DataError when there are fewer than two characters."""
    val_below = val_share * 2**64
    sizes = {}  # characters of each different document, by its fingerprint
    val_size, total, longest = 0, 0, ""
    for text in map(clean, texts):
        digest = fingerprint(text)
        if digest in sizes:
            continue
        sizes[digest] = len(text)
        total += len(text)
        if digest < val_below:
            val_size += len(text)
        if val_size >= ENOUGH and total - val_size >= ENOUGH:
            return {"val_below": val_below, "cut": None}
        longest = max(longest, text, key=len)

    if total < 2:
        raise DataError("there is too little text for two splits; give at least two characters")
    wanted = val_share * total
    if _fits(val_size, wanted, total):
        return {"val_below": val_below, "cut": None}
    val_below, val_size = _border(sizes, wanted)
    if _fits(val_size, wanted, total):
        return {"val_below": val_below, "cut": None}
    return {"val_below": 0, "cut": [fingerprint(longest), _cut_position(longest, wanted)]}


def _fits(val_size, wanted, total):
    """Whether a validation split of val_size characters will do where `wanted` were asked.

    At least half of them, or 4,096 characters if that is fewer. At most twice as many, or a quarter
    of the corpus if that is more; and half of what was meant for training must be left."""
    least = min(wanted / 2, ENOUGH / 4)
    most = min(max(2 * wanted, total / 4), (total + wanted) / 2)
    return least <= val_size <= most and 0 < val_size < total


def _border(sizes, wanted):
    """-> (val_below, the size of val with it), as near to `wanted` as the documents allow. At least
    one document is in val."""
    choices, size = [], 0
    for digest in sorted(sizes):
        size += sizes[digest]
        choices.append((digest + 1, size))
    return min(choices, key=lambda choice: abs(choice[1] - wanted))


def _cut_position(text, wanted):
    """-> where to cut so that about `wanted` characters follow, at most half of the text: after an
    empty line, a line or a word where one ends near."""
    start = len(text) - min(max(1, round(wanted)), len(text) // 2)
    near = start + (len(text) - start) // 2
    for end in "\n\n", "\n", " ":
        found = text.find(end, start, near)
        if found >= 0:
            return found + len(end)
    return start


def split_text(text, plan):
    """text: clean. -> [(name of the split, the text that belongs to it)]."""
    digest = fingerprint(text)
    if plan["cut"]:
        cut_digest, position = plan["cut"]
        if digest == cut_digest:
            return [("train", text[:position]), ("val", text[position:])]
    return [("val" if digest < plan["val_below"] else "train", text)]


# ---- on the way into shards ----------------------------------------------------------------------


class Split:
    """One split: its shards so far, and a buffer of the tokens that wait for the next one."""

    def __init__(self, out, name, shard_tokens):
        self.out, self.name = out, name
        self.documents, self.shards = 0, []
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0

    @property
    def tokens(self):
        return sum(shard["tokens"] for shard in self.shards) + self.filled

    def add(self, tokens, documents):
        """Takes tokens (n,) of uint16, in which `documents` documents begin, and writes each shard
        that is full. Raises DataError."""
        self.documents += documents
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self.write()

    def write(self):
        """Writes the buffer as a shard, full or not. Raises DataError."""
        file, tokens = f"{self.name}_{len(self.shards):06d}.bin", self.buffer[: self.filled]
        write_shard(self.out / file, tokens)
        self.shards.append({"file": file, "tokens": len(tokens), "crc32": scan(tokens)[0]})
        self.filled = 0


def save_progress(out, options, position, splits):
    """Writes what load_progress reads. position: in the corpus, where the run goes on. Raises
    DataError."""
    record = {
        "options": options,
        "position": position,
        "splits": {split.name: [split.documents, split.shards] for split in splits},
    }
    unwritten = {split.name: split.buffer[: split.filled] for split in splits}
    file = io.BytesIO()
    np.savez(file, record=json.dumps(record), **unwritten)
    write_atomic(out / PROGRESS, file.getbuffer())


def load_progress(out):
    """-> what save_progress recorded, and {split: tokens that are in no shard yet}."""
    with np.load(out / PROGRESS) as saved:
        tokens = dict(saved)
    return json.loads(str(tokens.pop("record"))), tokens
