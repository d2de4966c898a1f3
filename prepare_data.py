"""From a corpus to token shards, which train.py reads.

    python prepare_data.py                                       # Python's own sources -> data/stdlib; no download
    python prepare_data.py openwebtext                           # 9 billion GPT-2 tokens, 24 GB -> data/openwebtext
    python prepare_data.py HuggingFaceFW/fineweb --config sample-10BT              # any text data set of the Hub
    python prepare_data.py --files 'texts/*.txt' --name mytexts  # .txt (a document each), .jsonl, .parquet; .gz .bz2 ..
    python prepare_data.py --adopt data/fineweb10B --tokenizer gpt2  # describe shards of llm.c or nanoGPT, as they are

Stopped or killed, the same command continues after the last whole shard and ends with the same bytes. Each document
follows an end-of-text token. A hash of its content puts it into train or val, so no text is in both.
"""
import argparse
import collections
import glob
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import sysconfig
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data import (META, PROGRESS, TOKENIZERS, DataError, get_tokenizer, probe, read_meta, read_shard, scan, verify,
                  write_atomic, write_meta, write_shard)

OPENWEBTEXT = "Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c"
FILES = {".txt": ("text", {"sample_by": "document"}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
COMPRESSED = ".gz", ".bz2", ".xz", ".zst"
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1 << 20  # what a worker gets at a time
OFFLINE = "offline: python prepare_data.py (the standard library's sources), or --files with texts of yours"


# ---- sources --------------------------------------------------------------------------------------------------------

def open_source(options, position):
    """-> (iterator of the texts after position, function that says where it is, number of documents or None)."""
    if options["kind"] == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        paths = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)
                       and not path.name.startswith("_sysconfigdata"))  # that one differs from machine to machine
        return map(read_source, paths[position["consumed"]:]), lambda: None, len(paths)
    if options["kind"] == "hub":
        keywords = {"path": options["dataset"], "name": options["config"], "revision": options["revision"]}
    else:
        paths = [path for path, *_ in find_files(options["files"])]
        kinds = {next((s for s in reversed(Path(path).suffixes) if s not in COMPRESSED), "none") for path in paths}
        if len(kinds) > 1 or not kinds <= FILES.keys():
            raise DataError(f"--files {shlex.join(options['files'])} finds files of kind {', '.join(sorted(kinds))}; "
                            f"give one kind of {', '.join(FILES)}, plain or compressed ({', '.join(COMPRESSED)})")
        if any(path.endswith(".zst") for path in paths) and not importlib.util.find_spec("zstandard"):
            raise DataError("reading .zst takes one package more: pip install zstandard")
        builder, keywords = FILES[kinds.pop()]
        keywords = {"path": builder, "data_files": paths, **keywords}
    import datasets  # 2 seconds, which the standard library's sources do without
    dataset = datasets.load_dataset(split=options["split"], streaming=True, **keywords)  # streams: no copy on the disk
    if position["state"]:
        dataset.load_state_dict(position["state"])
    known = (dataset.info.splits or {}).get(options["split"])
    return (text_of(row, options["text_key"]) for row in dataset), dataset.state_dict, known and known.num_examples


