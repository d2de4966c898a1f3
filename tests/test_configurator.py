"""What configurator.configure accepts, what it refuses and what it says then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import at_least, configure

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''"""Train a toy.

    python toy.py config/small.py

It needs nothing.
"""
import os
from configurator import at_least, configure

# ----- input and output -----
out_dir = "out"  # checkpoints go here
run_name: str | None = None  # None: no name
max_iters = 600_000  # steps

# optimizer
learning_rate = 6e-4  # peak, after warmup
beta1, beta2 = 0.9, 0.95  # -1 would be shown as such
grad_clip: float = 1  # 0 is off
decay = 1 / 10

compile: bool | str = "blocks"  # False, True or blocks
resume = False
seed: int | float = 1337
shape = (3, 4)
device: object = None
_private = 5
config = configure(globals())
late = 7
'''
DEFAULTS = {
    "out_dir": "out",
    "run_name": None,
    "max_iters": 600_000,
    "learning_rate": 6e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay": 0.1,
    "compile": "blocks",
    "resume": False,
    "seed": 1337,
}


class Toy:
    """The toy script in a folder, as far as its call of configure."""

    def __init__(self, folder, script=SCRIPT):
        self.path = folder / "toy.py"
        self.path.write_text(script)
        self.code = compile(script.split("config = configure")[0], self.path, "exec")

    def __call__(self, *argv):
        self.namespace = {"__file__": str(self.path), "__name__": "__main__"}
        exec(self.code, self.namespace)
        self.before = dict(self.namespace)
        return configure(self.namespace, list(argv))

    def config(self, text, name="small.py"):
        path = self.path.parent / "config" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


@pytest.fixture
def refusal(toy, capsys):
    """Calls the toy, which must refuse: returns the message."""

    def call(*argv):
        with pytest.raises(SystemExit) as error:
            toy(*argv)
        assert error.value.code == 2
        assert toy.namespace == toy.before, "half-applied"
        out, message = capsys.readouterr()
        assert not out and len(message.splitlines()) in (1, 2) and "Traceback" not in message
        return message

    return call


def exactly(values):
    """With the types, since True == 1 == 1.0."""
    return {name: (type(value), value) for name, value in values.items()}


def test_knobs_are_the_plain_values_above_the_call_in_source_order(toy):
    values = toy()
    assert exactly(values) == exactly(DEFAULTS) and list(values) == list(DEFAULTS)
    assert json.loads(json.dumps(values)) == values
    assert all(toy.namespace[name] is value for name, value in values.items())


@pytest.mark.parametrize(
    "item, value",
    [
        ("--learning_rate=1e-3", 1e-3),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=-1", -1.0),
        ("--max_iters=5", 5),
        ("--max_iters=6e5", 600_000),
        ("--max_iters=1_000", 1000),
        ("--max_iters=3.0", 3),
        ("--resume=True", True),
        ("--resume=true", True),
        ("--resume=False", False),
        ("--resume=false", False),
        ("--compile=true", True),
        ("--compile=False", False),
        ("--compile=all", "all"),
        ("--compile='True'", "True"),
        ("--seed=2", 2),
        ("--seed=2.0", 2.0),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir=", ""),
        ("--out_dir=12", "12"),
        ("--out_dir='12'", "12"),
        ("--out_dir=True", "True"),
        ("--out_dir=[1]", "[1]"),
        ("--out_dir=runs/x.py", "runs/x.py"),
        ("--out_dir='tis", "'tis"),
        ("--run_name=None", None),
        ("--run_name=12", "12"),
        ("--run_name='None'", "None"),
    ],
)
def test_command_line(toy, item, value):
    name = item[2:].split("=")[0]
    assert exactly(toy(item)) == exactly(DEFAULTS | {name: value})
    assert toy.namespace[name] == value


@pytest.mark.parametrize(
    "item, value, kind, wanted, comment",
    [
        ("--learning_rate=fast", "'fast'", "str", "float", "peak, after warmup"),
        ("--learning_rate=True", "True", "bool", "float", "peak, after warmup"),
        ("--learning_rate=1/3", "'1/3'", "str", "float", "peak, after warmup"),
        ("--learning_rate=None", "None", "NoneType", "float", "peak, after warmup"),
        ("--learning_rate=1" + "0" * 400, "1000", "int", "float", "peak, after warmup"),
        ("--max_iters=1.5", "1.5", "float", "int", "steps"),
        ("--max_iters=1e999", "inf", "float", "int", "steps"),
        ("--max_iters=True", "True", "bool", "int", "steps"),
        ("--max_iters=true", "'true'", "str", "int", "steps"),
        ("--max_iters=", "''", "str", "int", "steps"),
        ("--max_iters=[5]", "[5]", "list", "int", "steps"),
        ("--resume=1", "1", "int", "bool", ""),
        ("--resume=yes", "'yes'", "str", "bool", ""),
        ("--compile=1", "1", "int", "bool | str", "False, True or blocks"),
        ("--seed=one", "'one'", "str", "int | float", ""),
    ],
)
def test_wrong_type(refusal, item, value, kind, wanted, comment):
    message = refusal("--out_dir=elsewhere", item)
    name = item[2:].split("=")[0]
    assert (
        f"{name} = {value}" in message
        and f"of type {kind}, wanted {wanted}\n" in message
        and comment in message
    )


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--lerning_rate=1"],
            "--lerning_rate: toy.py has no such knob (did you mean --learning_rate?); toy.py "
            "--help lists them",
        ),
        (["--learning-rate=1"], "did you mean --learning_rate?"),
        (["--lerning_rate", "1"], "did you mean --learning_rate?"),
        (["--zzz=1"], "--zzz: toy.py has no such knob; toy.py --help"),
        (["--late=1"], "no such knob"),
        (["--_private=1"], "no such knob"),
        (["--shape=1"], "no such knob"),
        (["--device=1"], "no such knob"),
        (["--config=1"], "no such knob"),
        (["--"], "no such knob"),
        (["--max_iters", "5"], "write --max_iters=value in one word"),
        (["--resume"], "for example --resume=False"),
        (["max_iters=5"], "write --max_iters=5"),
        (["-max_iters=5"], "write --max_iters=5"),
        (["out_dir=x.py"], "write --out_dir=x.py"),
        (["-k"], "'-k' is neither --key=value nor a config file"),
        (["small"], "neither --key=value nor"),
        ([""], "'' is neither"),
    ],
)
def test_malformed_arguments(refusal, argv, said):
    assert said in refusal("--out_dir=elsewhere", *argv)


def test_config_file_does_arithmetic_on_the_values_so_far(toy):
    path = toy.config(
        "import math\n"
        "_tokens = 12 * 1024 * 5 * 8\n"
        "max_iters = 1e10 // _tokens\n"
        "decay = learning_rate / 2\n"
        "grad_clip = math.ceil(beta1)\n"
        "run_name = __file__\n"
    )
    values = toy("--learning_rate=1", path)
    changed = {
        "learning_rate": 1.0,
        "max_iters": 20345,
        "decay": 0.5,
        "grad_clip": 1.0,
        "run_name": path,
    }
    assert exactly(values) == exactly(DEFAULTS | changed)
    assert "_tokens" not in toy.namespace and "math" not in toy.namespace


def test_the_last_word_wins(toy):
    path, other = toy.config("max_iters = 2"), toy.config("max_iters *= 10", "other.py")
    for argv, wanted in [
        (["--max_iters=1", path], 2),
        ([path, "--max_iters=1"], 1),
        ([path, other], 20),
        ([other, path], 2),
        (["--max_iters=1", "--max_iters=3", other], 30),
    ]:
        assert toy(*argv)["max_iters"] == wanted


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "\nmax_iter = 5",
            "small.py:2: toy.py has no knob 'max_iter' (did you mean max_iters?); toy.py --help",
        ),
        ("out_dir = 'x'\nfor i in range(3): pass", "small.py:2: toy.py has no knob 'i'"),
        (
            "from math import pi",
            "small.py:1: toy.py has no knob 'pi'; toy.py --help lists them, and a name of the "
            "file's own",
        ),
        ("from math import *", "small.py: toy.py has no knob"),
        ("\ndef f(): pass", "small.py:2: toy.py has no knob 'f'"),
        ("late = 1", "no knob 'late'"),
        (
            "\n\nlearning_rate = 'x'",
            "small.py:3: learning_rate = 'x' is of type str, wanted float\n",
        ),
        ("learning_rate = 'x'", "peak, after warmup"),
        ("max_iters = 7 / 2", "max_iters = 3.5 is of type float, wanted int"),
        ("resume = 1", "resume = 1 is of type int, wanted bool"),
        ("out_dir = 12", "out_dir = 12 is of type int, wanted str"),
        ("import math as resume", "small.py:1: resume = <module"),
        ("max_iters = 1\nx = (", "small.py:2: SyntaxError: "),
        ("return 5", "small.py:1: SyntaxError: 'return' outside function"),
        (b"out_dir = '\xff'", "small.py:1: SyntaxError: "),
        (b"max_iters = 1\0", "small.py:1: SyntaxError: "),
        ("max_iters = 1\n_x = 1 / 0", "small.py:2: ZeroDivisionError: division by zero"),
        ("_x = 1\n_f = lambda: late\n_f()", "small.py:2: NameError: name 'late' is not defined"),
        ("import json\n\njson.loads('')", "small.py:3: json.decoder.JSONDecodeError: "),
        ("\nimport no_such_module_at_all", "small.py:2: ModuleNotFoundError: "),
        ("raise SystemExit(0)", "small.py:1: SystemExit: 0"),
    ],
)
def test_config_file_refused(toy, refusal, text, said):
    message = refusal("--out_dir=elsewhere", toy.config(text))
    assert said in message and message.startswith(str(toy.path.parent))


def test_config_files_written_for_another_script(tmp_path, capsys):
    """Its knobs may be set and read by them, and nowhere else; that script is not run."""
    small = Toy(tmp_path, "import os\nmax_iters = 5\nconfig = configure(globals())\n")
    (tmp_path / "train.py").write_text(
        "import no_such_module\nraise SystemExit\n"
        + SCRIPT.replace("import os", "x = no_such_module.y")
    )
    one = small.config(
        "max_iters = int(beta1 * 10)\nout_dir = f'out/{run_name}'\ndecay = 2", "one.py"
    )
    two = small.config(
        "assert out_dir == 'out/None' and decay == 2.0 and beta2 == 0.95\nmax_iters += 1", "two.py"
    )

    def call(*argv):
        small()
        return configure(small.namespace, argv, config_of="train.py")

    assert (
        exactly(call(one, two)) == exactly({"max_iters": 10}) and small.namespace["max_iters"] == 10
    )
    assert not {"out_dir", "decay", "beta1"} & small.namespace.keys()
    for argv, said in [
        (["--out_dir=x"], "--out_dir: toy.py has no such knob"),
        ([small.config("decay = 'x'", "a.py")], "a.py:1: decay = 'x' is of type str, wanted float"),
        (
            [small.config("decoy = 1.0", "b.py")],
            "b.py:1: toy.py has no knob 'decoy' (did you mean decay?)",
        ),
        ([small.config("late = 8", "c.py")], "toy.py has no knob 'late'"),
    ]:
        with pytest.raises(SystemExit):
            call(*argv)
        assert said in capsys.readouterr().err


def test_missing_config_file_lists_those_there_are(toy, refusal, monkeypatch):
    monkeypatch.chdir(toy.path.parent)
    assert refusal("config/smal.py").strip() == "config/smal.py: no such file; there are: none"
    Path("config/studies").mkdir(parents=True, exist_ok=True)
    toy.config(""), toy.config("", "large.py"), toy.config("", "studies/rates.py")
    all_of_them = "config/large.py, config/small.py, config/studies/rates.py"
    for missing, there in (
        ("config/smal.py", "config/small.py"),
        ("config/rate.py", "config/studies/rates.py"),
        ("none.py", all_of_them),
    ):
        expected = f"{missing}: no such file; there are: {there}".replace("/", os.sep)
        assert refusal(missing).strip().replace("/", os.sep) == expected
    Path("folder.py").mkdir()
    assert refusal("folder.py").startswith("folder.py: ")


@pytest.mark.parametrize("text", ["question = 'Why?'\narms = {}", "arms={}", "arms: dict = {"])
def test_a_study_is_no_config_file(toy, refusal, text):
    path = toy.config(text)
    message = refusal(path).strip()
    assert message == f"{path} is a study, not a config file; to run it: python study.py {path}"


def test_a_default_must_fit_its_own_annotation(tmp_path, capsys):
    with pytest.raises(SystemExit):
        Toy(tmp_path, "width: int = 'x'  # channels\n")()
    assert (
        "toy.py: width = 'x' is of type str, wanted int\n    width: channels"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--zzz=1", "--help"]])
def test_help(toy, capsys, argv):
    with pytest.raises(SystemExit) as error:
        toy(*argv)
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "Train a toy.\n\n    python toy.py config/small.py\n\nIt needs nothing.\n\nKnobs"
    )
    assert (
        text.split("do:\n")[1]
        == """
