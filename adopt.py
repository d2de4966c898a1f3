"""
Shards that others made: fetched if they are public, checked, and described by a meta.json.

The shards themselves are not changed. They do not say which tokenizer made them, so the user does;
ids that cannot come from that tokenizer are refused.
"""

import os
import pickle
import shlex
from fnmatch import fnmatch

import numpy as np

from corpus import ask_hub, commit_of
from data import META, PROGRESS, DataError, brief, read_meta, read_shard, scan, verify, write_meta
from tokenizer import describe, sizes

# Data sets of the Hub that are ready-made shards of GPT-2's tokens, 100 million in each:
# fineweb_val_000000.bin, fineweb_train_000001.bin and so on.
READY_MADE = ("kjj0/fineweb10B-gpt2", "kjj0/fineweb100B-gpt2", "kjj0/finewebedu10B-gpt2")
NEVER_IN_UTF8 = [0xC0, 0xC1, *range(0xF5, 0x100)]
CONTROLS = [i for i in range(32) if chr(i) not in "\t\n\f\r"]


def fetch(dataset, out, train_shards, revision, command):
    """Fetches ready-made shards into the folder `out` and describes them. A file that is there is
    not fetched again. train_shards: how many of the training shards; None: all. revision: of the
    data set; None: any that is there, else the newest. Raises DataError."""
    if (out / META).exists():
        source = read_meta(out)["source"]
        there = [source.get(name) for name in ("dataset", "train_shards", "revision")]
        asked = commit_of(dataset, revision) if revision else there[2]
        if there != [dataset, train_shards, asked]:
            raise DataError(
                f"{out} has {there[1] or 'all'} training shards of {there[0]}, revision "
                f"{there[2]}; pass another --out, or: rm {shlex.quote(str(out / META))}; "
                f"{brief(command)}"
            )
        print(f"{out} is already prepared: {verify(out):,} tokens, every checksum as it should be")
        return
    revision, names = ask_hub(dataset, revision)
    files = sorted(name for name in names if fnmatch(name, "*_val_*.bin"))
    training = sorted(name for name in names if fnmatch(name, "*_train_*.bin"))
    if train_shards is not None and not 1 <= train_shards <= len(training):
        raise DataError(f"--train-shards {train_shards}: {dataset} has {len(training)} of them")
    files += training[:train_shards]

    from huggingface_hub import hf_hub_download

    for i, file in enumerate(files, 1):
        print(f"{file}, {i} of {len(files)}", flush=True)
        try:
            hf_hub_download(dataset, file, repo_type="dataset", revision=revision, local_dir=out)
        except Exception as error:  # the network, the disk, a name that is gone
            raise DataError(
                f"{dataset}: {file} could not be fetched ({brief(error, 400)}); when the cause is "
                f"gone, the same command continues: {brief(command)}"
            ) from error
    source = {"kind": "hub shards", "dataset": dataset, "revision": revision}
    adopt(out, "gpt2", command, {**source, "train_shards": train_shards}, files)


