"""
How good a checkpoint is: loss and bits per byte of a text, HellaSwag, LAMBADA.

    python eval.py --out_dir=out/tbp --data=data/openwebtext
    python eval.py --out_dir=out/tbp --data=book.txt --stride=512
    python eval.py --checkpoint=out/tbp/best.pt --hellaswag=hub --lambada=lambada_test.jsonl
    python eval.py --out_dir=out/tbp --data=data/openwebtext --results=results/tbp.json
    python eval.py --init_from=gpt2 --lambada=hub

Loss: that of a prepared data set, in blocks of block_size side by side, as train.py evaluates: the
same tokens give the same number. With --stride the windows overlap, each target has more text
before it, and the loss is lower. A text file is one document. Bits per byte: the loss of all
targets in bits, divided by the bytes of their text. It can be compared between tokenizers.

HellaSwag: which of four endings is the likeliest, by the sum of log-probabilities (accuracy) and by
their mean over the ending's tokens (normalised accuracy). As in llm.c, the context is not changed,
and no end of text stands before it; lm-evaluation-harness rewrites contexts, and divides by
characters. LAMBADA: the last word of a text. Accuracy: how often each of its tokens is the
likeliest. Perplexity is of whole words.
"""

import hashlib
import json
import math
import os
import sys

import numpy as np
import torch

import checkpoint as checkpoints
import compiler
import scoring
from configurator import at_least, configure
from corpus import ask_hub, read_whole
from data import DataError, brief, open_shard, probe, read_meta, write_json
from runtime import pick_autocast, pick_device, provenance, run_script
from tokenizer import same_tokens, tokenizer_name
from trained import activation_dtype, open_trained

# The model
out_dir = "out"  # of the run
checkpoint = "latest"  # latest, best, or a path
init_from = ""  # GPT-2's weights instead of a run: gpt2, gpt2-medium, …, a folder or a file
# What is measured
data = ""  # for loss and bits per byte: the folder of a prepared data set, or a text file
split = "val"  # of the data set
eval_tokens = 0  # only the first so many tokens; 0: all
stride = 0  # tokens from one window to the next, up to block_size; 0: blocks side by side
hellaswag = ""  # a .jsonl file with ctx, endings and label; or hub: Rowan/hellaswag, validation
lambada = ""  # a .jsonl file with text; or hub: EleutherAI/lambada_openai, test
examples = 0  # only the first so many of each task; 0: all
# Where it goes
results = ""  # a JSON file; the table is printed as well
# System
batch_size = 8  # windows, or endings, at a time
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of activations: auto (bfloat16 on cuda if it can, else float32), float32, bfloat16
compile = True  # torch.compile for the loss of `data`; the tasks have too many lengths for it
config = configure(globals())


def check_knobs():
    """Raises ValueError for what no evaluation can have."""
    if not (data or hellaswag or lambada):
        raise ValueError("there is nothing to measure: name --data, --hellaswag or --lambada")
    at_least(config, 1, "batch_size")
    at_least(config, 0, "eval_tokens", "stride", "examples")
    folder = os.path.dirname(os.path.expanduser(results)) or "."
    if results and os.path.exists(os.path.expanduser(results)):
        raise ValueError(f"--results: {results} is there already; remove it, or name another")
    if results and not os.path.isdir(folder):
        raise ValueError(f"--results: there is no folder {folder}; make it first")


# ---- the loss of a text --------------------------------------------------------------------------


def read_pieces(trained):
    """-> arrays of tokens, which are scored apart, and a dict of what they are. Raises
    DataError."""
    path, block_size = os.path.expanduser(data), trained.model.config.block_size
    if not os.path.exists(path):
        raise DataError(
            f"--data={data}: there is no such file or folder; name a text file, or the folder of a "
            f"data set that prepare_data.py has made, such as data/{os.path.basename(data)}"
        )
    if os.path.isdir(path):
        pieces, about = read_data_set(path, trained, block_size)
    else:
        text = read_whole(path)
        tokens = [trained.tokenizer.eot_token, *trained.tokenizer.encode_ordinary(text)]
        pieces, about = [np.array(tokens)], {"file": data, "sha256": sha256(path)}
    return first_targets(pieces, eval_tokens), about


