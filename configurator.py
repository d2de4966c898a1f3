"""
Command line and config files override the commented globals at the top of a script.

    learning_rate = 6e-4  # peak, after warmup
    compile: bool | str = "blocks"  # an annotation widens what a knob takes

    from configurator import configure
    config = configure(globals())

    python train.py config/tbp.py --learning_rate=3e-4  # left to right, the last word wins
    python train.py --help                              # every knob, its default and its comment

A config file is Python and runs as code: read it first.
"""

import ast
import contextlib
import difflib
import io
import os
import re
import sys
import tokenize
import traceback
from pathlib import Path
from types import ModuleType, NoneType
from typing import NamedTuple, NoReturn

TYPES = {"bool": bool, "int": int, "float": float, "str": str, "None": NoneType}


class Knob(NamedTuple):
    types: tuple[type, ...]
    comment: str  # the one behind the assignment
    above: list[str]  # lines that --help prints before the knob: empty ones and headings


def configure(
    namespace: dict,
    argv: list[str] | None = None,
    config_of: str | None = None,
    extra: dict | None = None,
) -> dict:
    """Set the knobs of a script from the command line: its assignments above this call are the
    knobs, and `namespace` is its globals().

    Returns all knobs in source order. An item of `argv` (default: `sys.argv[1:]`) is `--key=value`
    or a config file `path/to/file.py`, whose globals are the values so far.

    config_of: another script in the same folder, for which the config files are written. They may
        set its knobs as well; these values are checked, and then left out.
    extra: more knobs by name, the options of the mixers: objects with a `default` and a `comment`.

    Raises SystemExit(2), with a message on stderr and `namespace` as it was, for an item that is no
    knob or a value that does not fit; SystemExit(0) after `--help`; KeyError where `namespace` has
    no `__file__`.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = os.path.basename(namespace["__file__"])
    knobs = _read_knobs(namespace)
    values = {name: _fit(script, name, namespace[name], knob) for name, knob in knobs.items()}
    heading = ["", "Options of the mixers"]
    for name, option in (extra or {}).items():
        knobs[name] = Knob((type(option.default),), option.comment, heading)
        values[name] = option.default
        heading = []  # only above the first
    if "--help" in argv or "-h" in argv:
        try:
            _print_help(namespace.get("__doc__"), knobs, values)
            sys.stdout.flush()
        except BrokenPipeError:  # `--help | head`: what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)

    # A config file may set our knobs and those of `config_of`, whose values are `other`.
    known, other = knobs, {}
    if config_of:
        constants = _constants(Path(namespace["__file__"]).with_name(config_of))
        known = _read_knobs(constants) | knobs
        other = {name: constants[name] for name in known if name in constants}
    for item in argv:
        key, equals, _ = item.partition("=")
        if item.startswith("--"):
            name, value = _read_argument(item, script, knobs, values)
            values[name] = value
        elif equals and key.lstrip("-").isidentifier():
            _refuse(f"{item}: write --{item.lstrip('-')}")
        elif item.endswith(".py"):
            other |= _run_config(item, other | values, known, namespace["__file__"])
            values |= {name: other[name] for name in knobs}
        else:
            _refuse(
                f"{item!r} is neither --key=value nor a config file path/to/file.py; {script} "
                "--help lists the keys"
            )
    namespace.update(values)
    return values


def _read_argument(item: str, script: str, knobs: dict[str, Knob], values: dict) -> tuple:
    """--key=value -> the name of the knob and its value, or the refusal."""
    key, equals, text = item.partition("=")
    name = key.removeprefix("--")
    if name not in knobs:
        near = _nearest(name, knobs, "--")
        _refuse(f"{key}: {script} has no such knob{near}; {script} --help lists them")
    if not equals:
        example = f"{key}={values[name]}"
        _refuse(f"{key} has no value: write {key}=value in one word, for example {example}")
    value = _parse(text, knobs[name].types)
    return name, _fit("command line", name, value, knobs[name])


def resolve(script: Path, argv: list[str], extra: dict | None = None) -> dict:
    """The knobs that `script` would have with `argv`, found without running it; see `configure`."""
    return configure(_constants(script), argv, extra=extra)


def at_least(config: dict, least: int, *names: str) -> None:
    """Raises ValueError for a knob of these names that is below `least`."""
    for name in names:
        if config[name] < least:
            raise ValueError(f"{name} must be at least {least}, not {config[name]}")


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def _nearest(name: str, knobs: dict[str, Knob], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, knobs, 1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def _read_knobs(namespace: dict) -> dict[str, Knob]:
    """The knobs by name. Only the source has their comments, annotations and headings."""
    with tokenize.open(namespace["__file__"]) as file:
        source = file.read()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines, knobs, end = source.split("\n"), {}, 0
    for node in ast.parse(source).body:
        calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        if calls & {"configure", "configurator.configure"}:
            break
        between = lines[end : node.lineno - 1]  # the lines since the statement before
        end = node.end_lineno
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        above = _lines_above(between)
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        for name in _bound(node):
            default = namespace.get(name, ...)  # no knob has ... for its default
            types = _types(annotation, default)
            if types and not name.startswith("_"):
                knobs.setdefault(name, Knob(types, comments.get(end, ""), above))
                above = []
    return knobs


def _lines_above(between: list[str]) -> list[str]:
    """Source lines before an assignment -> what --help prints there: headings from comments."""
    headings = [line.strip("#-= ") for line in between if line.startswith("#")]
    if not headings and "" not in between:
        return []
    return ["", *filter(None, headings)]


def _types(annotation: str, default: object) -> tuple[type, ...]:
    """What a knob takes: the types of its annotation, else of its default; () if it is no knob."""
    if type(default) not in TYPES.values():
        return ()
    words = annotation.split(" | ")
    if all(word in TYPES for word in words):
        types = tuple(TYPES[word] for word in words)
    else:
        types = (type(default),)
    return () if types == (NoneType,) else types  # None alone could never be changed


def _constants(script: Path) -> dict:
    """Run only those assignments of the script that call nothing -> its namespace, with knobs."""
    namespace = {"__file__": str(script)}
    for node in ast.parse(script.read_bytes()).body:
        calls = any(isinstance(child, ast.Call) for child in ast.walk(node))
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and not calls:
            with contextlib.suppress(NameError):  # of an import, which was not run
                exec(compile(ast.Module([node], []), script, "exec"), namespace)
    return namespace


def _bound(tree: ast.AST) -> dict[str, int]:
    """The names that assignments, imports and definitions under `tree` bind, with their lines."""
    names = {}
    for node in ast.walk(tree):
        # A name that is read has another ctx; an import or a definition has none.
        if isinstance(getattr(node, "ctx", ast.Store()), ast.Store):
            for field in ("id", "name", "asname"):
                if name := getattr(node, field, None):
                    names[name] = node.lineno
    return names


def _parse(text: str, types: tuple[type, ...]) -> object:
    if bool in types and text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    # --run_name=12 needs no quotes where the knob takes only text; a knob bool | str refuses 12.
    only_text = set(types) <= {str, NoneType}
    return text if only_text and type(value) not in types else value


def _fit(where: str, name: str, value: object, knob: Knob) -> object:
    """`value` as one of the knob's types, or the refusal."""
    if type(value) in knob.types:  # exactly: a bool is no int, a numpy float is not JSON
        return value
    if float in knob.types and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if int in knob.types and type(value) is float and value.is_integer():  # 6e5
        return int(value)
    wanted = " | ".join(word for word, kind in TYPES.items() if kind in knob.types)
    comment = f"\n    {name}: {knob.comment}" if knob.comment else ""
    kind = type(value).__name__
    _refuse(f"{where}: {name} = {value!r} is of type {kind}, wanted {wanted}{comment}")


