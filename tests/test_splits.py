"""Both splits exist whatever the hash says, and no text is in both."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import DataError
from splits import ENOUGH, fingerprint, plan_splits, split_text


def splits_of(texts, plan):
    splits = {"train": [], "val": []}
    for text in texts:
        for name, part in split_text(text, plan):
            splits[name].append(part)
    return splits


words = st.text("abcdefgh \n", min_size=2, max_size=300)


@pytest.mark.quick
@settings(max_examples=200)
@given(
    texts=st.lists(words, min_size=1, max_size=30),
    share=st.sampled_from([0.0005, 0.05, 0.3, 0.5, 0.95]),
)
@example(texts=["same text"] * 10, share=0.05)
@example(texts=["x" * 100_000, "tiny"], share=0.05)
@example(texts=["ab"], share=0.05)
def test_both_splits_exist_and_no_text_is_in_both(texts, share):
    plan = plan_splits(iter(texts), share)
    splits = splits_of(texts, plan)
    assert "".join(splits["train"]) and "".join(splits["val"])
    if plan["cut"]:
        whole = set(splits["train"]) | {a + b for a in splits["train"] for b in splits["val"]}
        assert set(texts) <= whole and len(set(splits["val"])) == 1
    else:
        assert not set(splits["train"]) & set(splits["val"])
        assert sorted(splits["train"] + splits["val"]) == sorted(texts)
    assert plan == plan_splits(iter(texts), share)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 40, 200])
def test_the_share_is_kept_as_far_as_documents_allow(share, n):
    random.seed(n)
    texts = [" ".join(random.choices("cat sat mat bird river".split(), k=200)) for _ in range(n)]
    splits = splits_of(texts, plan_splits(iter(texts), share))
    got = len("".join(splits["val"])) / len("".join(texts))
    assert share / 2.5 <= got <= max(2 * share, 0.25)


def test_a_corpus_of_some_size_is_split_by_the_hash_alone_and_not_read_to_its_end():
    read = []

    def texts():
        for i in range(10_000):
            read.append(i)
            yield f"{i} " * 100

    assert plan_splits(texts(), 0.05) == {"val_below": 0.05 * 2**64, "cut": None}
    assert ENOUGH / 20 < len(read) < 5_000


@pytest.mark.quick
def test_a_single_text_is_cut_at_an_empty_line_near():
    text = "\n\n".join("line one\nline two of it" for _ in range(400))
    splits = splits_of([text], plan_splits(iter([text]), 0.1))
    (train,), (val,) = splits["train"], splits["val"]
    assert train + val == text and train.endswith("\n\n")
    assert 0.09 < len(val) / len(text) < 0.11


def test_the_fingerprint_is_of_what_is_tokenised():
    assert fingerprint("\ufefftext") == fingerprint("text") != fingerprint("text ")
    assert fingerprint("a\ud83d") == fingerprint("a\ufffd")


@pytest.mark.parametrize("texts", [[], ["x"], ["x", "x"]])
def test_too_little_text(texts):
    with pytest.raises(DataError, match="too little text.*two characters"):
        plan_splits(iter(texts), 0.05)