input and output
  --out_dir='out'         checkpoints go here
  --run_name=None         None: no name
  --max_iters=600000      steps

optimizer
  --learning_rate=0.0006  peak, after warmup
  --beta1=0.9             -1 would be shown as such
  --beta2=0.95            -1 would be shown as such
  --grad_clip=1.0         0 is off
  --decay=0.1

  --compile='blocks'      False, True or blocks
  --resume=False
  --seed=1337
"""
    )


class Option:
    """An option as mixers.py declares it, as far as configure looks."""

    def __init__(self, default, comment):
        self.default, self.comment = default, comment


EXTRA = {"rounds": Option(20, "normalisations"), "sharpness": Option(1.5, "of the softmax")}


def test_extra_knobs_are_knobs_like_the_rest(toy, capsys):
    def call(*argv):
        toy()
        return configure(toy.namespace, list(argv), extra=EXTRA)

    assert exactly(call()) == exactly(DEFAULTS | {"rounds": 20, "sharpness": 1.5})
    path = toy.config("sharpness = rounds / 4")
    assert exactly(call("--rounds=3", path)) == exactly(DEFAULTS | {"rounds": 3, "sharpness": 0.75})
    assert toy.namespace["rounds"] == 3 and toy.namespace["sharpness"] == 0.75
    for argv, said in [
        (["--rounds=x"], "rounds = 'x' is of type str, wanted int\n    rounds: normalisations"),
        (["--round=3"], "did you mean --rounds?"),
        ([toy.config("rounds = 2.5", "b.py")], "b.py:1: rounds = 2.5 is of type float, wanted int"),
    ]:
        with pytest.raises(SystemExit):
            call(*argv)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("--help")
    assert capsys.readouterr().out.endswith("""
  --seed=1337

