"""sample.py as a user runs it, on checkpoints that were not trained."""

import importlib
import json
import re

import pytest
import torch
from conftest import run, write_checkpoint

from model import GPT, GPTConfig

SIZES = dict(block_size=64, vocab_size=320, n_layer=1, n_head=2, n_embd=32)
SMALL = ["--device=cpu", "--compile=False", "--max_new_tokens=12"]


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A run whose model is random, and far enough from its start to have something to say."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, model)
    return folder


def model_that_writes(text):
    """A model of bytes that writes `text` after the end of text, whatever it draws: each position
    alone says what comes next."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter.zero_()
        wte, wpe = model.embed.wte.weight, model.embed.wpe.weight
        wte.normal_()
        for position, byte in enumerate([*text.encode(), 256]):
            wpe[position] = 100 * wte[byte]
    return model


def samples_of(output):
    """The output without what is said of speed, of the checkpoint, and of a long prompt."""
    said = r"prompt: .* tok/s.*|.*: step \d+, .*|prompt \d+ has .*"
    return re.sub(rf"(?m)^({said})\n", "", output)


def test_repeats_with_a_seed_and_not_with_another(out_dir, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file", encoding="utf-8-sig")
    command = ["sample.py", f"--out_dir={out_dir}", f"--start=FILE:{tmp_path}/prompt.txt", *SMALL]
    text = run(*command)
    assert text.count("\nfrom a file") == 3 and "\ufeff" not in text
    assert re.search(r"(?m)^prompt: 36 tokens in .* \| new: 33 tokens in .* tok/s$", text)
    text = samples_of(text)
    assert text == samples_of(run(*command)) != samples_of(run(*command, "--seed=2"))
    assert text == samples_of(run(*command, "--stream=True"))
    assert text == samples_of(run(*command, "--batch_size=2"))
    assert text == samples_of(run(*command[:2], "--start=\ufefffrom a file", *SMALL))


def test_a_file_of_prompts_gives_what_each_gives_alone(out_dir, tmp_path):
    prompts = ["a", "", "a longer prompt — é", "b" * 70]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\n".join(prompts) + "\n")
    rows = [{"prompt": prompt, "id": [i, "\ud800"]} for i, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    command = ["sample.py", f"--out_dir={out_dir}", "--num_samples=2", "--batch_size=3", *SMALL]
    lines = {}
    for name in ("lines.txt", "rows.jsonl"):
        run(*command, f"--prompts={tmp_path}/{name}", f"--out={tmp_path}/{name}.out")
        written = (tmp_path / f"{name}.out").read_text().splitlines()
        lines[name] = [json.loads(line) for line in written]
    ids = [line.pop("id") for line in lines["rows.jsonl"]]
    assert ids == [[i, "\ud800"] for i in range(4) for _ in range(2)]
    assert lines["rows.jsonl"] == lines["lines.txt"]

    shown = run(*command, f"--prompts={tmp_path}/lines.txt")
    assert [json.loads(line) for line in shown.splitlines() if line[0] == "{"] == lines["lines.txt"]
    for i, prompt in enumerate(prompts):
        alone = samples_of(run(*command, f"--start={prompt}"))
        mine = lines["lines.txt"][2 * i : 2 * i + 2]
        assert [line["prompt"] for line in mine] == [prompt] * 2
        assert [line["sample"] for line in mine] == [1, 2]
        assert all(line["tokens"] <= 12 for line in mine)
        assert alone == "".join(
            f"--- sample {line['sample']} ---\n{prompt}{line['completion']}\n\n" for line in mine
        )


def test_ends_with_the_document_and_streams_whole_characters(tmp_path):
    text = "né € 😀 and 語."
    write_checkpoint(tmp_path / "run", model_that_writes(text))
    command = ["sample.py", f"--out_dir={tmp_path}/run", "--num_samples=1", "--device=cpu"]
    command += ["--compile=False", "--temperature=1"]
    whole = samples_of(run(*command))
    assert whole == f"--- sample 1 ---\n{text}\n\n"
    marks = "import builtins\nbuiltins.print = lambda *a, p=print, **k: p('|', *a, sep='', **k)\n"
    streamed = samples_of(run(*command, "--stream=True", patch=marks, PYTHONIOENCODING="utf-8"))
    streamed = streamed.split("---\n")[1].split("\n")[0]
    pieces = [piece for piece in streamed.split("|") if piece]
    assert "".join(pieces) == text and len(pieces) == len(text)  # each character, as it came


def test_end_of_text_in_a_prompt_is_text_unless_asked_for(out_dir, tmp_path):
    command = ["sample.py", f"--out_dir={out_dir}", *SMALL, "--num_samples=1"]
    start = "--start=ab<|endoftext|>c"
    assert "prompt: 17 tokens" in run(*command, start)  # end of text, and 16 bytes
    assert "prompt: 5 tokens" in run(*command, start, "--special_tokens=True")
    begins_with_it = run(*command, "--start=<|endoftext|>c", "--special_tokens=True")
    assert "prompt: 2 tokens" in begins_with_it
    alone = samples_of(run(*command, "--start=c"))
    assert samples_of(begins_with_it) == alone.replace("\nc", "\n<|endoftext|>c", 1)


def test_a_console_without_utf_8_shows_a_question_mark(out_dir):
    command = ["sample.py", f"--out_dir={out_dir}", "--start=caf\u00e9 \u20ac", *SMALL]
    assert "\ncaf? ?" in run(*command, PYTHONIOENCODING="ascii")


def test_a_prompt_beyond_the_block_is_said_to_lose_its_beginning(out_dir):
    size = SIZES["block_size"]
    command = ["sample.py", f"--out_dir={out_dir}", *SMALL, "--num_samples=1"]
    said = f"prompt 1 has {size + 1} tokens; the model reads the last {size}"
    assert said in run(*command, f"--start={'a' * size}")  # an end of text comes first
    assert "the model reads the last" not in run(*command, f"--start={'a' * (size - 1)}")


def test_a_top_k_of_0_keeps_all_tokens(out_dir):
    command = ["sample.py", f"--out_dir={out_dir}", *SMALL, "--temperature=1.5"]
    of_all, of_one = run(*command, "--top_k=0"), run(*command, "--top_k=1")
    assert samples_of(of_all) == samples_of(run(*command, "--top_k=320")) != samples_of(of_one)


@pytest.mark.quick
def test_the_speed_is_of_all_batches_and_leaves_out_the_step_that_compiles(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py"])
    speed = importlib.import_module("sample").Speed()
    speed.add(10, [0.0, 1.0, 5.0, 6.0], [2, 2, 2])
    speed.add(14, [0.0, 3.0, 4.0], [2, 1])
    assert str(speed) == (
        "prompt: 24 tokens in 4.00 s, 6.0 tok/s | new: 3 tokens in 2.00 s, 1.5 tok/s | "
        "the first step, compiling included: 4.0 s"
    )


def test_the_compiled_step_and_bfloat16(out_dir):
    command = ["sample.py", f"--out_dir={out_dir}", "--start=abc", *SMALL, "--num_samples=1"]
    eager, compiled = run(*command), run(*command, "--compile=True")
    assert samples_of(eager) == samples_of(compiled)
    assert "compiling included" in compiled and "compiling included" not in eager
    assert "--- sample 1 ---\nabc" in run(*command, "--dtype=bfloat16")


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"CXX": "/no/g++"}, "No working C++ compiler found"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/proc/none"}, "No such file or directory: '/proc/none'"),
    ],
)
def test_a_machine_that_cannot_compile_is_told_what_to_do(environment, says, out_dir, tmp_path):
    command = ["sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=3"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | environment
    said = run(*command, ok=False, fresh=True, **environment)
    assert says in said and "TORCHINDUCTOR_CACHE_DIR" in said and "--compile=False" in said


def test_a_model_with_bfloat16_streams(tmp_path):
    write_checkpoint(tmp_path / "run", GPT(GPTConfig(**SIZES, stream_dtype="bfloat16")))
    command = ["sample.py", f"--out_dir={tmp_path}/run", *SMALL]
    assert "--- sample 3 ---" in run(*command)
    assert "--dtype=bfloat16" in run(*command, "--dtype=float32", ok=False)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--out_dir=nowhere", "nowhere has no whole checkpoint"),
        (
            "--out_dir=DIR/empty --checkpoint=best",
            "empty has no best.pt yet; take --checkpoint=latest",
        ),
        ("--checkpoint=no.pt", "must be latest, best or a path, and there is no file 'no.pt'"),
        ("--checkpoint=DIR/notes.txt", "not a whole checkpoint"),
        ("--temperature=-1", "temperature must be at least 0 and finite, not -1.0"),
        ("--top_p=0", "top_p must be above 0 and at most 1, or None, not 0.0"),
        ("--num_samples=0", "num_samples must be at least 1, not 0"),
        ("--start=FILE:DIR/none.txt", "none.txt: could not be read (No such file"),
        ("--start=FILE:DIR", ": could not be read (Is a directory)"),
        ("--start=FILE:DIR/latin1.txt", "byte 0xe9 at position 3 is no UTF-8"),
        ("--start=a --prompts=b", "both --start and --prompts"),
        ("--dtype=float16", "dtype must be auto, float32 or bfloat16 here, not 'float16'"),
        ("--prompts=none.txt --out=DIR/notes.txt", "notes.txt is there already"),
        ("--prompts=b --stream=True", "does not go with --prompts"),
        ("--out=b", "name one with --prompts"),
        ("--prompts=DIR/notes.jsonl", "notes.jsonl, line 2: no JSON"),
        (
            "--prompts=DIR/text.jsonl",
            'line 1: an object with a text "prompt" is wanted, not {"text',
        ),
        ("--prompts=DIR/blank.jsonl", "blank.jsonl has no prompt; write a line such as"),
        ("--prompts=DIR/tokens.jsonl", "line 1: the fields tokens are written here; rename them"),
        ("--prompts=DIR/notes.txt --out=DIR/notes.txt", "notes.txt is there already"),
        ("--prompts=DIR/notes.txt --out=DIR/none/b", "could not be written (No such file"),
        ("--device=cuda:99", "device = cuda:99, but this torch"),
    ],
)
def test_refuses(arguments, says, out_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("no checkpoint\n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "notes.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "tokens.jsonl").write_text('{"prompt": "a", "tokens": 3}\n')
    arguments = arguments.replace("DIR", str(tmp_path)).split()
    assert says in run("sample.py", f"--out_dir={out_dir}", *SMALL, *arguments, ok=False)
    assert (tmp_path / "notes.txt").read_text() == "no checkpoint\n"