def read_source(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # encode leaves empty texts out; the position counts them


def text_of(row, key):
    if not isinstance(row.get(key, 0), str | None):
        raise DataError(f"no text in column {key!r}: {row.get(key)!r}; pass --text-key, one of {', '.join(row)}")
    return row[key] or ""


def find_files(patterns):
    """-> [(path, bytes, time of change)], sorted. Raises DataError."""
    found = {path for pattern in patterns for path in glob.glob(pattern, recursive=True)}
    paths = sorted(filter(os.path.isfile, found))
    if not paths:
        raise DataError(f"--files {shlex.join(patterns)} finds no file")
    return [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]


def pin_revision(options):
    """Asks the Hub for the commit, so that a run that continues tomorrow reads what it read today. Raises DataError."""
    from huggingface_hub import HfApi
    hub = HfApi()
    probe(hub.endpoint, OFFLINE)  # datasets would retry for 23 seconds
    try:
        options["revision"] = hub.dataset_info(options["dataset"], revision=options["revision"], timeout=10).sha
    except Exception as error:  # not found, gated, a lost connection: they share no other base class
        raise DataError(f"data set {options['dataset']}, revision {options['revision'] or 'main'}: {error}; look for "
                        f"its name at {hub.endpoint}/datasets; for a private one: hf auth login") from error


# ---- tokenising -----------------------------------------------------------------------------------------------------

def start_worker():
    """Ctrl-C is the parent's to answer; and when the parent is killed its workers must not wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode(texts, tokenizer, val_share):
    """-> {split: (uint16 tokens, documents)}; empty texts are left out."""
    encoding = get_tokenizer(tokenizer)
    end_of_text = np.array([encoding.eot_token], np.uint32)
    parts = {"train": [], "val": []}
    for text in filter(None, texts):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        split = "val" if int.from_bytes(digest, "little") < val_share * 2**64 else "train"
        parts[split] += end_of_text, encoding.encode_to_numpy(text, disallowed_special=())  # is encode_ordinary
    return {split: (np.concatenate([end_of_text[:0], *part]).astype(np.uint16), len(part) // 2)
            for split, part in parts.items()}


def chunks(texts, state, consumed):
    """Yields (texts, position); position is all that it takes to continue after them."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            consumed += len(chunk)
            yield chunk, {"consumed": consumed, "state": state()}
            chunk, characters = [], 0
    if chunk:
        yield chunk, {"consumed": consumed + len(chunk), "state": state()}


def encode_all(pool, read_ahead, jobs, *arguments):
    """Yields (encode's result, position) in the order of jobs. Pool.imap would read the whole corpus ahead."""
    waiting = collections.deque()
    for texts, position in jobs:
        waiting.append((pool.submit(encode, texts, *arguments), position))
        if len(waiting) > read_ahead:
            future, position = waiting.popleft()
            yield future.result(), position
    for future, position in waiting:
        yield future.result(), position


# ---- writing --------------------------------------------------------------------------------------------------------

class Split:
    """One split's tokens on their way into shards."""

    def __init__(self, out, name, shard_tokens):
        self.out, self.name, self.documents, self.shards = out, name, 0, []
        self.buffer, self.filled = np.empty(shard_tokens, np.uint16), 0

    @property
    def tokens(self):
        return sum(shard["tokens"] for shard in self.shards) + self.filled

    def add(self, tokens, documents):
        self.documents += documents
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self.write()

    def write(self):
        file, tokens = f"{self.name}_{len(self.shards):06d}.bin", self.buffer[: self.filled]
        write_shard(self.out / file, tokens)
        self.shards.append({"file": file, "tokens": len(tokens), "crc32": scan(tokens)[0]})
        self.filled = 0


def save_progress(out, options, position, splits):
    record = {"options": options, "position": position,
              "splits": {split.name: [split.documents, split.shards] for split in splits}}
    file = io.BytesIO()
    np.savez(file, record=json.dumps(record), **{split.name: split.buffer[: split.filled] for split in splits})
    write_atomic(out / PROGRESS, file.getbuffer())


def load_progress(out):
    """-> what save_progress recorded, and {split: tokens that are in no shard yet}."""
    with np.load(out / PROGRESS) as saved:
        tokens = dict(saved)
    return json.loads(str(tokens.pop("record"))), tokens


class Meter:
    """Prints how far it is: over the same line of a terminal, else a line every few seconds."""

    def __init__(self, splits, consumed, total):
        self.splits, self.consumed, self.total, self.begun = splits, consumed, total, time.monotonic()
        self.tokens, self.shown = sum(split.tokens for split in splits), self.begun

    def show(self, consumed, last=False):
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if not last and now - self.shown < (0.5 if terminal else 5):
            return
        self.shown, seconds, tokens = now, now - self.begun, sum(split.tokens for split in self.splits)
        line = f"{consumed:,} documents, {tokens:,} tokens, {(tokens - self.tokens) / seconds:,.0f} tokens/s"
        if self.total and consumed > self.consumed:
            left = (self.total - consumed) * seconds / (consumed - self.consumed)
            line += f", {left / 60:.1f} min left"
        print(f"\r{line:79}" if terminal else line, end="\n" if last or not terminal else "", flush=True)


def prepare(out, options, workers, command):
    """Makes the data set in folder out, or continues it, or finds it made. Raises DataError."""
    record = None
    if (out / META).exists():
        there = read_meta(out)["source"]
    elif not any(out.glob("*.bin")):  # a run that wrote no shard binds the next one to nothing
        there = options
    elif (out / PROGRESS).exists():
        record, tokens = load_progress(out)
        there = record["options"]
    else:
        raise DataError(f"{out} has .bin files that are not this script's: pass another --out, or describe them: "
                        f"python prepare_data.py --adopt {shlex.quote(str(out))} --tokenizer gpt2")
    if options.get("revision", "") is None:
        options["revision"] = there.get("revision")
    if there != options:
        differences = [f"{key} {there.get(key)} there, {options.get(key)} asked" for key in {**there, **options}
                       if there.get(key) != options.get(key)]
        raise DataError(f"{out} was begun with other options ({'; '.join(differences)}): pass another --out, or start "
                        f"over: rm -rf {shlex.quote(str(out))}; {command}")
    if (out / META).exists():
        print(f"{out} is already prepared: {verify(out):,} tokens, every checksum as it should be")
        (out / PROGRESS).unlink(missing_ok=True)  # the kill may have come just before its removal
        return

    if options["kind"] == "hub":
        pin_revision(options)
    encoding = get_tokenizer(options["tokenizer"])  # here too, so that its error comes once and not from every worker
    out.mkdir(parents=True, exist_ok=True)
    splits = train, val = [Split(out, name, options["shard_tokens"]) for name in ("train", "val")]
    position = {"consumed": 0, "state": None}
    if record:
        position = record["position"]
        for split in splits:
            documents, split.shards = record["splits"][split.name]
            split.add(tokens[split.name], documents)
            for shard in split.shards:
                read_shard(out / shard["file"])
        print(f"continuing after {position['consumed']:,} documents")
    else:
        save_progress(out, options, position, splits)  # from now on .bin files here are known as this script's

    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        pool.submit(os.getpid).result()  # forks the workers before `datasets` starts threads
        try:
            texts, state, total = open_source(options, position)
            meter, jobs = Meter(splits, position["consumed"], total), chunks(texts, state, position["consumed"])
            for parts, position in encode_all(pool, 3 * workers, jobs, options["tokenizer"], options["val_share"]):
                whole = len(train.shards) + len(val.shards)
                for split in splits:
                    split.add(*parts[split.name])
                if len(train.shards) + len(val.shards) > whole:
                    save_progress(out, options, position, splits)
                meter.show(position["consumed"])
        except DataError:
            raise
        except Exception as error:  # whatever `datasets` meets: the network, a damaged file, another encoding
            raise DataError(f"reading {options['kind']} stopped after {position['consumed']:,} documents ({error!r}); when the "
                            "cause is gone, the same command continues. Files that were changed are another data set, "
                            "for another --out") from error
    meter.show(position["consumed"], last=True)

    for split in splits:
        if not split.documents:
            raise DataError(f"none of {train.documents + val.documents:,} documents is in {split.name} at --val-share "
                            f"{options['val_share']}: give more documents (a .txt file is one) or another --val-share")
    for split in splits:
        if split.filled:
            split.write()
    write_meta(out, {
        "tokenizer": options["tokenizer"], "vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token,
        "splits": {split.name: {"tokens": split.tokens, "documents": split.documents, "shards": split.shards}
                   for split in splits},
        "source": options, "command": command})
    (out / PROGRESS).unlink()
    print(f"{out}: {train.tokens:,} tokens in {train.documents:,} documents to train on, "
          f"{val.tokens:,} in {val.documents:,} to validate")


def adopt(directory, tokenizer, command):
    """Describes shards that lie there: reads them once and writes meta.json. Raises DataError."""
    if tokenizer not in TOKENIZERS:
        raise DataError(f"--adopt needs the tokenizer that made these shards: --tokenizer {' or '.join(TOKENIZERS)}")
    for path in directory / META, directory / PROGRESS:
        if path.exists():
            raise DataError(f"{path} is there already; to describe the shards anew: rm {shlex.quote(str(path))}; "
                            f"{command}")
    vocab_size, splits = TOKENIZERS[tokenizer], {}
    for split, other in ("train", "val"), ("val", "train"):
        paths = sorted(directory.glob(f"*{split}*.bin"))
        if not paths or any(other in path.name for path in paths):
            raise DataError(f"{directory} needs *train*.bin and *val*.bin and no name with both; as *{split}*.bin it "
                            f"has {', '.join(path.name for path in paths) or 'none'}")
        described = splits[split] = {"tokens": 0, "documents": 0, "shards": []}
        for path in paths:
            tokens = read_shard(path)
            crc, largest = scan(tokens)
            if largest >= vocab_size:
                raise DataError(f"{path}: token id {largest} is outside {tokenizer}'s vocabulary of {vocab_size:,}; "
                                "pass the --tokenizer that made it")
            described["shards"].append({"file": path.name, "tokens": len(tokens), "crc32": crc})
            described["tokens"] += len(tokens)
            described["documents"] += int(np.count_nonzero(tokens == vocab_size - 1))
            print(f"{path}: {len(tokens):,} tokens", flush=True)
    write_meta(directory, {"tokenizer": tokenizer, "vocab_size": vocab_size, "eot_token": vocab_size - 1,
                           "splits": splits, "source": {"kind": "adopted"}, "command": command})


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="stdlib (default), openwebtext, or a name on the Hugging Face Hub")
    parser.add_argument("--files", nargs="+", metavar="PATTERN", help="local texts instead")
    parser.add_argument("--adopt", type=Path, metavar="DIR", help="folder of shards to describe instead")
    parser.add_argument("--config", help="the Hub data set's configuration")
    parser.add_argument("--split", help="the Hub data set's split to read (default train)")
    parser.add_argument("--revision", help="the Hub data set's commit (default the newest, which is recorded)")
    parser.add_argument("--text-key", default="text", help="the column that has the text")
    parser.add_argument("--tokenizer", help="gpt2, or bytes (default for stdlib), which needs no download")
    parser.add_argument("--name", help="of the folder in data/")
    parser.add_argument("--out", type=Path, help="the folder itself (default data/NAME)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--val-share", type=float, help="of the documents (default 0.0005 of Hub data sets, else 0.05)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    hub = args.dataset not in (None, "stdlib")
    share = args.val_share if args.val_share is not None else 0.0005 if hub else 0.05
    if bool(args.dataset) + bool(args.files) + bool(args.adopt) > 1:
        parser.error("give one of: the name of a data set, --files, --adopt")
    if not hub and (args.config or args.split or args.revision):
        parser.error("--config, --split and --revision belong to a Hub data set")
    if not 0 < args.shard_tokens < 2**31 or not 0 < share < 1 or args.workers < 1:
        parser.error("--shard-tokens must be 1 to 2**31 - 1, --val-share between 0 and 1, --workers at least 1")

    command = shlex.join(["python", "prepare_data.py", *argv])
    common = {"tokenizer": args.tokenizer or "gpt2", "val_share": share, "shard_tokens": args.shard_tokens}
    try:
        if args.adopt:
            return adopt(args.adopt, args.tokenizer, command)
        if hub:
            default = OPENWEBTEXT if args.dataset == "openwebtext" else (args.dataset, None, None)
            options = {"kind": "hub", "dataset": default[0], "config": args.config or default[1],
                       "revision": args.revision or default[2], "split": args.split or "train",
                       "text_key": args.text_key}
            name = "-".join(filter(None, [args.dataset.split("/")[-1], args.config]))
        elif args.files:
            digest = hashlib.blake2b(json.dumps(find_files(args.files)).encode(), digest_size=8).hexdigest()
            options = {"kind": "files", "files": args.files, "digest": digest, "split": "train",
                       "text_key": args.text_key}
            name = Path(args.files[0]).resolve().parent.name
        else:
            options, name = {"kind": "stdlib", "python": platform.python_version()}, "stdlib"
            common["tokenizer"] = args.tokenizer or "bytes"
        prepare(args.out or Path("data") / (args.name or name), options | common, args.workers, command)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues after the last whole shard")


if __name__ == "__main__":
    main()
