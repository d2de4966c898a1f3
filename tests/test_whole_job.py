"""Prepare, train and sample as the README says, on what people have: one small file."""

import random

import pytest
from conftest import load, records, run

from data import read_meta

WORDS = "the cat sat on a mat while small birds sang near the old river and nobody knew".split()


def write_text(path, characters):
    """Lines of random words: paragraphs of one file, as input.txt of nanoGPT's examples."""
    random.seed(0)
    text = ""
    while len(text) < characters:
        text += " ".join(random.choices(WORDS, k=60)) + "\n\n"
    path.write_text(text)


@pytest.mark.parametrize(
    "characters, tokenizer", [(100_000, "bytes"), (100_000, "chars"), (20_000, "bytes")]
)
def test_one_small_file_without_setting_a_knob(tmp_path, characters, tokenizer):
    """config/laptop.py asks for more validation tokens than there are, and for 16 sequences in a
    batch where 20,000 bytes leave fewer: both are met as far as the text goes, and said."""
    write_text(tmp_path / "input.txt", characters)
    file, folder = str(tmp_path / "input.txt"), tmp_path / "data/mine"
    said = run("prepare_data.py", "--files", file, "--tokenizer", tokenizer, f"--out={folder}")
    assert "the longest is cut" in said

    out_dir = tmp_path / "out"
    knobs = f"--data_dir={tmp_path}/data --dataset=mine --out_dir={out_dir}".split()
    short = "--max_iters=2 --n_layer=1 --compile=False".split()  # for the time that a test has
    said = run("train.py", "config/tbp.py", "config/laptop.py", *knobs, *short)
    blocks = (read_meta(folder)["splits"]["val"]["tokens"] - 1) // 128
    assert 1 <= blocks < 16 if characters == 20_000 else 16 <= blocks < 40 * 16
    read = blocks - blocks % 16 if blocks >= 16 else blocks
    assert f"evaluations read {read * 128:,} tokens" in said
    assert [line["step"] for line in records(out_dir) if "val" in line] == [0, 2]

    said = run(
        "sample.py",
        f"--out_dir={out_dir}",
        "--max_new_tokens=20",
        "--num_samples=1",
        "--compile=False",
    )
    assert "--- sample 1 ---" in said
    if tokenizer == "chars":
        alphabet = load(next(out_dir.glob("ckpt_*.pt")))["tokenizer"]["characters"]
        sample = said.split("--- sample 1 ---\n")[1].split("prompt: ")[0]
        assert set(sample) <= {*alphabet, "\n"}


LIKE_WINDOWS = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""


def test_the_whole_job_where_the_modules_of_unix_are_not(tmp_path):
    (tmp_path / "windows").mkdir()
    (tmp_path / "windows/sitecustomize.py").write_text(LIKE_WINDOWS)
    write_text(tmp_path / "input.txt", 100_000)
    data = tmp_path / "data/mine"
    environment = {"PYTHONPATH": str(tmp_path / "windows")}
    knobs = f"--data_dir={tmp_path}/data --dataset=mine --out_dir={tmp_path}/out --n_layer=1"
    short = "--max_iters=2 --n_embd=16 --compile=False".split()
    said = ""
    for command in (
        f"prepare_data.py --files {tmp_path}/input.txt --tokenizer bytes --out={data}",
        f"train.py config/tbp.py config/laptop.py {knobs} {' '.join(short)}",
        f"sample.py --out_dir={tmp_path}/out --max_new_tokens=5 --compile=False",
    ):
        said += run(*command.split(), fresh=True, **environment)
    assert "cannot be locked here (No module named 'fcntl'); see to it yourself" in said
    assert "finished: 2 steps" in said and "--- sample 3 ---" in said
