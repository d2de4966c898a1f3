"""The Python snippets of README.md and CONTRIBUTING.md run as they stand, and the commands that
train have knobs that fit each other."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from batches import sequences_per_step
from configurator import resolve
from mixers import OPTIONS


def snippets(name):
    """The Python code between ```python and ``` in a file, in its order."""
    text = (ROOT / name).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def pasted(code):
    """A program that runs a snippet as if it were pasted in the folder of the scripts."""
    return f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"


def run_in(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_snippet_of_the_readme_runs_by_itself(tmp_path):
    codes = snippets("README.md")
    assert codes
    for code in codes:
        run_in(tmp_path, "-c", pasted(code))


def training_commands(name):
    """-> for each command of train.py in a file, the number of processes and the arguments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if " train.py " in line:
            words = shlex.split(line.replace("$SLURM_NNODES", "2"), comments=True)
            launcher = dict(word.split("=", 1) for word in words if word.startswith("--n"))
            count = int(launcher.get("--nnodes", 1)) * int(launcher.get("--nproc_per_node", 1))
            arguments = words[words.index("train.py") + 1 :]
            found.append((count, [word for word in arguments if not word.endswith(">")]))
    return found


@pytest.mark.quick
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "dev/many_machines.md"])
def test_commands_that_train_have_knobs_that_fit(name):
    """A step's tokens go evenly over the processes; and none is refused since its folder has the
    run of another command of the file."""
    commands, folders = training_commands(name), []
    assert commands
    for processes, arguments in commands:
        words = [word for word in arguments if word.startswith(("-", "config/"))]
        knobs = resolve(ROOT / "train.py", words, extra=OPTIONS)
        sizes = [knobs[name] for name in ("total_batch_tokens", "batch_size", "block_size")]
        sequences_per_step(*sizes, processes)
        if knobs["init_from"] == "scratch":
            folders.append(knobs["out_dir"])
    assert name == "dev/many_machines.md" or len(folders) == len(set(folders))


@pytest.fixture
def copy(tmp_path):
    """The scripts and their tests in a folder of their own, to be changed."""
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def test_the_new_mixer_passes_the_tests_of_mixers(copy):
    added = {}
    for snippet in snippets("CONTRIBUTING.md"):
        if found := re.match(r"# (mixers\.py|tests/oracle\.py)\n", snippet):
            added[found[1]] = "\n\n" + snippet
    mixers, oracle = copy / "mixers.py", copy / "tests" / "oracle.py"
    above, comment, last = mixers.read_text().partition("# Every option of every mixer")
    mixers.write_text(above + added["mixers.py"] + "\n\n" + comment + last)
    oracle.write_text(oracle.read_text() + added["tests/oracle.py"])
    output = run_in(copy, "-m", "pytest", "tests/test_mixers.py", "-k", "cyclic", "-rs")
    assert "passed" in output and "not in tests/oracle.py" not in output, output


@pytest.mark.long  # compiles
def test_the_profile_of_a_step(tmp_path):
    (code,) = (code for code in snippets("CONTRIBUTING.md") if "torch.profiler" in code)
    assert "Self CPU" in run_in(tmp_path, "-c", pasted(code))
    assert (tmp_path / "trace.json").stat().st_size > 1000