def read_source(path: str, script: str) -> bytes:
    """The content of a config file or a study, or the refusal. `script` lies beside config/."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        there = sorted(map(os.path.relpath, Path(script).parent.glob("config/**/*.py")))
        names = difflib.get_close_matches(Path(path).stem, [Path(file).stem for file in there])
        near = [file for file in there if Path(file).stem in names]
        _refuse(f"{path}: no such file; there are: {', '.join(near or there) or 'none'}")
    except OSError as error:
        _refuse(f"{path}: {error.strerror}")


def is_study(source: bytes) -> bool:
    """Whether a file sets a name that only a study has (study.py), and no config file."""
    return re.search(rb"^(question|decision|arms)\b.*=", source, re.MULTILINE) is not None


def run_file(path: str, source: bytes, values: dict) -> dict:
    """Run a config file or a study -> its globals, which begin as `values`, or the refusal."""
    try:
        code = compile(source, path, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: Python 3.10 on null bytes
        line = getattr(error, "lineno", None) or 1
        _refuse(f"{path}:{line}: SyntaxError: {getattr(error, 'msg', error)}")
    scope = {"__name__": "config", "__file__": path} | values
    try:
        exec(code, scope)
    except (Exception, SystemExit) as error:
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == path
        ]
        _refuse(f"{path}:{lines[-1]}: {traceback.format_exception_only(error)[-1].strip()}")
    return scope


def _run_config(path: str, values: dict, knobs: dict[str, Knob], script: str) -> dict:
    """Run the config file at `path` -> the knobs as it leaves them, or the refusal."""
    source = read_source(path, script)
    if is_study(source):
        _refuse(f"{path} is a study, not a config file; to run it: python study.py {path}")
    scope = run_file(path, source, values)
    lines, result = _bound(ast.parse(source)), {}
    for name, value in scope.items():
        where = f"{path}:{lines[name]}" if name in lines else path
        if name in knobs:
            result[name] = _fit(where, name, value, knobs[name])
        elif not name.startswith("_") and not isinstance(value, ModuleType):
            script = os.path.basename(script)
            _refuse(
                f"{where}: {script} has no knob {name!r}{_nearest(name, knobs)}; {script} --help "
                "lists them, and a name of the file's own starts with _"
            )
    return result


def _print_help(doc: str | None, knobs: dict[str, Knob], values: dict) -> None:
    if doc:
        print(doc.strip(), end="\n\n")
    print("Knobs (the same names, without --, in a config file), their defaults and what they do:")
    shown = {name: f"  --{name}={value!r}" for name, value in values.items()}
    width = max(map(len, shown.values()), default=0)
    for name, knob in knobs.items():
        for line in knob.above:
            print(line)
        print(f"{shown[name]:{width}}  {knob.comment}".rstrip())
