"""Tokenising in several processes, with the results in the order of the texts."""

import collections
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from splits import split_text
from tokenizer import clean, get_tokenizer

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1 << 20  # what a worker gets at a time


def start_workers(count):
    """-> a pool of processes that have begun: where they are forked, this process has no threads
    yet."""
    pool = ProcessPoolExecutor(count, initializer=start_worker)
    pool.submit(os.getpid).result()
    return pool


def start_worker():
    """Only the parent answers Ctrl-C. A worker whose parent was killed ends as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode(texts, description, plan):
    """description: of the tokenizer. plan: from plan_splits.
    -> {split: (uint16 tokens, how many documents)}."""
    tokenizer = get_tokenizer(description)
    end_of_text = np.array([tokenizer.eot_token], np.uint32)
    parts = {"train": [end_of_text[:0]], "val": [end_of_text[:0]]}
    documents = {"train": 0, "val": 0}
    for text in map(clean, texts):
        for split, part in split_text(text, plan):
            parts[split] += end_of_text, tokenizer.encode(part)
            documents[split] += 1
    return {
        split: (np.concatenate(parts[split]).astype(np.uint16), documents[split]) for split in parts
    }


def chunks(texts, position):
    """Yields (some texts, a copy of `position` after them, from which a run can continue)."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk, dict(position)
            chunk, characters = [], 0
    if chunk:
        yield chunk, dict(position)


def encode_all(pool, read_ahead, jobs, *arguments):
    """jobs: from `chunks`. Yields (the result of `encode`, the position) in their order, and reads
    at most `read_ahead` jobs ahead; Pool.imap would read the whole corpus."""
    waiting = collections.deque()
    for texts, position in jobs:
        waiting.append((pool.submit(encode, texts, *arguments), position))
        if len(waiting) > read_ahead:
            future, position = waiting.popleft()
            yield future.result(), position
    for future, position in waiting:
        yield future.result(), position
