"""Token shards: writing, reading, checking, and which tokens step s of a run sees.

    python prepare_data.py                                   # writes data/stdlib, the corpus that needs no download
    >>> blocks = TokenBlocks("data/stdlib", "train", block_size=256)
    >>> idx, targets = blocks.batch(step=0, sequences_per_step=32, start=0, count=8)      # (8, 256) each

A data set is a folder of shards, `*train*.bin` and `*val*.bin`, and `meta.json`, which lists and describes them. A
shard has the layout of llm.c and modded-nanogpt: 256 little-endian int32 (magic, version, number of tokens, zeros),
then the tokens as uint16. nanoGPT's headerless files are read too. What a user can get wrong raises DataError.
"""
import bisect
import errno
import functools
import hashlib
import json
import os
import resource
import shlex
import tempfile
import zlib
from pathlib import Path

import numpy as np

# torch is imported where tensors are made: the worker processes of prepare_data.py load this file and need none.

SHARD_MAGIC, SHARD_VERSION, LLAMA3_MAGIC = 20240520, 1, 20240801
HEADER_BYTES = 256 * 4
META, PROGRESS = "meta.json", "progress.npz"  # PROGRESS stands only while prepare_data.py has not finished
TOKENIZERS = {"gpt2": 50257, "bytes": 257}  # sizes of the vocabularies; the last id is end of text
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's address
NOT_SHARDS = {b"version https://git-lfs": "a Git LFS pointer", b"\x93NUMPY": "a .npy file", b"PAR1": "a parquet file",
              b"PK\x03\x04": "a zip file", b"\x1f\x8b\x08": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstandard file",
              b"<!DOCTYPE": "a web page", b"<html": "a web page"}


class DataError(ValueError):
    """A file, a value or a network that the user can put right; the message says how."""


# ---- files ----------------------------------------------------------------------------------------------------------

