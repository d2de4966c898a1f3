"""eval.py as a user runs it, against numbers that are computed by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, records, run, write_checkpoint
from fake_hub import COMMIT, fake_hub
from test_pretrained import gpt2_weights, write

from data import read_meta, write_shard
from model import GPT, GPTConfig
from scoring import Score, byte_count, hellaswag, lambada, score_endings, text_loss, windows
from tokenizer import get_tokenizer

SIZES = dict(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16)
COMMON = ["--device=cpu", "--compile=False"]


def build(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def log_probability(model, context, ending):
    """Of each token of `ending`, a token at a time, as (log p, whether it is the likeliest)."""
    found = []
    for i, token in enumerate(ending):
        window = (context + ending[:i])[-model.config.block_size :]
        log_p = model(torch.tensor([window]))[0][0, -1].log_softmax(-1)
        found.append((log_p[token].item(), log_p.argmax().item() == token))
    return found


def evaluate(folder, *arguments):
    """-> what eval.py wrote to its file of results."""
    path = folder / f"results{len(list(folder.glob('results*')))}.json"
    printed = run("eval.py", f"--out_dir={folder}", *COMMON, *arguments, f"--results={path}")
    return json.loads(path.read_text()), printed


# ---- windows and losses --------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("stride", [0, 1, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_windows_score_each_target_once(count, stride):
    size, scored = 8, []
    for begin, first, end in windows(count, size, stride):
        assert 0 <= begin <= first < end <= begin + size
        if stride and first >= size:  # so much text, at least, before what is scored
            assert first - begin >= size - stride
        scored += range(first, end)
    assert scored == list(range(count))


@pytest.mark.quick
def test_a_stride_beyond_the_block_is_refused():
    with pytest.raises(ValueError, match="stride must lie between 0 and block_size 8, not 9"):
        list(windows(20, 8, 9))


@pytest.mark.parametrize("stride", [0, 5])
def test_the_loss_of_a_text_target_by_target(stride):
    model = build()
    pieces = [torch.randint(256, (n,)).numpy() for n in (40, 3, 17)]
    expected = count = 0
    for piece in pieces:
        tokens, T = piece.tolist(), 16
        for t in range(len(tokens) - 1):  # the target is tokens[t + 1]
            begin = t // T * T
            if stride and t >= T:  # the first window ends at T, the others every 5 tokens
                end = min(T + math.ceil((t + 1 - T) / stride) * stride, len(tokens) - 1)
                begin = end - T
            [(log_p, _)] = log_probability(model, tokens[begin : t + 1], [tokens[t + 1]])
            expected, count = expected - log_p, count + 1
    nats, found = text_loss(model, pieces, stride=stride, batch_size=4)
    assert found == count and abs(nats - expected) < 1e-3


@pytest.mark.quick
def test_bytes_are_those_of_the_text():
    tokenizer = get_tokenizer("bytes")
    tokens = [256, *"né".encode(), 256, *b"abc"]
    assert byte_count(tokenizer, torch.tensor(tokens).numpy()) == 6


def test_the_number_is_that_of_training(tiny_data, tmp_path):
    out_dir = tmp_path / "out"
    run("train.py", *TINY, f"--data_dir={tiny_data}", f"--out_dir={out_dir}", "--compile=False")
    val = [line["val"] for line in records(out_dir) if "val" in line][-1]
    found, printed = evaluate(out_dir, f"--data={tiny_data}/tiny", "--eval_tokens=256")
    assert abs(found["text"]["loss"] - val) < 1e-6 and found["text"]["tokens"] == 256
    assert f"| loss | {val:.4f} | 256 tokens of {tiny_data}/tiny" in printed
    assert found["model"]["step"] == 6 and "eval.py" in found["provenance"]["command"]
    whole, _ = evaluate(out_dir, f"--data={tiny_data}/tiny")
    assert whole["text"]["tokens"] == 999 // 16 * 16
    sliding, _ = evaluate(out_dir, f"--data={tiny_data}/tiny", "--stride=4")
    assert sliding["text"]["tokens"] == 999 // 16 * 16
    assert sliding["text"]["loss"] < whole["text"]["loss"]


def test_bits_per_byte_of_a_uniform_model(tmp_path):
    """log2 V bits for each token, whatever it is: * tokens / bytes."""
    model = build(vocab_size=256 + 64)
    with torch.no_grad():
        model.embed.wte.weight.zero_()
    write_checkpoint(tmp_path, model)
    (tmp_path / "text.txt").write_text("é" * 50, encoding="utf-8-sig")
    found = evaluate(tmp_path, f"--data={tmp_path}/text.txt")[0]["text"]
    assert (found["tokens"], found["bytes"]) == (100, 100)  # the mark before it is no text
    assert abs(found["bits_per_byte"] - math.log2(320)) < 1e-5

    characters = {"kind": "characters", "characters": "aé語"}
    write_checkpoint(tmp_path, model, tokenizer=characters, n_vocab=4)
    (tmp_path / "text.txt").write_text("aé語語" * 10)
    found = evaluate(tmp_path, f"--data={tmp_path}/text.txt")[0]["text"]
    assert (found["tokens"], found["bytes"]) == (40, 90)  # of 1, 2, 3 and 3 bytes
    assert abs(found["bits_per_byte"] - math.log2(320) * 40 / 90) < 1e-5


def test_compiled_losses_are_the_eager_ones(tmp_path):
    write_checkpoint(tmp_path, build(mixer="residual", n_streams=1))
    (tmp_path / "text.txt").write_text("some text " * 10)
    eager, _ = evaluate(tmp_path, f"--data={tmp_path}/text.txt")
    compiled, _ = evaluate(tmp_path, f"--data={tmp_path}/text.txt", "--compile=True")
    assert abs(eager["text"]["loss"] - compiled["text"]["loss"]) < 1e-5


# ---- tasks ---------------------------------------------------------------------------------------


@pytest.mark.quick
def test_scores_of_endings_token_by_token():
    model = build(block_size=32)
    tokens = torch.randint(320, (200,)).tolist()
    pairs = [(tokens[:3], tokens[3:5]), (tokens[5:6], tokens[6:20]), (tokens[20:60], tokens[60:64])]
    greedy = []
    for _ in range(3):
        window = torch.tensor([tokens[:7] + greedy])
        greedy.append(model(window)[0][0, -1].argmax().item())
    pairs.append((tokens[:7], greedy))
    scores = score_endings(model, pairs, batch_size=3)
    for (context, ending), score in zip(pairs[:2] + pairs[3:], scores[:2] + scores[3:]):
        expected = log_probability(model, context, ending)
        assert abs(score.log_probability - sum(log_p for log_p, _ in expected)) < 1e-3
        assert score.likeliest == all(best for _, best in expected)
        assert score.tokens == len(ending) and not score.cut
    assert scores[3].likeliest and not scores[0].likeliest
    # Of 44 tokens the last 33 stay: one more than the model reads, for the last is only a target.
    expected = log_probability(model, tokens[31:60], tokens[60:64])
    assert scores[2].cut
    assert abs(scores[2].log_probability - sum(log_p for log_p, _ in expected)) < 1e-3


def test_hellaswag_by_hand(tmp_path):
    """A short and a long ending: by the sum the short one is the likelier, by the mean either."""
    model = build(block_size=64)
    write_checkpoint(tmp_path, model)
    rows, sums, means = [], 0, 0
    for i in range(12):
        context = "a context"[: 3 + i % 5]
        endings = ["abcdefghijklmnop"[i : i + 1 + i % 3], "a long ending, " + "q" * i]
        logs = []
        for ending in endings:
            found = log_probability(model, [*context.encode()], [*b" ", *ending.encode()])
            logs.append([log_p for log_p, _ in found])
        label = int(i % 4 > 0)
        sums += (sum(logs[1]) > sum(logs[0])) == label
        mean = [sum(log) / len(log) for log in logs]
        means += (mean[1] > mean[0]) == label
        rows.append({"ctx": context, "endings": endings, "label": [label, str(label)][i % 3 == 0]})
    assert sums != means  # else one might stand for the other
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    results, printed = evaluate(tmp_path, f"--hellaswag={tmp_path}/items.jsonl")
    found = results["hellaswag"]
    assert (found["accuracy"], found["accuracy_norm"]) == (sums / 12, means / 12)
    assert f"| hellaswag, accuracy | {sums / 12:.4f} ±" in printed and found["cut"] == 0
    few, _ = evaluate(tmp_path, f"--hellaswag={tmp_path}/items.jsonl", "--examples=5")
    assert few["hellaswag"]["items"] == 5


def test_lambada_by_hand(tmp_path):
    model = build(block_size=64)
    write_checkpoint(tmp_path, model)
    texts = ["one two", "of three words", "  with blanks around  "]
    logs = []
    for text in texts:
        before, word = text.strip().rsplit(" ", 1)
        found = log_probability(model, [*before.encode()], [*b" ", *word.encode()])
        logs.append((sum(log_p for log_p, _ in found), all(best for _, best in found)))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    results, printed = evaluate(tmp_path, f"--lambada={path}")
    perplexity = math.exp(-sum(log_p for log_p, _ in logs) / 3)
    assert abs(results["lambada"]["perplexity"] / perplexity - 1) < 1e-3
    assert results["lambada"]["accuracy"] == sum(best for _, best in logs) / 3
    assert "| lambada, perplexity |" in printed


@pytest.mark.quick
def test_results_from_scores():
    """Item 1 is right by its sum alone, items 2 and 3 by their mean alone."""
    scores = [(-3.0, 1), (-4.0, 4), (-2.0, 1), (-2.5, 5), (-3.0, 1), (-9.0, 9), (-8.0, 2)]
    scores = [Score(log_p, count, log_p > -2.6, log_p == -9) for log_p, count in scores]
    found = hellaswag([(2, 0), (2, 1), (3, 1)], scores)
    assert found == {"items": 3, "accuracy": 1 / 3, "accuracy_norm": 2 / 3, "cut": 1}
    found = lambada(scores[:4])
    assert found["accuracy"] == 0.5 and abs(found["perplexity"] - math.exp(11.5 / 4)) < 1e-9


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


HELLASWAG = [{"ctx": "He", "endings": ["runs.", "is a bottle."], "label": "1", "ind": 3}] * 3
LAMBADA = [{"text": "one two three"}, {"text": "four five"}]


def test_both_tasks_from_the_hub(tmp_path):
    write_checkpoint(tmp_path / "run", build(block_size=64))
    repositories = {
        "Rowan/hellaswag": {"data/validation.jsonl": jsonl(*HELLASWAG)},
        "EleutherAI/lambada_openai": {"data/test.jsonl": jsonl(*LAMBADA)},
    }
    command = ["eval.py", f"--out_dir={tmp_path}/run", *COMMON, "--hellaswag=hub", "--lambada=hub"]
    command.append(f"--results={tmp_path}/results.json")
    with fake_hub(repositories, tmp_path / "home") as (environment, _):
        run(*command, **environment)
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["hellaswag"]["items"], found["lambada"]["items"]) == (3, 2)
    assert found["hellaswag"]["revision"] == found["lambada"]["revision"] == COMMIT
    local = {"hellaswag": HELLASWAG, "lambada": LAMBADA}
    for task, rows in local.items():
        (tmp_path / f"{task}.jsonl").write_bytes(jsonl(*rows))
        alone, _ = evaluate(tmp_path / "run", f"--{task}={tmp_path}/{task}.jsonl")
        for key in ("accuracy", "accuracy_norm", "perplexity"):
            assert alone[task].get(key) == found[task].get(key)


def test_gpt2s_own_weights(gpt2_cache, tmp_path):
    """A small model with GPT-2's vocabulary: the loss of a text, and samples."""
    folder = write(tmp_path, gpt2_weights(vocabulary=50257), {"vocab_size": 50257})
    (tmp_path / "text.txt").write_text("Hello world, hello you")
    source = f"--init_from={folder}"
    said = run("eval.py", source, f"--data={tmp_path}/text.txt", *COMMON)
    tokens = len(get_tokenizer("gpt2").encode_ordinary("Hello world, hello you"))
    assert f"{tokens} tokens of" in said and "| 22 bytes |" in said
    said = run("sample.py", source, "--start=Hello world", "--max_new_tokens=3", *COMMON)
    assert "--- sample 3 ---\nHello world" in said and "prompt: 9 tokens" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("", "there is nothing to measure"),
        ("--data=DIR/none.txt", "none.txt: there is no such file or folder"),
        ("--data=mine", "name a text file, or the folder of a data set that prepare_data.py has "),
        ("--data=mine", "such as data/mine"),
        ("--data=DIR", "meta.json: no such file; to make it: python prepare_data.py"),
        ("--data=DIR/empty.txt", "there is no token to predict in it"),
        ("--data=DIR/latin1.txt", "byte 0xe9 at position 3 is no UTF-8"),
        ("--data=TINY --split=test", "no split 'test', there are train, val"),
        ("--data=TINY --stride=17", "stride must lie between 0 and block_size 16, not 17"),
        ("--lambada=DIR/one.jsonl", "one.jsonl, line 1: a text of two words or more is wanted"),
        ("--lambada=DIR/long.jsonl", "an ending of 41 tokens is longer than block_size 16"),
        ("--lambada=DIR/latin1.txt", "byte 0xe9 at position 3"),
        ("--lambada=DIR/empty.txt", "empty.txt: there is no example in it"),
        ("--hellaswag=DIR/one.jsonl", "line 1: a text ctx and a list of endings are wanted"),
        ("--hellaswag=DIR/label.jsonl", "line 1: label 2 is none of 2 endings"),
        ("--hellaswag=DIR/broken.jsonl", "broken.jsonl, line 2: no JSON"),
        ("--data=DIR/one.jsonl --results=DIR/one.jsonl", "one.jsonl is there already"),
        ("--data=DIR/one.jsonl --results=DIR/no/x.json", "there is no folder"),
        ("--data=DIR/one.jsonl --init_from=gpt2", "--init_from names other weights"),
        ("--data=DIR/one.jsonl --examples=-1", "examples must be at least 0, not -1"),
    ],
)
def test_refuses(arguments, says, tiny_data, tmp_path):
    write_checkpoint(tmp_path / "run", build())
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "one.jsonl").write_bytes(jsonl({"text": "one"}))
    (tmp_path / "long.jsonl").write_bytes(jsonl({"text": "a " + "b" * 40}))
    (tmp_path / "label.jsonl").write_bytes(jsonl({"ctx": "a", "endings": ["b", "c"], "label": 2}))
    (tmp_path / "broken.jsonl").write_bytes(jsonl(HELLASWAG[0]) + b"\n{")
    arguments = arguments.replace("DIR", str(tmp_path)).replace("TINY", f"{tiny_data}/tiny")
    command = ["eval.py", f"--out_dir={tmp_path}/run", *COMMON, *arguments.split()]
    said = run(*command, ok=False)
    assert says in said and len(said) < 1100


