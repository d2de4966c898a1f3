"""
From a corpus to token shards, which train.py reads.

    python prepare_data.py  # Python's own sources -> data/stdlib; no download
    python prepare_data.py openwebtext  # 9 billion GPT-2 tokens, 24 GB -> data/openwebtext
    python prepare_data.py HuggingFaceFW/fineweb --config sample-10BT  # any texts of the Hub
    python prepare_data.py kjj0/fineweb10B-gpt2  # ready-made shards of the Hub, 20 GB
    python prepare_data.py --files texts 'more/*.jsonl.gz' --name mytexts  # files of yours
    python prepare_data.py --files stories.txt --separator '<|endoftext|>' --tokenizer chars
    python prepare_data.py --adopt data/fineweb10B --tokenizer gpt2  # shards that lie there

After a stop or a kill, the same command continues after the last whole shard, and the data set ends
with the same bytes. An end-of-text token stands before each document. A hash of its content puts a
document into train or val, so no text is in both.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import corpus
from adopt import READY_MADE, adopt, fetch
from data import META, PROGRESS, DataError, brief, read_meta, read_shard, verify, write_meta
from splits import Split, load_progress, plan_splits, save_progress
from tokenizer import (
    END_OF_TEXT,
    clean,
    describe,
    describe_characters,
    get_tokenizer,
    tokenizer_name,
)
from workers import chunks, encode_all, start_workers

# The options that each kind of source takes; --workers is for all.
OPTIONS = {
    "adopt": {"tokenizer"},
    "ready": {"train_shards", "revision", "name", "out"},
    "stdlib": {"tokenizer", "val_share", "shard_tokens", "name", "out"},
}
OPTIONS["files"] = OPTIONS["stdlib"] | {"text_key", "separator", "encoding", "skip_unusable"}
OPTIONS["hub"] = OPTIONS["files"] | {"config", "split", "revision"}
GENERAL = {"dataset", "files", "adopt", "kind", "workers"}
OPENWEBTEXT = ("Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c")


# ---- the source ----------------------------------------------------------------------------------


def source_files(options):
    """-> paths, in the order in which they are read. Raises DataError."""
    if options["kind"] == "stdlib":
        return corpus.standard_library()
    if options["kind"] == "files":
        return corpus.find_files(options["files"])
    return corpus.hub_files(
        options["dataset"], options["config"], options["revision"], options["split"]
    )


def reading_of(options):
    """-> how the files are read."""
    return corpus.Reading(
        text_key=options.get("text_key") or "text",
        separator=options.get("separator") or "",
        encoding=options.get("encoding") or "utf-8",
        skip_unusable=options.get("skip_unusable") or options["kind"] == "stdlib",
    )


def digest_of(paths):
    """-> a string that changes when a file is added, removed or changed."""
    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=8).hexdigest()


# ---- preparing -----------------------------------------------------------------------------------


class Meter:
    """Prints the progress: in a terminal on one line that changes, else on a line every 5 s."""

    def __init__(self, splits, position, n_files):
        self.splits, self.n_files, self.first_file = splits, n_files, position["file"]
        self.begun = self.shown = time.monotonic()
        self.first_tokens = sum(split.tokens for split in splits)

    def show(self, position, last=False):
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if not last and now - self.shown < (0.5 if terminal else 5):
            return
        self.shown, seconds = now, now - self.begun
        tokens = sum(split.tokens for split in self.splits)
        speed = (tokens - self.first_tokens) / seconds
        line = f"{position['documents']:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s"
        done = position["file"] - self.first_file
        if done and not last:
            left = (self.n_files - position["file"]) * seconds / done
            line += f", {left / 60:.1f} min left"
        if terminal:
            print(f"\r{line:79}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


def prepare(out, options, workers, command):
    """Makes the data set in the folder `out`, or continues it; verifies one that is finished.
    Raises DataError."""
    progress = unfinished(out, options, command)
    if (out / META).exists():
        print(f"{out} is already prepared: {verify(out):,} tokens, every checksum as it should be")
        # Where the run was killed just before it removed its progress:
        if (out / PROGRESS).exists():
            (out / PROGRESS).unlink()
        return
    if options["kind"] == "hub":
        options["revision"], _ = corpus.ask_hub(options["dataset"], options["revision"])

    with start_workers(workers) as pool:  # before `datasets` starts threads
        files, reading = source_files(options), reading_of(options)
        refuse_idle_options(files, options)
        texts = functools.partial(corpus.read_documents, files, reading)  # of a position
        description = describe_tokenizer(options["tokenizer"], texts)
        tokenizer = get_tokenizer(description)  # here too: its error comes once, not from workers
        if options["kind"] != "stdlib":
            give_notice(texts, reading, corpus.kind_of(files[0]), tokenizer)
        plan = plan_splits(texts(corpus.start()), options["val_share"])
        print_plan(plan, options)

        make_folder(out)
        splits = [Split(out, name, options["shard_tokens"]) for name in ("train", "val")]
        if progress:
            position = continue_from(out, splits, *progress)
        else:
            position = corpus.start()
            save_progress(out, options, position, splits)  # .bin files are known as ours from here
        meter = Meter(splits, position, len(files))
        jobs = chunks(texts(position), position)
        try:
            for parts, reached in encode_all(pool, 3 * workers, jobs, description, plan):
                shards_before = sum(len(split.shards) for split in splits)
                for split in splits:
                    split.add(*parts[split.name])
                if sum(len(split.shards) for split in splits) > shards_before:
                    save_progress(out, options, reached, splits)
                meter.show(reached)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, most likely because the memory is full; the same "
                f"command continues, with fewer of them: --workers {max(1, workers // 2)}"
            ) from error
    meter.show(position, last=True)
    finish(out, options, command, splits, description, position)


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{out}: this folder could not be made ({error.strerror}); pass another --out"
        ) from error


def unfinished(out, options, command):
    """-> the progress (see load_progress) of a run with the same options that is not finished, or
    None. Options without a revision get that of the run. Raises DataError where the folder has
    other files, or a run with other options."""
    progress, there = None, options
    if (out / META).exists():
        there = read_meta(out)["source"]
    elif (out / PROGRESS).exists() and any(out.glob("*.bin")):
        progress = load_progress(out)
        there = progress[0]["options"]
        if progress[0]["position"].keys() != corpus.start().keys():
            there = {**there, "version": "an earlier one"}
    elif any(out.glob("*.bin")):
        raise DataError(
            f"{out} has .bin files that are not this script's: pass another --out, or describe "
            f"them: python prepare_data.py --adopt {shlex.quote(str(out))} --tokenizer gpt2"
        )
    if options["kind"] == "hub" and there is not options:
        asked = options["revision"]
        commit = corpus.commit_of(options["dataset"], asked) if asked else there.get("revision")
        options["revision"] = commit

    differences = []
    for key in {**there, **options}:
        # A run that stopped at a row that cannot be used may continue with --skip-unusable: every
        # row before was used.
        if key != "skip_unusable" and there.get(key) != options.get(key):
            change = f"{brief(there.get(key), 80)} there, {brief(options.get(key), 80)} asked"
            if key == "digest":
                change = "the files are not the same ones, or were changed"
            differences.append(f"{key}: {change}")
    if differences:
        raise DataError(
            f"{out} was begun with other options ({'; '.join(differences)}): pass another --out, "
            f"or start over: rm -rf {shlex.quote(str(out))}; {brief(command)}"
        )
    return progress


def continue_from(out, splits, record, tokens):
    """Gives the splits the shards and tokens of the stopped run. -> its position. Raises
    DataError."""
    for split in splits:
        documents, split.shards = record["splits"][split.name]
        split.add(tokens[split.name], documents)
        for shard in split.shards:
            read_shard(out / shard["file"])
    print(f"continuing after {record['position']['documents']:,} documents")
    return record["position"]


def refuse_idle_options(files, options):
    """Raises DataError for an option that would have no effect on any of these files."""
    kinds = {corpus.kind_of(path) for path in files}
    shown = ", ".join(sorted(kinds))
    if options.get("separator") and kinds.isdisjoint(corpus.TEXT_KINDS):
        raise DataError(f"--separator is for text files; in those of kind {shown} a row is a text")
    if options.get("text_key", "text") != "text" and kinds <= set(corpus.TEXT_KINDS):
        raise DataError(f"--text-key is for files with columns; those here are of kind {shown}")
    if options.get("encoding") and kinds == {".parquet"}:
        raise DataError("--encoding is for text and JSON files; .parquet files say theirs")


def describe_tokenizer(argument, texts):
    """-> the tokenizer's description. For "chars" this reads all texts, to find the characters."""
    if argument != "chars":
        return describe(argument)
    characters = set()
    for text in texts(corpus.start()):
        characters.update(clean(text))
    return describe_characters(characters)


