"""
Tokenizers: text to ids and back. A tokenizer's description is stored with the data it made.

    >>> tokenizer = get_tokenizer("gpt2")
    >>> tokenizer.encode("Hello world").tolist()
    [15496, 995]

A description is a string, the name of a tokenizer that everybody has ("bytes", or an encoding of
tiktoken such as "gpt2"), or a dict that holds the whole tokenizer: the characters of a corpus, or
the text of a JSON file of the `tokenizers` library. meta.json and every checkpoint keep it, so that
sample.py needs no other file. `<|endoftext|>` in a text is text; only eot_token ends a document.
"""

import functools
import hashlib
import json
import os
import tempfile
import zlib

import numpy as np

from data import DataError, brief, probe

MOST_TOKENS = 2**16  # shards hold uint16
END_OF_TEXT = "<|endoftext|>"

# tiktoken's encodings. Of those that fit: where tiktoken fetches them, and their sizes. Of those
# that do not: how many ids they have.
TIKTOKEN_HOST = "https://openaipublic.blob.core.windows.net/"
TIKTOKEN_FILES = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "r50k_base": ("encodings/r50k_base.tiktoken",),
    "p50k_base": ("encodings/p50k_base.tiktoken",),
    "p50k_edit": ("encodings/p50k_base.tiktoken",),
}
KNOWN_SIZES = {  # (n_vocab, eot_token), which `sizes` tells without a download
    "bytes": (257, 256),
    "gpt2": (50257, 50256),
    "r50k_base": (50257, 50256),
    "p50k_base": (50281, 50256),
    "p50k_edit": (50284, 50256),
}
GPT2_TOKENIZERS = ("gpt2", "r50k_base")  # two names for the same ids
TOO_LARGE = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}

# What tokenizer.json files call the token that ends a text, the most frequent name first.
JSON_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


# ---- descriptions --------------------------------------------------------------------------------


def describe(argument):
    """argument: of --tokenizer, a name or the path of a JSON file. -> the description.
    Raises DataError."""
    return describe_json(argument) if argument.endswith(".json") else argument


def describe_characters(characters):
    """characters: any iterable of characters. -> the description. Raises DataError."""
    characters = "".join(sorted(set(characters)))
    if len(characters) >= MOST_TOKENS:
        raise DataError(
            f"{len(characters):,} different characters do not fit uint16; use --tokenizer bytes"
        )
    return {"kind": "characters", "characters": characters}


