"""
Token shards: writing, reading, checking, and which tokens step s of a run sees.

    python prepare_data.py  # writes data/stdlib, the corpus that needs no download
    >>> blocks = TokenBlocks("data/stdlib", "train", block_size=256)
    >>> idx, targets = blocks.batch(step=0, sequences_per_step=32, start=0, count=8)
    >>> idx.shape
    torch.Size([8, 256])

A data set is a folder of shards, `*train*.bin` and `*val*.bin`, and `meta.json`, which lists and
describes them. A shard has the layout of llm.c and modded-nanogpt: 256 little-endian int32 (magic,
version, number of tokens, zeros), then the tokens as uint16. nanoGPT's headerless files are read
too. What a user can get wrong raises DataError.
"""

import bisect
import errno
import json
import math
import os
import shlex
import zlib
from pathlib import Path

import numpy as np

# torch is imported where tensors are made: prepare_data.py and its workers need none.

META = "meta.json"
PROGRESS = "progress.npz"  # stands only while prepare_data.py has not finished

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
# Dates. No headerless file of GPT-2's ids begins so: the low 16 bits of each are above 50256.
LLM_C_MAGICS = range(20240000, 20250000)

# How files begin that people take for shards, and what these files are.
NOT_SHARDS = {
    (20240801).to_bytes(4, "little"): "magic 20240801 marks llm.c's Llama-3 shards of uint32",
    SHARD_MAGIC.to_bytes(4, "big"): "a big-endian shard",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull fetches the file",
    b"\x93NUMPY": "a .npy file",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


# ---- errors --------------------------------------------------------------------------------------


class DataError(ValueError):
    """A file, a value or a network that the user can put right; the message says how.

    A message longer than MESSAGE_CHARACTERS loses its middle. Its beginning names the file, and its
    end the remedy.
    """

    MESSAGE_CHARACTERS = 1000

    def __init__(self, message):
        if len(message) > self.MESSAGE_CHARACTERS:
            half = self.MESSAGE_CHARACTERS // 2 - 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)


def brief(value, limit=200):
    """What a message shows of a value, an exception or a command: at most `limit` characters."""
    if isinstance(value, BaseException):
        text = f"{type(value).__name__}: {value}"
    else:
        text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"


def probe(url, remedy):
    """Raises DataError with `remedy` when nothing answers at url within seconds (through the proxy
    that the environment names). The clients of tiktoken and of the Hub would wait far longer."""
    import requests  # comes with tiktoken

    try:
        requests.head(url, timeout=4)
    except requests.RequestException as error:
        host = url.split("/")[2]
        raise DataError(
            f"{host} could not be reached ({type(error).__name__}); {remedy}"
        ) from error


# ---- files ---------------------------------------------------------------------------------------


def write_atomic(path, *parts):
    """Writes `parts` (bytes or contiguous arrays) as one file. At any moment `path` has the old
    content or all of the new.

    Raises DataError when the disk is full or not writable; the old file is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a rename cannot cross file systems
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        no_place = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, *no_place):
            remedy = "Make its folder, make it writable, or name another one"
        else:
            size = sum(memoryview(part).nbytes for part in parts)
            remedy = f"Free {size:,} bytes and run this again"
        raise DataError(
            f"{path}: could not be written ({error.strerror}); what stood there is unchanged. "
            f"{remedy}"
        ) from error
    finally:
        if temporary.exists():  # a read-only file system refuses to delete what is not there
            temporary.unlink()


def write_json(path, value):
    """Writes a value as a JSON file, as write_atomic does. JSON has no NaN: null stands for it."""
    write_atomic(path, json.dumps(finite(value), indent=1).encode() + b"\n")


def finite(value):
    """The value, with None for each float inside that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_number(value):
    """A number that `finite` has left: NaN for None."""
    return math.nan if value is None else value


# ---- shards --------------------------------------------------------------------------------------


def write_shard(path, tokens):
    """tokens: (n,) integers in [0, 65536), 1 <= n < 2**31. Raises DataError."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{path}: a shard is written from integers (n,), "
            f"not from {tokens.dtype} of shape {tokens.shape}"
        )
    if not 1 <= len(tokens) < 2**31:
        raise DataError(
            f"{path}: a shard holds 1 to 2**31 - 1 tokens, not {len(tokens):,}; "
            "change --shard-tokens"
        )
    if tokens.min() < 0 or tokens.max() >= 2**16:
        raise DataError(
            f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit uint16; "
            "use --tokenizer gpt2"
        )
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_atomic(path, header, np.ascontiguousarray(tokens, "<u2"))


def read_shard(path):
    """-> np.memmap (n,) of uint16, n >= 1.

    Raises DataError when the file is missing, damaged or no shard."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
        offset, problem = _layout(head, size)
        if problem:
            raise DataError(f"{path}: {problem}; {_remedy(path.parent)}")
        tokens = np.memmap(path, "<u2", "r", offset)
    except OSError as error:
        remedy = _remedy(path.parent)
        if error.errno == errno.EMFILE:
            remedy = "this shell allows too few open files, and a shard is one: ulimit -n 65536"
        raise DataError(f"{path}: {error.strerror}; {remedy}") from error
    return tokens


def _layout(head, size):
    """head: a file's first bytes; size: of the whole file.
    -> (offset of the tokens, None), or (0, what is wrong)."""
    if size < 4:
        return 0, f"{size} bytes are no shard"
    for start, kind in NOT_SHARDS.items():
        if head.startswith(start):
            return 0, f"{kind}; only little-endian shards of uint16 tokens are read"

    magic = int.from_bytes(head[:4], "little")
    if magic == SHARD_MAGIC:
        if size < HEADER_BYTES:
            return 0, f"truncated: {size} bytes, shorter than the header's {HEADER_BYTES}"
        version, n = np.frombuffer(head, "<i4")[1:3].tolist()
        if version != SHARD_VERSION:
            return 0, f"shard version {version}, only version {SHARD_VERSION} is read"
        expected = HEADER_BYTES + 2 * n
        if n < 1 or size != expected:
            kind = "truncated" if size < expected else "wrong size"
            promise = f"its header promises {n:,} tokens = {expected:,} bytes"
            return 0, f"{kind}: {promise}, it has {size:,}"
        return HEADER_BYTES, None

    if magic in LLM_C_MAGICS:
        return 0, f"magic {magic} marks another kind of llm.c file; GPT-2 tokens have {SHARD_MAGIC}"
    if size % 2:
        return 0, f"no header, and {size:,} bytes (an odd number) cannot be nanoGPT's raw uint16"
    whole_words = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    if size >= 16 and not whole_words[1::2].any():
        return 0, "no header, and every second uint16 is 0: these look like 32-bit tokens"
    return 0, None


def scan(tokens):
    """-> (crc32 of the tokens' bytes as 8 hex digits, largest id), in one pass over the memory."""
    crc, largest = 0, 0
    for begin in range(0, len(tokens), 1 << 18):  # half a MB, so that max finds it in the cache
        part = tokens[begin : begin + (1 << 18)]
        crc = zlib.crc32(part, crc)
        largest = max(largest, int(part.max()))
    return f"{crc:08x}", largest


# ---- meta.json -----------------------------------------------------------------------------------


def write_meta(directory, meta):
    """Writes the dict `meta` as the data set's meta.json:

    tokenizer               its description, see tokenizer.py
    vocab_size, eot_token   numbers
    source                  a dict: what the data set was made from, and how
    command                 the command that made it
    splits                  {"train": split, "val": split}, where a split is
                            {tokens, documents, shards: [{file, tokens, crc32}]}
    """
    write_json(Path(directory) / META, meta)


def read_meta(directory):
    """-> the dict that write_meta wrote. Raises DataError with the command that makes it."""
    path = Path(directory).expanduser() / META
    if not path.exists():
        command = _prepare_command(path.parent)
        raise DataError(f"{path}: no such file; to make it: {command}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        for key in "tokenizer", "vocab_size", "eot_token", "source", "command":
            meta[key]
        for split in "train", "val":
            meta["splits"][split]["tokens"]
            for shard in meta["splits"][split]["shards"]:
                shard["file"], shard["tokens"], shard["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({brief(error)}); {_remedy(path.parent)}") from error
    return meta


def _prepare_command(directory):
    """The command that would make the data set of this folder, guessed from the folder's name."""
    out = shlex.quote(str(directory))
    if (directory / PROGRESS).exists():
        return f"the prepare_data.py command that began {out}"
    if any(directory.glob("*.bin")):
        return f"python prepare_data.py --adopt {out} --tokenizer gpt2"
    elsewhere = "" if directory.parent.name == "data" else f" --out {out}"
    if directory.name == "stdlib":
        return "python prepare_data.py" + elsewhere
    if directory.name == "openwebtext":
        return "python prepare_data.py openwebtext" + elsewhere
    return (
        f"python prepare_data.py --files 'texts/*.txt' --out {out}, "
        "or see python prepare_data.py --help"
    )


def _remedy(directory):
    """What to do about a file of this folder that is missing or damaged."""
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        command, kind = meta["command"], meta["source"].get("kind")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        command, kind = _prepare_command(directory), None
    command, meta_path = brief(command), shlex.quote(str(directory / META))
    if kind == "hub shards":
        return f"delete this file, to fetch it again, and {meta_path}; then: {command}"
    if "--adopt" in command:
        return f"fetch or write this file again, then: rm -f {meta_path}; {command}"
    return f"start over: rm -rf {shlex.quote(str(directory))}; {command}"


def open_shard(directory, shard):
    """shard: its entry in meta.json. -> its tokens, as read_shard. Raises DataError."""
    path = Path(directory).expanduser() / shard["file"]
    tokens = read_shard(path)
    if len(tokens) != shard["tokens"]:
        raise DataError(
            f"{path}: {len(tokens):,} tokens, but {META} says {shard['tokens']:,}; "
            f"{_remedy(path.parent)}"
        )
    return tokens


def allow_open_files(count):
    """Lifts this process's limit of open files, often 1024, to `count` or as near as the system
    allows: FineWeb 100B has 1031 shards. Windows has no such limit for mapped files."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def verify(directory, rank=0, world_size=1):
    """Reads the shards [rank::world_size] of both splits whole: header, size, checksum, largest id.
    -> the number of tokens that it read. Raises DataError."""
    directory = Path(directory).expanduser()
    meta = read_meta(directory)
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    shards = shards[rank::world_size]
    for shard in shards:
        path = Path(directory) / shard["file"]
        crc, largest = scan(open_shard(directory, shard))
        if crc != shard["crc32"]:
            raise DataError(
                f"{path}: checksum {crc}, but {META} says {shard['crc32']}; {_remedy(path.parent)}"
            )
        if largest >= meta["vocab_size"]:
            raise DataError(
                f"{path}: token id {largest} is outside the vocabulary of {meta['vocab_size']:,}; "
                f"{_remedy(path.parent)}"
            )
    return sum(shard["tokens"] for shard in shards)


# ---- which tokens a step sees --------------------------------------------------------------------


class TokenBlocks:
    """A split, cut into n_blocks blocks of T = block_size tokens and the one token that follows.

    Block b of a shard is its tokens [b*T, b*T + T + 1). The last of them is only a target here, and
    is the first token of the next block. The tokens at the end of a shard that fill no block are
    left out.

    Sequence i of step s is block permutation[k % n_blocks], where k = s * sequences_per_step + i
    and the permutation is drawn from (seed, k // n_blocks). So an epoch shows every block exactly
    once, and what a step sees depends on nothing else: not on the number of ranks or of
    micro-steps, and not on whether the run was resumed.

    Raises DataError when a shard is missing or damaged, or the split too short for one block.
    """

    def __init__(self, directory, split, block_size, seed=0, pin_memory=False):
        self.directory, self.split, self.block_size = Path(directory), split, block_size
        self.seed, self.pin_memory = seed, pin_memory
        self.meta = read_meta(directory)
        splits = self.meta["splits"]
        if split not in splits:
            raise DataError(f"{directory}: no split {split!r}, there are {', '.join(splits)}")
        if block_size < 1 or seed < 0:
            raise DataError(f"block_size={block_size} must be at least 1, seed={seed} at least 0")

        allow_open_files(256 + sum(len(part["shards"]) for part in splits.values()))
        self._shards = [open_shard(directory, shard) for shard in splits[split]["shards"]]
        blocks_of = [(len(tokens) - 1) // block_size for tokens in self._shards]
        self._ends = np.cumsum(blocks_of).tolist()  # the number of blocks up to each shard's end
        self.n_blocks = sum(blocks_of)
        if self.n_blocks == 0:
            self._refuse_short_split()
        self._permutations = {}

    def _refuse_short_split(self):
        longest = max(map(len, self._shards), default=0)
        remedy = "prepare more text, or more of it for val with --val-share"
        if longest >= 2:
            remedy = f"lower block_size to at most {longest - 1:,}, or " + remedy
        raise DataError(
            f"{self.directory}: the longest shard of split {self.split!r} has {longest:,} tokens, "
            f"but a block of block_size={self.block_size} takes {self.block_size + 1:,}; {remedy} "
            "(python prepare_data.py --help)"
        )

    def batch(self, step, sequences_per_step, start, count):
        """Of a step's sequences_per_step sequences, those from `start` to start + count - 1.
        -> idx, targets: int64 (count, block_size), on the CPU; targets are the ids after idx."""
        assert 0 <= start and start + count <= sequences_per_step, (start, count)
        first = step * sequences_per_step + start
        blocks = []
        for k in range(first, first + count):
            epoch, place = divmod(k, self.n_blocks)
            blocks.append(self._permutation(epoch)[place])
        return self._gather(blocks)

    def in_order(self, start, count):
        """Blocks `start` to start + count - 1 in the order of the shards, for evaluation.
        -> idx, targets, as from `batch`. Raises DataError."""
        if not 0 <= start <= start + count <= self.n_blocks:
            raise DataError(
                f"{self.directory}: blocks {start} to {start + count - 1} were asked of split "
                f"{self.split!r}, which has {self.n_blocks} of block_size={self.block_size}; "
                "evaluate fewer sequences"
            )
        return self._gather(range(start, start + count))

    def _permutation(self, epoch):
        """The order of the blocks in an epoch, uint32 (n_blocks,)."""
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a step may straddle two epochs
                del self._permutations[next(iter(self._permutations))]
            # numpy promises that raw draws stay the same in every version, but not what
            # Generator.permutation makes of them: so the draws are sorted here.
            key = np.array([self.seed, epoch], np.uint64)
            draws = np.random.Philox(key=key).random_raw(self.n_blocks)
            self._permutations[epoch] = np.argsort(draws, kind="stable").astype(np.uint32)
        return self._permutations[epoch]

    def _gather(self, blocks):
        """blocks: (count,) numbers of blocks. -> idx, targets, as from `batch`."""
        import torch

        shape = len(blocks), self.block_size
        idx = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        targets = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        for row, block in enumerate(map(int, blocks)):
            shard = bisect.bisect_right(self._ends, block)
            first_block = self._ends[shard - 1] if shard else 0
            begin = (block - first_block) * self.block_size
            tokens = self._shards[shard][begin : begin + self.block_size + 1]
            idx.numpy()[row] = tokens[:-1]
            targets.numpy()[row] = tokens[1:]
        return idx, targets