def read_data_set(folder, trained, block_size):
    """As read_pieces, for a data set. Of each shard it takes what train.py sees: whole blocks."""
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise DataError(f"{data}: no split {split!r}, there are {', '.join(meta['splits'])}")
    if not same_tokens(meta["tokenizer"], trained.description):
        raise DataError(
            f"{data} has tokens of {tokenizer_name(meta['tokenizer'])}, and the model knows those "
            f"of {trained.about['tokenizer']}; evaluate a text file, or prepare the text again"
        )
    pieces = []
    for shard in meta["splits"][split]["shards"]:
        tokens = open_shard(folder, shard)
        pieces.append(tokens[: (len(tokens) - 1) // block_size * block_size + 1])
    if all(len(piece) < 2 for piece in pieces):
        raise DataError(
            f"{data}: no shard of split {split!r} has a block of {block_size} tokens; evaluate a "
            "text file, or prepare more text"
        )
    return pieces, {"data": data, "split": split, "shards": checkpoints.fingerprint(meta)}


def first_targets(pieces, count):
    """The pieces up to `count` targets; all of them for 0."""
    if not count:
        return pieces
    kept = []
    for piece in pieces:
        kept.append(piece[: count + 1])
        count -= len(kept[-1]) - 1
    return kept


def measure_text(trained, chosen, autocast):
    """-> the results of `data`."""
    pieces, about = read_pieces(trained)
    if compile:
        shape = (2, batch_size, trained.model.config.block_size)  # that of all windows
        sample = torch.randint(trained.n_vocab, shape, device=trained.model.embed.wte.weight.device)
        trial = (compiler.logits_and_loss, trained.model, sample, autocast)
        with compiler.on_trial(chosen, *trial):
            trained.model.compile_regions()
    with autocast:
        nats, count = scoring.text_loss(trained.model, pieces, stride=stride, batch_size=batch_size)
    if not count:
        raise DataError(f"{data}: there is no token to predict in it")
    size = sum(scoring.byte_count(trained.tokenizer, piece[1:]) for piece in pieces)
    apart = f"{stride} from one to the next" if stride else "side by side"
    return {
        **about,
        "windows": f"{trained.model.config.block_size} tokens, {apart}",
        "tokens": count,
        "bytes": size,
        "loss": nats / count,
        "bits_per_byte": nats / math.log(2) / size if size else None,
    }


# ---- tasks ---------------------------------------------------------------------------------------


def read_rows(source, hub):
    """-> the rows of a task, each a dict whose "where" names the row, and a dict of what they are.

    hub: (data set, configuration, split). Raises DataError.
    """
    if source == "hub":
        rows, about = hub_rows(*hub)
    else:
        rows, about = file_rows(source), {"file": source, "sha256": sha256(source)}
    rows = rows[: examples or None]
    if not rows:
        raise DataError(f"{source}: there is no example in it")
    return rows, about


def file_rows(source):
    rows = []
    for number, line in enumerate(read_whole(source).split("\n"), 1):
        where = f"{source}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: no JSON ({error}); the file must be .jsonl") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: an object is wanted, not {brief(line, 80)}")
        rows.append(row | {"where": where})
    return rows


def hub_rows(name, configuration, part):
    from huggingface_hub import HfApi

    probe(HfApi().endpoint, "without a network, name a .jsonl file instead of hub")
    commit, _ = ask_hub(name, None)
    import datasets  # takes 2 seconds

    try:
        rows = datasets.load_dataset(name, configuration, revision=commit, split=part)
        rows = [row | {"where": f"{name}, {part}, row {i}"} for i, row in enumerate(rows)]
    except Exception as error:  # a lost connection, a full disk, files that are not what they were
        raise DataError(f"data set {name}: could not be read ({brief(error, 400)})") from error
    return rows, {"data_set": name, "split": part, "revision": commit}


def hellaswag_item(row):
    """-> context, endings, the index of the right one. Raises DataError."""
    context, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
    several = isinstance(endings, list) and len(endings) > 1
    if not several or not all(isinstance(text, str) for text in [context, *endings]):
        raise DataError(f"{row['where']}: a text ctx and a list of endings are wanted")
    if str(label) not in map(str, range(len(endings))):
        raise DataError(f"{row['where']}: label {brief(label)} is none of {len(endings)} endings")
    return context, endings, int(label)


def last_word(row):
    """-> a text without its last word, and that word. Raises DataError."""
    text = row.get("text")
    if not isinstance(text, str):
        text = ""
    before, _, word = text.strip().rpartition(" ")
    if not (before and word):
        raise DataError(f"{row['where']}: a text of two words or more is wanted, under text")
    return before, word


def encode_pair(tokenizer, context, ending):
    """-> two lists of tokens. A blank belongs to the word after it, as in GPT-2's tokenizer."""
    tokens = tokenizer.encode_ordinary(context) or [tokenizer.eot_token]
    return tokens, tokenizer.encode_ordinary(" " + ending)


def measure_hellaswag(trained, autocast):
    rows, about = read_rows(hellaswag, ("Rowan/hellaswag", None, "validation"))
    items = [hellaswag_item(row) for row in rows]
    pairs = [
        encode_pair(trained.tokenizer, context, ending)
        for context, endings, _ in items
        for ending in endings
    ]
    with autocast:
        scores = scoring.score_endings(trained.model, pairs, batch_size=batch_size)
    shapes = [(len(endings), label) for _, endings, label in items]
    return about | scoring.hellaswag(shapes, scores)


def measure_lambada(trained, autocast):
    rows, about = read_rows(lambada, ("EleutherAI/lambada_openai", "default", "test"))
    pairs = [encode_pair(trained.tokenizer, *last_word(row)) for row in rows]
    with autocast:
        scores = scoring.score_endings(trained.model, pairs, batch_size=batch_size)
    return about | scoring.lambada(scores)


def sha256(path):
    with open(os.path.expanduser(path), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ---- the run -------------------------------------------------------------------------------------


def table(measured):
    """The results as lines of a Markdown table."""
    lines = ["| what | value | of |", "|---|---|---|"]
    if text := measured.get("text"):
        of = f"{text['tokens']:,} tokens of {data}, windows of {text['windows']}"
        lines.append(f"| loss | {text['loss']:.4f} | {of} |")
        if text["bits_per_byte"] is not None:
            of = f"{text['bytes']:,} bytes"
            lines.append(f"| bits per byte | {text['bits_per_byte']:.4f} | {of} |")
    for task in ("hellaswag", "lambada"):
        if task in measured:
            lines += task_lines(task, measured[task])
    return "\n".join(lines)


def task_lines(task, result):
    """The lines of one task in the table. ±: the standard error of a share of so many items."""
    lines, count = [], result["items"]
    names = {"accuracy": "accuracy", "accuracy_norm": "normalised accuracy"}
    for key, name in names.items():
        if key in result:
            error = math.sqrt(result[key] * (1 - result[key]) / count)
            value = f"{result[key]:.4f} ± {error:.4f}"
            lines.append(f"| {task}, {name} | {value} | {count:,} items |")
    if "perplexity" in result:
        lines.append(f"| {task}, perplexity | {result['perplexity']:.2f} | {count:,} items |")
    if result["cut"]:
        lines.append(f"| {task}, contexts cut to block_size | {result['cut']:,} | |")
    return lines


def main():
    sys.stdout.reconfigure(errors="replace")  # a console may lack some of the characters
    check_knobs()
    compiler.prepare(compile)
    device = pick_device(config["device"])
    trained = open_trained(out_dir, checkpoint, init_from, device)
    chosen = activation_dtype(dtype, trained.model, device)
    autocast = pick_autocast(chosen, device)

    measured = {}
    if data:
        measured["text"] = measure_text(trained, chosen, autocast)
    with torch.compiler.set_stance("force_eager"):
        if hellaswag:
            measured["hellaswag"] = measure_hellaswag(trained, autocast)
        if lambada:
            measured["lambada"] = measure_lambada(trained, autocast)

    about = {"model": trained.about, "dtype": str(chosen).removeprefix("torch.")}
    print(f"{trained.title}, {about['dtype']}\n")
    print(table(measured), flush=True)
    if results:
        written = about | measured | {"provenance": provenance()}
        write_json(os.path.expanduser(results), written)


if __name__ == "__main__":
    run_script(main)