Options of the mixers
  --rounds=20             normalisations
  --sharpness=1.5         of the softmax
""")


def test_a_knob_below_its_limit_is_refused():
    config = {"steps": 1, "rounds": 0, "rate": -0.5}
    at_least(config, 1, "steps")
    at_least(config, 0, "steps", "rounds")
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        at_least(config, 1, "steps", "rounds")
    with pytest.raises(ValueError, match="rate must be at least 0, not -0.5"):
        at_least(config, 0, "rate")


def test_as_a_script(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT + "print(max_iters, config['out_dir'], late)\n")
    (tmp_path / "small.py").write_text("max_iters = 2 * 3\n")
    run = lambda *argv: subprocess.run(
        [sys.executable, "toy.py", *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    good, bad, asked = (
        run("small.py", "--out_dir=x"),
        run("small.py", "--max_iter=1"),
        run("--help"),
    )
    assert (good.returncode, good.stdout, good.stderr) == (0, "6 x 7\n", "")
    assert (bad.returncode, bad.stdout) == (2, "") and "did you mean --max_iters?" in bad.stderr
    assert asked.returncode == 0 and "peak, after warmup" in asked.stdout and not asked.stderr


@pytest.mark.parametrize(
    "name, values",
    [
        ("max_iters", st.integers()),
        ("resume", st.booleans()),
        ("out_dir", st.text()),
        ("learning_rate", st.floats(allow_nan=False, allow_infinity=False)),
        ("compile", st.booleans() | st.text()),
        ("seed", st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
        ("run_name", st.none() | st.text()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_repr_round_trip(tmp_path_factory, name, values):
    toy = Toy(tmp_path_factory.mktemp("toy"))

    @given(values)
    def check(value):
        got = toy(f"--{name}={value!r}")
        assert exactly(got) == exactly(DEFAULTS | {name: value})
        assert json.loads(json.dumps(got)) == got

    check()


@given(st.text().filter(lambda text: not set(text) & set("'\"")))
def test_a_text_knob_takes_any_text_without_quotes_as_it_is(tmp_path_factory, text):
    assert Toy(tmp_path_factory.getbasetemp())(f"--out_dir={text}")["out_dir"] == text