def adopt(directory, tokenizer, command, source=None, files=None):
    """Describes the shards of a folder: reads them once and writes meta.json.

    tokenizer: "chars" for nanoGPT's character-level sets, or what `describe` takes. files: the
    names of the shards; None: all. Raises DataError."""
    if directory.is_dir() and not os.access(directory, os.W_OK):
        folder = shlex.quote(str(directory))
        raise DataError(
            f"{directory} cannot be written, and meta.json stands beside the shards; make a folder "
            f"of links and adopt that: mkdir -p data/{directory.name}; "
            f"ln -s {folder}/*.bin data/{directory.name}"
        )
    for path in directory / META, directory / PROGRESS:
        if path.exists():
            raise DataError(
                f"{path} is there already; to describe the shards anew: "
                f"rm {shlex.quote(str(path))}; {brief(command)}"
            )
    description = _description(directory, tokenizer)
    n_vocab, eot_token = sizes(description)
    splits, counts = {}, np.zeros(2**16, np.int64)
    for split, paths in _find_shards(directory, files).items():
        described = splits[split] = {"tokens": 0, "documents": 0, "shards": []}
        for path in paths:
            tokens = read_shard(path)
            crc, largest = scan(tokens)
            if largest >= n_vocab:
                raise DataError(
                    f"{path}: token id {largest} is outside {tokenizer}'s vocabulary of "
                    f"{n_vocab:,}; pass the --tokenizer that made it"
                )
            shard = {"file": path.name, "tokens": len(tokens), "crc32": crc}
            described["shards"].append(shard)
            described["tokens"] += len(tokens)
            described["documents"] += int(np.count_nonzero(tokens == eot_token))
            counts += np.bincount(tokens[: 1 << 20], minlength=2**16)
            print(f"{path}: {len(tokens):,} tokens", flush=True)
    _check_ids(directory, tokenizer, counts)
    meta = {
        "tokenizer": description,
        "vocab_size": n_vocab,
        "eot_token": eot_token,
        "splits": splits,
        "source": source or {"kind": "adopted"},
        "command": command,
    }
    write_meta(directory, meta)


def _find_shards(directory, files):
    """-> {split: sorted paths}. Raises DataError."""
    found = {}
    for split, other in ("train", "val"), ("val", "train"):
        paths = sorted(directory.glob(f"*{split}*.bin"))
        if files is not None:
            paths = [path for path in paths if path.name in files]
        if not paths or any(other in path.name for path in paths):
            there = brief(", ".join(path.name for path in paths)) or "none"
            raise DataError(
                f"{directory} needs *train*.bin and *val*.bin and no name with both; "
                f"as *{split}*.bin it has {there}"
            )
        found[split] = paths
    return found


# ---- what made the ids ---------------------------------------------------------------------------


def _description(directory, tokenizer):
    """-> the description of the tokenizer that made the shards. Raises DataError."""
    beside = directory / "meta.pkl"
    if tokenizer is None:
        raise DataError(
            "--adopt needs the tokenizer that made these shards: --tokenizer gpt2, bytes, "
            "chars (nanoGPT's character-level sets), another of tiktoken's or a tokenizer.json"
        )
    if beside.exists() and tokenizer != "chars":
        raise DataError(
            f"{beside}: these are the ids of a data set of nanoGPT with its own vocabulary, not of "
            f"{brief(tokenizer)}; for a character-level one pass --tokenizer chars"
        )
    if tokenizer != "chars":
        return describe(tokenizer)
    try:
        with open(beside, "rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
    except Exception as error:  # a pickle can hold anything
        raise DataError(
            f"{beside}: --tokenizer chars takes the characters from this file of nanoGPT, which "
            f"could not be read ({brief(error)})"
        ) from error
    if not all(isinstance(one, str) and len(one) == 1 for one in characters):
        raise DataError(f"{beside}: its vocabulary is not one of characters: {brief(characters)}")
    return {"kind": "characters", "characters": "".join(characters)}


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _check_ids(directory, tokenizer, counts):
    """counts: (65536,), how often each id is in the first tokens of the shards. Raises DataError
    when the named tokenizer cannot have made these ids."""
    total = counts.sum()
    if tokenizer == "bytes":
        wrong = counts[NEVER_IN_UTF8].sum() + counts[CONTROLS].sum()
        if counts[NEVER_IN_UTF8].any() or wrong > total / 20:
            raise DataError(
                f"{directory}: these ids are no bytes of UTF-8 text: {wrong / total:.0%} of them "
                "would be control characters or never occur; pass the --tokenizer that made them"
            )
    elif isinstance(tokenizer, str) and tokenizer in ("gpt2", "r50k_base", "p50k_base"):
        # The ids below 256 are single bytes, and no long text consists of these alone.
        if total >= 4096 and not counts[256:50256].any():
            raise DataError(
                f"{directory}: no id is above 255, so {tokenizer} did not make them; pass the "
                "--tokenizer that did (bytes, or chars for nanoGPT's character-level sets)"
            )