def give_notice(texts, reading, kind, tokenizer):
    """Prints notes on what the first document, from a file of this kind, shows: an end of text that
    stays text, a tokenizer that loses something. Raises DataError when there is no document."""
    first = next(texts(corpus.start()), None)
    if first is None:
        raise DataError("there is no text in these files")
    if END_OF_TEXT in first and kind in corpus.TEXT_KINDS and not reading.separator:
        print(
            f"note: the texts contain {END_OF_TEXT}, which stays text; if it stands between "
            f"documents: --separator '{END_OF_TEXT}'"
        )
    sample = clean(first[:10_000])
    if tokenizer.decode(tokenizer.encode(sample).tolist()) != sample:
        print("note: this tokenizer does not give every text back as it was")


def print_plan(plan, options):
    if plan["cut"]:
        position = plan["cut"][1]
        print(f"few documents: the longest is cut; from character {position:,} on it is for val")
    elif plan["val_below"] != options["val_share"] * 2**64:
        share = plan["val_below"] / 2**64
        print(f"few documents: --val-share {share:.4f} instead, so that both splits have some")


def finish(out, options, command, splits, description, position):
    """Writes the last shards and meta.json, and prints what was read and what was left out."""
    for split in splits:
        if split.filled:
            split.write()
    tokenizer = get_tokenizer(description)
    described = {}
    for split in splits:
        described[split.name] = {
            "tokens": split.tokens,
            "documents": split.documents,
            "shards": split.shards,
        }
    meta = {
        "tokenizer": description,
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.eot_token,
        "splits": described,
        "source": options,
        "command": command,
    }
    write_meta(out, meta)
    (out / PROGRESS).unlink()
    train, val = splits
    print(
        f"{out}: {train.tokens:,} tokens in {train.documents:,} documents to train on, "
        f"{val.tokens:,} in {val.documents:,} to validate; {tokenizer_name(description)} tokens "
        f"from {position['file']:,} files"
    )
    if options.get("separator") and position["documents"] <= position["file"]:
        print(f"note: the separator {options['separator']!r} stands in none of these files")
    if position["empty"] or position["skipped"]:
        print(
            f"left out: {position['empty']:,} empty documents, {position['skipped']:,} rows or "
            "files that could not be used"
        )


