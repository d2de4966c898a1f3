import hashlib
import json
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from data import DataError
from tokenizer import (
    describe,
    describe_characters,
    get_tokenizer,
    same_tokens,
    tokenizer_name,
)

# ---- by name -------------------------------------------------------------------------------------


@pytest.mark.quick
@settings(max_examples=50)
@given(text=st.text() | st.sampled_from(["<|endoftext|>", "a\r\nb\0c" * 50]))
def test_bytes_are_utf8(text):
    codec = get_tokenizer("bytes")
    text = text.removeprefix("\ufeff")
    assert codec.encode_ordinary(text) == list(text.encode())
    assert codec.decode(codec.encode_ordinary(text)) == text
    assert (codec.n_vocab, codec.eot_token) == (257, 256)
    assert codec.decode([104, 256, 0xE2]) == "h<|endoftext|>\ufffd"


def test_gpt2_s_ids(gpt2_cache):
    codec = get_tokenizer("gpt2")
    assert codec.encode_ordinary("Hello world") == [15496, 995]
    assert codec.encode_ordinary("The quick brown fox") == [464, 2068, 7586, 21831]
    assert codec.eot_token not in codec.encode_ordinary("<|endoftext|>")
    assert codec.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    assert (codec.n_vocab, codec.eot_token) == (50257, 50256)


# What a tokenizer may choke on; tiktoken itself says what right is where it says anything.
HARD = {
    "a million blanks": "table" + " " * 1_100_000 + "end",
    "line ends": "a" + "\n" * 1_100_000 + "b",
    "no blank at all": "abcdefghij" * 120_000,
    "half a surrogate pair": "broken \ud83d emoji",
    "its other half": "\udc00",
    "a pair in two halves": "\ud83d\ude00",
    "zeros": "\0" * 1000,
    "empty": "",
    "an end of text": "<|endoftext|>",
}


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_no_text_stops_a_tokenizer(what, name, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2_cache")
    codec, text = get_tokenizer(name), HARD[what]
    ids = codec.encode(text)
    assert ids.dtype == np.uint32 and (ids < codec.n_vocab).all() and codec.eot_token not in ids
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert codec.decode(ids.tolist()) == whole
    if name == "gpt2" and what not in ("a million blanks", "line ends"):  # there tiktoken panics
        import tiktoken

        assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_what_one_character_long_cannot_be_encoded_is_named():
    class Choking(tokenizer.ByteTokenizer):
        def encode_clean(self, text):
            if "☃" in text:
                raise RuntimeError("brrr")
            return super().encode_clean(text)

    assert Choking().encode("warm").tolist() == list(b"warm")
    with pytest.raises(DataError, match="cannot take '☃' .RuntimeError: brrr"):
        Choking().encode("a snowman ☃ here")


@pytest.mark.quick
def test_a_byte_order_mark_is_no_text():
    codec = get_tokenizer("bytes")
    assert codec.encode_ordinary("\ufeffab") == [97, 98]
    assert codec.decode(codec.encode_ordinary("a\ufeffb")) == "a\ufeffb"  # within a text it is


@pytest.mark.parametrize(
    "name, says",
    [
        ("cl100k_base", "100,277 ids.*65,536.*--tokenizer gpt2"),
        ("o200k_base", "200,019 ids"),
        ("gpt3", "no tokenizer gpt3; --tokenizer takes bytes, .*gpt2.*tokenizer.json"),
        ("x" * 5000, "no tokenizer xxx"),
    ],
)
def test_names_that_do_not_fit_are_refused_without_a_download(name, says, monkeypatch):
    monkeypatch.setattr(tokenizer, "probe", None)
    with pytest.raises(DataError, match=says) as error:
        get_tokenizer(name)
    assert len(str(error.value)) <= 1000


def test_another_encoding_of_tiktoken(monkeypatch, tmp_path):
    """r50k_base, with three ranks in place of its file: what is asked of tiktoken is its name."""
    import tiktoken

    asked = []

    def get_encoding(name):
        asked.append(name)
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            name, pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
        )

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    address = tokenizer.TIKTOKEN_HOST + "encodings/r50k_base.tiktoken"
    (tmp_path / hashlib.sha1(address.encode()).hexdigest()).write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    codec = tokenizer.TiktokenTokenizer("r50k_base")
    assert asked == ["r50k_base"] and (codec.n_vocab, codec.eot_token) == (301, 300)
    assert codec.encode_ordinary("ab") == [97, 98]