def test_a_shard_with_fewer_tokens_than_it_should_have_is_refused(tiny_data, tmp_path):
    write_checkpoint(tmp_path, build())
    shutil.copytree(tiny_data / "tiny", tmp_path / "data")
    meta = read_meta(tmp_path / "data")
    shard = meta["splits"]["val"]["shards"][0]
    write_shard(tmp_path / "data" / shard["file"], np.zeros(shard["tokens"] - 1, np.uint16))
    said = run("eval.py", f"--out_dir={tmp_path}", f"--data={tmp_path}/data", *COMMON, ok=False)
    assert f"but meta.json says {shard['tokens']:,}" in said


def test_other_tokens_are_refused(tiny_data, tmp_path):
    characters = {"kind": "characters", "characters": "abc"}
    write_checkpoint(tmp_path, build(), tokenizer=characters, n_vocab=4)
    said = run("eval.py", f"--out_dir={tmp_path}", f"--data={tiny_data}/tiny", *COMMON, ok=False)
    assert "has tokens of bytes, and the model knows those of 3-character" in said


def test_without_a_network_the_hub_is_refused_at_once(tmp_path):
    write_checkpoint(tmp_path, build())
    command = ["eval.py", f"--out_dir={tmp_path}", *COMMON, "--lambada=hub"]
    said = run(*command, ok=False, HF_ENDPOINT="http://127.0.0.1:1")
    assert "could not be reached" in said and "name a .jsonl file instead of hub" in said