# ---- the command line ----------------------------------------------------------------------------


def path_of(argument):
    return Path(argument).expanduser()  # a shell leaves the ~ of --out=~/data as it is


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", nargs="?", help="stdlib (default), openwebtext, or a name on the Hub")
    add("--files", nargs="+", metavar="PATH", help="local files, folders or patterns instead")
    add("--adopt", type=path_of, metavar="DIR", help="folder of shards to describe instead")
    add("--config", help="the Hub data set's configuration")
    add("--split", help="the Hub data set's split to read (default train)")
    add("--revision", help="the Hub data set's commit (default the newest, which is recorded)")
    add("--train-shards", type=int, metavar="N", help="only the first N of ready-made shards")
    add("--text-key", help="the column of the text (default text), or a path such as data.text")
    add("--separator", help="what stands between the documents of a text file; \\n ends a line")
    add("--encoding", help="of text and JSON files (default utf-8)")
    add("--skip-unusable", action="store_true", help="count what cannot be used, do not stop")
    tokenizers = "gpt2 (default), another of tiktoken's, a tokenizer.json, chars, or bytes"
    add("--tokenizer", help=tokenizers + " (default for stdlib), which needs no download")
    name = "of the folder in data/ (default: the folder of the first of --files, or the data set)"
    add("--name", help=name)
    add("--out", type=path_of, help="the folder itself (default data/NAME)")
    add("--shard-tokens", type=int, help="tokens in each shard (default 100,000,000)")
    share = "share of the text that is kept for validation (default 0.0005 for the Hub, else 0.05)"
    add("--val-share", type=float, help=share)
    workers = min(os.cpu_count(), 61)  # 61: Windows' limit
    add("--workers", type=int, default=workers, help=f"processes that tokenise (default {workers})")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):
    """Completes the defaults that depend on the source. Ends with a message where the arguments do
    not go together."""
    if sum(map(bool, (args.dataset, args.files, args.adopt))) > 1:
        parser.error("give one of: the name of a data set, --files, --adopt")
    if args.dataset not in (None, "stdlib", "openwebtext") and os.path.exists(args.dataset):
        parser.error(f"{args.dataset} is a file or folder of this machine: --files {args.dataset}")
    args.kind = kind_of_source(args)
    for name, value in vars(args).items():
        if value not in (None, False) and name not in OPTIONS[args.kind] | GENERAL:
            names = ", ".join(kind for kind in OPTIONS if name in OPTIONS[kind])
            parser.error(
                f"--{name.replace('_', '-')} means nothing for a source of kind {args.kind}; it is "
                f"for {names}"
            )
    if args.val_share is None:
        args.val_share = 0.0005 if args.kind == "hub" else 0.05
    if args.shard_tokens is None:
        args.shard_tokens = 100_000_000
    if not 0 < args.shard_tokens < 2**31 or not 0 < args.val_share < 1 or args.workers < 1:
        parser.error(
            "--shard-tokens must be 1 to 2**31 - 1, --val-share between 0 and 1, "
            "--workers at least 1"
        )
    if args.separator == "":
        parser.error("--separator must not be empty")
    try:
        b"a".decode(args.encoding or "utf-8", "ignore")  # refuses base64 and its like, too
    except LookupError:
        parser.error(f"--encoding {args.encoding} is unknown; for example utf-8, cp1252, utf-16")


