"""Command line and config files override the commented globals at the top of a script.

    learning_rate = 6e-4  # peak, after warmup
    compile: bool | str = "blocks"  # an annotation widens what a knob takes

    from configurator import configure
    config = configure(globals())

    python train.py config/tbp.py --learning_rate=3e-4  # left to right, the last word wins
    python train.py --help                              # every knob, its default and its comment

A config file is Python and can run any code: use none that you have not read.
"""

import ast
import contextlib
import difflib
import io
import os
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
    above: list[str]  # lines of --help before the knob: an empty one and headings, where there are


def configure(
    namespace: dict,
    argv: list[str] | None = None,
    config_of: str | None = None,
    extra: dict | None = None,
) -> dict:
    """Set the knobs that the script of `namespace` assigns above this call from `argv`.

    Returns all knobs in source order. An item of `argv` (default: `sys.argv[1:]`) is `--key=value`
    or a config file `path/to/file.py`, which sees the values so far as its globals.

    config_of: a script in the same folder, for which the config files are written: they may set its
        knobs too, which are checked and then left out.
    extra: more knobs by name, the options of the mixers: objects with a `default` and a `comment`.

    Raises SystemExit(2), with a message on stderr and `namespace` as it was, for whatever is not a
    knob or does not fit one; SystemExit(0) after `--help`; KeyError without a `__file__`.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = os.path.basename(namespace["__file__"])
    knobs = _read_knobs(namespace)
    values = {name: _fit(script, name, namespace[name], knob) for name, knob in knobs.items()}
    for name, option in (extra or {}).items():
        heading = [] if knobs.keys() & extra.keys() else ["", "Options of the mixers"]
        knobs[name] = Knob((type(option.default),), option.comment, heading)
        values[name] = option.default
    if "--help" in argv or "-h" in argv:
        _print_help(namespace.get("__doc__"), knobs, values)
        raise SystemExit(0)

    # Knobs that config files may set: ours, and those of `config_of`, whose values are `other`.
    other = _constants(Path(namespace["__file__"]).with_name(config_of)) if config_of else {}
    known = (_read_knobs(other) if config_of else {}) | knobs
    other = {name: other[name] for name in known if name in other}
    for item in argv:
        key, equals, text = item.partition("=")
        name = key[2:]
        if item.startswith("--"):
            if name not in knobs:
                near = _nearest(name, knobs, "--")
                _refuse(f"{key}: {script} has no such knob{near}; --help lists them")
            if not equals:
                example = f"{key}={values[name]}"
                _refuse(f"{key} has no value: write {key}=value in one word, for example {example}")
            value = _parse(text, knobs[name].types)
            values[name] = _fit("command line", name, value, knobs[name])
        elif equals and key.lstrip("-").isidentifier():
            _refuse(f"{item}: write --{item.lstrip('-')}")
        elif item.endswith(".py"):
            other |= _run_config(item, other | values, known, namespace["__file__"])
            values |= {name: other[name] for name in knobs}
        else:
            _refuse(
                f"{item!r} is neither --key=value nor a config file path/to/file.py; --help lists "
                "the keys"
            )
    namespace.update(values)
    return values


def resolve(script: Path, argv: list[str], extra: dict | None = None) -> dict:
    """The knobs that `script` would have if it ran with `argv`; see `configure`. Runs nothing."""
    return configure(_constants(script), argv, extra=extra)


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
    knobs, end = {}, 0
    for node in ast.parse(source).body:
        calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        if calls & {"configure", "configurator.configure"}:
            break
        between, end = source.split("\n")[end : node.lineno - 1], node.end_lineno
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        headings = [line.strip("#-= ") for line in between if line.startswith("#")]
        above = ["", *filter(None, headings)] if headings or "" in between else []
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        for name in _bound(node):
            types = _types(annotation, namespace.get(name, ...))
            if types and not name.startswith("_"):
                knobs.setdefault(name, Knob(types, comments.get(end, ""), above))
                above = []
    return knobs


def _types(annotation: str, default: object) -> tuple[type, ...]:
    """What a knob takes: the types of its annotation, else of its default; () if it is no knob."""
    if type(default) not in TYPES.values():
        return ()
    words = annotation.split(" | ")
    if all(word in TYPES for word in words):
        types = tuple(TYPES[word] for word in words)
    else:
        types = (type(default),)
    return () if types == (NoneType,) else types  # which could never be set


def _constants(script: Path) -> dict:
    """The namespace of the script after its assignments that call nothing: it has the knobs."""
    namespace = {"__file__": str(script)}
    for node in ast.parse(script.read_bytes()).body:
        calls = any(isinstance(child, ast.Call) for child in ast.walk(node))
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and not calls:
            with contextlib.suppress(NameError):  # of an import
                exec(compile(ast.Module([node], []), script, "exec"), namespace)
    return namespace


def _bound(tree: ast.AST) -> dict[str, int]:
    """The names that assignments, imports and definitions under `tree` bind, with their lines."""
    names = {}
    for node in ast.walk(tree):
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
    # --run_name=12 needs no quotes where only text is wanted; a bool | str refuses the int
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


def _run_config(path: str, values: dict, knobs: dict[str, Knob], script: str) -> dict:
    """The knobs as the config file at `path` leaves them, or the refusal."""
    try:
        source = Path(path).read_bytes()
        code = compile(source, path, "exec")
    except FileNotFoundError:
        there = sorted(os.path.relpath(file) for file in Path(script).parent.glob("config/*.py"))
        _refuse(f"{path}: no such config file; there are: {', '.join(there) or 'none'}")
    except OSError as error:
        _refuse(f"{path}: {error.strerror}")
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

    lines, result = _bound(ast.parse(source)), {}
    for name, value in scope.items():
        where = f"{path}:{lines[name]}" if name in lines else path
        if name in knobs:
            result[name] = _fit(where, name, value, knobs[name])
        elif not name.startswith("_") and not isinstance(value, ModuleType):
            _refuse(
                f"{where}: {os.path.basename(script)} has no knob {name!r}{_nearest(name, knobs)}; "
                "--help lists them, and a name of the file's own starts with _"
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