def write_atomic(path, *parts):
    """Writes `parts` (bytes or contiguous arrays) as one file: its name shows the old content or all of the new.

    Raises DataError when the disk is full or not writable; the old file then stands as it was."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # in the same folder: a rename cannot cross file systems
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error.strerror}); what stood there is unchanged. Free "
                        f"{sum(memoryview(part).nbytes for part in parts):,} bytes and run this again") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path, tokens):
    """tokens: (n,) integers in [0, 65536), 1 <= n < 2**31. Raises DataError."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: a shard is written from integers (n,), not from {tokens.dtype} of shape {tokens.shape}")
    if not 1 <= len(tokens) < 2**31:
        raise DataError(f"{path}: a shard holds 1 to 2**31 - 1 tokens, not {len(tokens):,}; change --shard-tokens")
    if tokens.min() < 0 or tokens.max() >= 2**16:
        raise DataError(f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit uint16; use --tokenizer gpt2")
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_atomic(path, header, np.ascontiguousarray(tokens, "<u2"))


def read_shard(path, vocab_size=None):
    """-> np.memmap (n,) of uint16, n >= 1. With vocab_size every id is checked. Raises DataError."""
    path = Path(path)

    def refuse(reason):
        raise DataError(f"{path}: {reason}; {_remedy(path.parent)}")

    def unreadable(error):
        if error.errno == errno.EMFILE:
            raise DataError(f"{path}: more open files than this shell allows (a shard is one): ulimit -n 65536") from error
        refuse(error.strerror)

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        unreadable(error)
    if size < 4:
        refuse(f"{size} bytes are no shard")
    magic = int.from_bytes(head[:4], "little")
    offset = 0
    if magic == SHARD_MAGIC:
        if size < HEADER_BYTES:
            refuse(f"truncated: {size} bytes, shorter than the header's {HEADER_BYTES}")
        offset = HEADER_BYTES
        version, n = np.frombuffer(head, "<i4")[1:3].tolist()
        if version != SHARD_VERSION:
            refuse(f"shard version {version}, only version {SHARD_VERSION} (uint16, GPT-2) is read")
        if n < 1 or size != HEADER_BYTES + 2 * n:
            kind = "truncated" if size < HEADER_BYTES + 2 * n else "wrong size"
            refuse(f"{kind}: its header promises {n:,} tokens = {HEADER_BYTES + 2 * n:,} bytes, it has {size:,}")
    elif magic == LLAMA3_MAGIC:
        refuse(f"magic {magic} marks llm.c's Llama-3 shards of uint32 tokens; only GPT-2's, {SHARD_MAGIC}, are read")
    elif 20240000 < magic < 20250000:  # llm.c's magics are dates; the low half of these is no GPT-2 id
        refuse(f"magic {magic} marks another kind of llm.c file, not GPT-2 tokens (magic {SHARD_MAGIC})")
    elif int.from_bytes(head[:4], "big") == SHARD_MAGIC:
        refuse("a big-endian shard; only little-endian ones are read")
    elif kind := next((name for start, name in NOT_SHARDS.items() if head.startswith(start)), None):
        refuse(f"{kind}, not a shard")
    elif size % 2:
        refuse(f"no header, and {size:,} bytes (an odd number) cannot be nanoGPT's raw uint16 tokens")
    elif size >= 16 and not np.frombuffer(head[:size // 4 * 4], "<u2")[1::2].any():
        refuse("no header, and every second uint16 is 0: these look like 32-bit tokens")
    try:
        tokens = np.memmap(path, "<u2", "r", offset)
    except OSError as error:
        unreadable(error)
    if vocab_size is not None and (largest := scan(tokens)[1]) >= vocab_size:
        refuse(f"token id {largest} is outside the vocabulary of {vocab_size:,}")
    return tokens


def scan(tokens):
    """-> (crc32 of the tokens' bytes as 8 hex digits, largest id), in one pass over the memory."""
    crc, largest = 0, 0
    for begin in range(0, len(tokens), 1 << 18):  # half a MB: the second reader finds it in the cache
        part = tokens[begin : begin + (1 << 18)]
        crc, largest = zlib.crc32(part, crc), max(largest, int(part.max()))
    return f"{crc:08x}", largest


# ---- meta.json ------------------------------------------------------------------------------------------------------

def write_meta(directory, meta):
    """meta: {tokenizer, vocab_size, eot_token, source: {...}, command: the one that made the data set,
    splits: {train and val: {tokens, documents, shards: [{file, tokens, crc32}]}}}."""
    write_atomic(Path(directory) / META, json.dumps(meta, indent=1).encode() + b"\n")


def read_meta(directory):
    """-> the dict that write_meta wrote. Raises DataError, which names the command that makes it."""
    path = Path(directory) / META
    if not path.exists():
        raise DataError(f"{path}: no such file; to make it: {_prepare_command(path.parent)}")
    try:
        meta = json.loads(path.read_text())
        for key in "tokenizer", "vocab_size", "eot_token", "source", "command":
            meta[key]
        for split in "train", "val":
            meta["splits"][split]["tokens"]
            for shard in meta["splits"][split]["shards"]:
                shard["file"], shard["tokens"], shard["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); {_remedy(path.parent)}") from error
    return meta


def _prepare_command(directory):
    out = shlex.quote(str(directory))
    if (directory / PROGRESS).exists():
        return f"the prepare_data.py command that began {out}"
    if any(directory.glob("*.bin")):
        return f"python prepare_data.py --adopt {out} --tokenizer gpt2"
    elsewhere = "" if directory.parent.name == "data" else f" --out {out}"
    known = {"stdlib": "python prepare_data.py", "openwebtext": "python prepare_data.py openwebtext"}
    if directory.name in known:
        return known[directory.name] + elsewhere
    return f"python prepare_data.py --files 'texts/*.txt' --out {out}, or see python prepare_data.py --help"


def _remedy(directory):
    """What to do about a file of this folder that is missing or damaged."""
    try:
        command = json.loads((directory / META).read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        command = _prepare_command(directory)
    if "--adopt" in command:
        return f"fetch or write this file again, then: rm -f {shlex.quote(str(directory / META))}; {command}"
    return f"start over: rm -rf {shlex.quote(str(directory))}; {command}"


def _open(directory, shard):
    tokens = read_shard(Path(directory) / shard["file"])
    if len(tokens) != shard["tokens"]:
        raise DataError(f"{Path(directory) / shard['file']}: {len(tokens):,} tokens, but {META} says "
                        f"{shard['tokens']:,}; {_remedy(Path(directory))}")
    return tokens


def allow_open_files(count):
    """Raises this process's limit, often 1024, as far as the system lets it: FineWeb 100B alone has 1031 shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard))


def verify(directory, rank=0, world_size=1):
    """Reads the shards [rank::world_size] of both splits whole: header, size, checksum, largest id. Raises DataError.
    -> the number of tokens that it read."""
    meta = read_meta(directory)
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]][rank::world_size]
    for shard in shards:
        crc, largest = scan(_open(directory, shard))
        path = Path(directory) / shard["file"]
        if crc != shard["crc32"]:
            raise DataError(f"{path}: checksum {crc}, but {META} says {shard['crc32']}; {_remedy(path.parent)}")
        if largest >= meta["vocab_size"]:
            raise DataError(f"{path}: token id {largest} is outside the vocabulary of {meta['vocab_size']:,} "
                            f"({meta['tokenizer']}); {_remedy(path.parent)}")
    return sum(shard["tokens"] for shard in shards)


# ---- tokenizers -----------------------------------------------------------------------------------------------------

def probe(url, remedy):
    """Raises DataError within seconds, with `remedy`, when nothing answers at url (proxies are honoured)."""
    import requests  # comes with tiktoken
    try:
        requests.head(url, timeout=4)
    except requests.RequestException as error:
        host = url.split("/")[2]
        raise DataError(f"{host} could not be reached ({type(error).__name__}); {remedy}") from error


@functools.cache
def get_tokenizer(name):
    """-> tiktoken.Encoding with encode_ordinary, decode, n_vocab, eot_token. name: "gpt2", or "bytes", which has an id
    for each of 256 bytes, 256 for end of text, and needs no download. Raises DataError."""
    import tiktoken
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})",  # short pieces merge (nothing) fastest
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name not in TOKENIZERS:
        raise DataError(f"tokenizer {name!r} is not one of {', '.join(TOKENIZERS)} (shards hold uint16: no vocabulary "
                        "beyond 65,536 fits); pass --tokenizer gpt2 or --tokenizer bytes")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))  # "" disables it
    cache = os.path.join(tempfile.gettempdir(), "data-gym-cache") if cache is None else cache
    remedy = (f"tiktoken fetches GPT-2's two files there unless it finds them in {cache or 'its disabled cache'} (set "
              "TIKTOKEN_CACHE_DIR to a folder that has them); offline: python prepare_data.py --tokenizer bytes")
    addresses = [GPT2_FILES + file for file in ("vocab.bpe", "encoder.json")]
    if not all(os.path.exists(os.path.join(cache, hashlib.sha1(a.encode()).hexdigest())) for a in addresses):
        probe(addresses[0], remedy)  # tiktoken itself would wait without end
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # ValueError: what came has the wrong hash
        raise DataError(f"GPT-2's tokenizer could not be loaded ({error}); {remedy}") from error


# ---- which tokens a step sees ---------------------------------------------------------------------------------------

class TokenBlocks:
    """A split as n_blocks blocks: block b of a shard is its tokens [b*T, b*T + T + 1), T = block_size; the last token,
    only ever a target there, is the next block's first. A shard's last tokens that fill no block are left out.

    Sequence i of step s is block permutation[k % n_blocks] with k = s * sequences_per_step + i and the permutation
    drawn from (seed, k // n_blocks): a pure function, so that neither the number of ranks nor of micro-steps nor a
    resume changes what a step sees, and an epoch shows every block exactly once."""

    def __init__(self, directory, split, block_size, seed=0, pin_memory=False):
        self.directory, self.split, self.block_size, self.seed = Path(directory), split, block_size, seed
        self.pin_memory = pin_memory
        self.meta = read_meta(directory)
        if split not in self.meta["splits"]:
            raise DataError(f"{directory}: no split {split!r}, there are {', '.join(self.meta['splits'])}")
        if block_size < 1 or seed < 0:
            raise DataError(f"block_size={block_size} must be at least 1 and seed={seed} at least 0")
        allow_open_files(256 + sum(len(part["shards"]) for part in self.meta["splits"].values()))
        self._shards = [_open(directory, shard) for shard in self.meta["splits"][split]["shards"]]
        self._ends = np.cumsum([(len(tokens) - 1) // block_size for tokens in self._shards]).tolist() or [0]
        self.n_blocks = self._ends[-1]
        if self.n_blocks == 0:
            longest = max(map(len, self._shards), default=0)
            raise DataError(f"{directory}: the longest shard of split {split!r} has {longest:,} tokens, but a block of "
                            f"block_size={block_size} takes {block_size + 1:,}; lower block_size, or prepare more text "
                            "(python prepare_data.py --help; --val-share moves documents to val)")
        self._permutations = {}

    def batch(self, step, sequences_per_step, start, count):
        """The sequences [start, start + count) of the sequences_per_step of this step.
        -> idx, targets: int64 (count, block_size), on the CPU; targets are the ids that follow idx."""
        assert 0 <= start and start + count <= sequences_per_step, (start, count, sequences_per_step)
        first = step * sequences_per_step + start
        epochs = (divmod(k, self.n_blocks) for k in range(first, first + count))
        return self._gather([self._permutation(epoch)[k] for epoch, k in epochs])

    def in_order(self, start, count):
        """Blocks start to start + count as they lie in the shards, for evaluation. -> as batch. Raises DataError."""
        if not 0 <= start <= start + count <= self.n_blocks:
            raise DataError(f"{self.directory}: blocks {start} to {start + count} were asked of split {self.split!r}, "
                            f"which has {self.n_blocks} of block_size={self.block_size}; evaluate fewer sequences")
        return self._gather(range(start, start + count))

    def _permutation(self, epoch):
        """uint32 (n_blocks,)."""
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a step may straddle two epochs
                del self._permutations[next(iter(self._permutations))]
            # Sorting raw draws, for numpy keeps these for ever, but not what Generator.permutation makes of them.
            draws = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.n_blocks)
            self._permutations[epoch] = np.argsort(draws, kind="stable").astype(np.uint32)
        return self._permutations[epoch]

    def _gather(self, blocks):
        import torch
        idx, targets = (torch.empty(len(blocks), self.block_size, dtype=torch.int64, pin_memory=self.pin_memory)
                        for _ in range(2))
        for row, block in enumerate(map(int, blocks)):
            shard = bisect.bisect_right(self._ends, block)
            begin = (block - (self._ends[shard - 1] if shard else 0)) * self.block_size
            tokens = self._shards[shard][begin : begin + self.block_size + 1]
            idx.numpy()[row], targets.numpy()[row] = tokens[:-1], tokens[1:]
        return idx, targets