def kind_of_source(args):
    if args.adopt:
        return "adopt"
    if args.files:
        return "files"
    if args.dataset in READY_MADE:
        return "ready"
    return "stdlib" if args.dataset in (None, "stdlib") else "hub"


def options_of(args):
    """-> (a dict of what the data set is made from and how, the name of its folder)."""
    options = {
        "tokenizer": args.tokenizer or "gpt2",
        "val_share": args.val_share,
        "shard_tokens": args.shard_tokens,
    }
    if options["tokenizer"].endswith(".json"):  # another file of this name is another tokenizer
        options["tokenizer_file"] = tokenizer_name(describe(options["tokenizer"]))
    if args.kind == "hub":
        known = OPENWEBTEXT if args.dataset == "openwebtext" else (args.dataset, None, None)
        source = {
            "kind": "hub",
            "dataset": known[0],
            "config": args.config or known[1],
            "revision": args.revision or known[2],
            "split": args.split or "train",
        }
        name = "-".join(filter(None, [args.dataset.split("/")[-1], args.config]))
    elif args.kind == "files":
        digest = digest_of(corpus.find_files(args.files))
        source = {"kind": "files", "files": args.files, "digest": digest}
        first = Path(args.files[0]).expanduser().resolve()
        name = first.name if first.is_dir() else first.parent.name
    else:
        options["tokenizer"] = args.tokenizer or "bytes"
        source = {"kind": "stdlib", "python": platform.python_version()}
        return {**source, **options}, "stdlib"

    source["text_key"] = args.text_key or "text"
    if args.separator:
        source["separator"] = args.separator.replace("\\n", "\n").replace("\\t", "\t")
    if args.encoding:
        source["encoding"] = args.encoding
    if args.skip_unusable:
        source["skip_unusable"] = True
    return {**source, **options}, name


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command = shlex.join(["python", "prepare_data.py", *argv])
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a file name's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.kind == "adopt":
            adopt(args.adopt, args.tokenizer, command)
        elif args.kind == "ready":
            out = args.out or Path("data") / (args.name or args.dataset.split("/")[1])
            fetch(args.dataset, out, args.train_shards, args.revision, command)
        else:
            options, name = options_of(args)
            out = args.out or Path("data") / (args.name or name)
            prepare(out, options, args.workers, command)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        goes_on = "continues after the last whole shard"
        if args.kind == "adopt":
            goes_on = "begins again"
        sys.exit(f"stopped; the same command {goes_on}")


if __name__ == "__main__":
    main()