def test_gpt2_without_a_network_fails_within_seconds(tmp_path, monkeypatch, gpt2_forgotten):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # refuses, with a network or without
    begun = time.monotonic()
    with pytest.raises(DataError, match="openaipublic.*could not be reached") as error:
        get_tokenizer("gpt2")
    assert time.monotonic() - begun < 5
    assert str(tmp_path) in str(error.value) and "--tokenizer bytes" in str(error.value)
    assert not os.listdir(tmp_path)


# ---- own -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_characters_have_nanogpt_s_ids():
    text = "the cat\n☃ sat"
    description = json.loads(json.dumps(describe_characters(text)))  # as meta.json keeps it
    codec = get_tokenizer(description)
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}  # nanoGPT's prepare.py
    assert codec.encode_ordinary(text) == [stoi[character] for character in text]
    assert codec.decode(codec.encode_ordinary(text)) == text
    assert (codec.n_vocab, codec.eot_token) == (len(stoi) + 1, len(stoi))
    with pytest.raises(DataError, match="'q' is none of the 9 that the corpus had"):
        codec.encode("quick")
    with pytest.raises(DataError, match="do not fit uint16; use --tokenizer bytes"):
        describe_characters(map(chr, range(70_000)))


def write_json_tokenizer(path, eot="<|endoftext|>"):
    """A byte-level BPE trained on a few words, with traps: truncation, padding, a post-processor
    that adds special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", eot],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat while birds sang"] * 10, trainer)
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {eot}", special_tokens=[(eot, 1)]
    )
    made.save(str(path))
    return made


@pytest.mark.parametrize("eot", ["<|endoftext|>", "</s>", "[STOP]"])
def test_a_json_file_of_the_tokenizers_library(tmp_path, eot):
    made = write_json_tokenizer(tmp_path / "mine.json", eot)
    description = json.loads(json.dumps(describe(str(tmp_path / "mine.json"))))
    (tmp_path / "mine.json").unlink()  # the description is all that it takes
    codec = get_tokenizer(description)
    text = "the cat sat on the mat, ☃ " * 10 + eot
    ids = codec.encode_ordinary(text)
    assert codec.decode(ids) == text and len(ids) > 20
    made.no_truncation()
    made.no_padding()
    plain = text.removesuffix(eot)
    right = made.encode(plain, add_special_tokens=False).ids
    assert codec.encode_ordinary(plain) == right
    known = eot != "[STOP]"
    assert codec.eot_token == (1 if known else made.get_vocab_size())
    assert codec.n_vocab == made.get_vocab_size() + (not known)
    assert codec.eot_token not in ids  # as text it is not the token


def test_json_files_that_are_none_or_too_large(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(DataError, match="no.json: no tokenizer of the tokenizers library"):
        get_tokenizer(describe(str(tmp_path / "no.json")))
    with pytest.raises(DataError, match="none.json: could not be read .FileNotFoundError"):
        describe(str(tmp_path / "none.json"))
    words = {f"w{i}": i for i in range(65_536)}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    large.save(str(tmp_path / "large.json"))
    with pytest.raises(DataError, match="65,537 ids, and shards hold uint16"):
        get_tokenizer(describe(str(tmp_path / "large.json")))


@pytest.mark.quick
def test_names_for_people_are_short_and_tell_two_apart():
    one, two = describe_characters("abc"), describe_characters("abd")
    assert tokenizer_name("gpt2") == "gpt2"
    assert tokenizer_name(one).startswith("3-character") and tokenizer_name(one) == tokenizer_name(
        dict(reversed(one.items()))
    )
    assert tokenizer_name(one) != tokenizer_name(two)
    large = {"kind": "json", "name": "mine.json", "content": "x" * 10**6}
    assert tokenizer_name(large).startswith("mine.json (") and len(tokenizer_name(large)) < 30
    with pytest.raises(DataError, match="kind morse is not one of characters, json"):
        get_tokenizer({"kind": "morse"})


@pytest.mark.quick
def test_two_names_of_gpt2s_tokens_are_the_same():
    characters = [describe_characters(text) for text in ("abc", "cba", "abd")]
    assert same_tokens("gpt2", "r50k_base") and same_tokens("bytes", "bytes")
    assert same_tokens(*characters[:2]) and not same_tokens(*characters[1:])
    assert not same_tokens("gpt2", "p50k_base") and not same_tokens("bytes", characters[0])