def describe_json(path):
    """path: a tokenizer.json of the `tokenizers` library. -> the description. Raises DataError."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            content = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--tokenizer {path}: could not be read ({brief(error)})") from error
    return {"kind": "json", "name": os.path.basename(path), "content": content}


def tokenizer_name(description):
    """-> a short string for people, which differs where two descriptions do."""
    if isinstance(description, str):
        return description
    checksum = zlib.crc32(json.dumps(description, sort_keys=True).encode())
    if description["kind"] == "characters":
        return f"{len(description['characters'])}-character ({checksum:08x})"
    return f"{description['name']} ({checksum:08x})"


def sizes(description):
    """-> (n_vocab, eot_token), without a download for a name in KNOWN_SIZES. Raises DataError."""
    if isinstance(description, str) and description in KNOWN_SIZES:
        return KNOWN_SIZES[description]
    codec = get_tokenizer(description)
    return codec.n_vocab, codec.eot_token


def same_tokens(one, other):
    """Whether two descriptions are equal, or two names of GPT-2's ids. The file name of a JSON
    tokenizer counts."""
    names = [tokenizer_name(description) for description in (one, other)]
    return names[0] == names[1] or all(name in GPT2_TOKENIZERS for name in names)


def get_tokenizer(description):
    """-> Tokenizer. Raises DataError when there is none, or it cannot be fetched."""
    if isinstance(description, str):
        return _named_tokenizer(description)
    return _own_tokenizer(json.dumps(description))


@functools.cache
def _named_tokenizer(name):
    if name == "bytes":
        return ByteTokenizer()
    return TiktokenTokenizer(name)


@functools.cache
def _own_tokenizer(description):
    description = json.loads(description)
    kinds = {"characters": CharacterTokenizer, "json": JsonTokenizer}
    kind = description.get("kind")
    if kind not in kinds:
        raise DataError(f"a tokenizer of kind {brief(kind)} is not one of {', '.join(kinds)}")
    return kinds[kind](description)


# ---- tokenizers ----------------------------------------------------------------------------------


def clean(text):
    """The text without what no tokenizer can take. A byte-order mark at its beginning goes. Half a
    surrogate pair becomes U+FFFD, as in tiktoken's encode_ordinary."""
    text = text.removeprefix("\ufeff")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Tokenizer:
    """What all tokenizers have in common. A subclass defines

    n_vocab               ids are below it
    eot_token             the id that stands before each document in a shard
    encode_clean(text)    -> ids (n,), of a text that `clean` returned
    decode_bytes(ids)     -> bytes
    """

    def encode(self, text):
        """-> uint32 (n,), the ids of any text. Raises DataError for what the tokenizer lacks."""
        return self._encode_in_parts(clean(text))

    def _encode_in_parts(self, text):
        try:
            return self.encode_clean(text)
        except DataError:
            raise
        except Exception as error:  # tiktoken gives up on a million blanks in a row
            if len(text) < 2:
                raise DataError(f"the tokenizer cannot take {text!r} ({brief(error)})") from error
        middle = len(text) // 2
        halves = self._encode_in_parts(text[:middle]), self._encode_in_parts(text[middle:])
        return np.concatenate(halves)

    def encode_ordinary(self, text):
        """-> list of int, like tiktoken's method of this name."""
        return self.encode(text).tolist()

    def decode(self, ids):
        """ids: integers below n_vocab. -> str; U+FFFD stands for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class ByteTokenizer(Tokenizer):
    """The ids 0 to 255 are the bytes, and 256 is the end of a text."""

    n_vocab, eot_token = 257, 256

    def encode_clean(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids):
        end = END_OF_TEXT.encode()
        return b"".join(end if i == self.eot_token else bytes([i]) for i in ids)


class CharacterTokenizer(Tokenizer):
    """An id for each character of a corpus, in the order of the description; the next id is the end
    of a text. nanoGPT's character-level data sets have the same ids."""

    def __init__(self, description):
        self.characters = description["characters"]
        self.eot_token = len(self.characters)
        self.n_vocab = self.eot_token + 1
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode_clean(self, text):
        try:
            return np.array([self._ids[character] for character in text], np.uint32)
        except KeyError as error:
            raise DataError(
                f"the character {error.args[0]!r} is none of the {len(self.characters)} that the "
                f"corpus had: {brief(self.characters)}; leave it out, or train on a data set with "
                "--tokenizer bytes"
            ) from error

    def decode_bytes(self, ids):
        texts = [END_OF_TEXT if i == self.eot_token else self.characters[i] for i in ids]
        return "".join(texts).encode()


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken, by its name."""

    def __init__(self, name):
        import tiktoken

        known = tiktoken.list_encoding_names()
        fitting = ["bytes", *(other for other in known if other not in TOO_LARGE)]
        if name in TOO_LARGE:
            self._refuse_size(name, TOO_LARGE[name])
        if name not in known:
            raise DataError(
                f"there is no tokenizer {brief(name)}; --tokenizer takes {', '.join(fitting)}, "
                "chars, or the path of a tokenizer.json"
            )
        remedy = _fetch_remedy(name)
        if not _is_cached(name):
            probe(TIKTOKEN_HOST, remedy)  # tiktoken itself would wait without end
        try:
            self._encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # ValueError: what came has the wrong hash
            raise DataError(
                f"tokenizer {name} could not be loaded ({brief(error)}); {remedy}"
            ) from error
        self.n_vocab, self.eot_token = self._encoding.n_vocab, self._encoding.eot_token
        if self.n_vocab > MOST_TOKENS:
            self._refuse_size(name, self.n_vocab)

    def _refuse_size(self, name, size):
        raise DataError(
            f"tokenizer {name} has {size:,} ids, and shards hold uint16: 65,536 at most; use "
            "--tokenizer gpt2 or p50k_base (for code), or a tokenizer.json with fewer"
        )

    def encode_clean(self, text):
        return self._encoding.encode_to_numpy(text, disallowed_special=())  # as encode_ordinary

    def decode_bytes(self, ids):
        return self._encoding.decode_bytes(ids)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from the text of its JSON file.

    Special tokens in a text stay text, and the file's truncation and padding are not applied.
    """

    def __init__(self, description):
        name = description["name"]
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise DataError(f"{name} takes one package more: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(description["content"])
        except Exception as error:  # the library raises Exception itself
            raise DataError(
                f"{name}: no tokenizer of the tokenizers library ({brief(error)})"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.n_vocab = max(self._tokenizer.get_vocab().values()) + 1
        ends = map(self._tokenizer.token_to_id, JSON_END_OF_TEXT)
        self.eot_token = next((end for end in ends if end is not None), self.n_vocab)
        self.n_vocab = max(self.n_vocab, self.eot_token + 1)
        if self.n_vocab > MOST_TOKENS:
            raise DataError(
                f"{name} has {self.n_vocab:,} ids, and shards hold uint16: 65,536 at most; train "
                "one with fewer, or use --tokenizer gpt2"
            )

    def encode_clean(self, text):
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids):
        """The library decodes to text, since the meaning of an id can depend on its neighbours."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


# ---- tiktoken's downloads ------------------------------------------------------------------------


def _cache_folder():
    """Where tiktoken keeps its downloads; "" where a user has disabled that."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    return os.path.join(tempfile.gettempdir(), "data-gym-cache") if named is None else named


def _is_cached(name):
    """Whether tiktoken needs no download. An encoding of another package loads its own files."""
    for file in TIKTOKEN_FILES.get(name, ()):
        key = hashlib.sha1((TIKTOKEN_HOST + file).encode()).hexdigest()
        if not os.path.exists(os.path.join(_cache_folder(), key)):
            return False
    return True


def _fetch_remedy(name):
    looked = f", and they are not in {_cache_folder()}" if _cache_folder() else ""
    return (
        f"tiktoken fetches the files of {name} from {TIKTOKEN_HOST}{looked}; without a network, "
        "set TIKTOKEN_CACHE_DIR to a folder that has them, or prepare a data set with --tokenizer "
        "bytes"
    )
