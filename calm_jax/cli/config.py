"""Parses what follows a command: its flags, and keys of a config set by `--config.KEY=VALUE`."""

import difflib
import importlib.util
import keyword
import pathlib
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from calm_jax.errors import CalmError
from calm_jax.training.config_keys import flatten, to_dict, unknown_key

OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
Define = Callable[..., None]  # (kind, name, help, default=None, **options): defines a flag


def parse(
    argv: Sequence[str],
    usage: str,
    define_flags: Callable[[Define], None],
    *,
    required: Sequence[str] = (),
    load_config: Callable[[flags.FlagValues], ConfigDict] | None = None,
) -> tuple[flags.FlagValues, ConfigDict | None]:
    """Parses a command's arguments into flags of its own, which other commands do not share.

    Args:
        argv: what follows the command's name.
        usage: the text of --help before the list of flags.
        define_flags: defines the flags.
        required: names of flags that must be given.
        load_config: takes the flags and returns the config that `--config.KEY=VALUE` changes;
            without it such arguments are errors.

    Returns:
        the flags, and the config or None.

    Raises:
        CalmError: an unknown argument, named with the nearest known one; a required flag that is
            missing.
        SystemExit: --help was given and has been printed.
    """
    values = flags.FlagValues()

    def define(kind: str, name: str, help: str, default: Any = None, **options: Any) -> None:
        getattr(flags, f"DEFINE_{kind}")(name, default, help=help, flag_values=values, **options)

    define("bool", "help", "show this", False)
    define_flags(define)
    values.set_gnu_getopt(True)
    try:
        rest = values(["calm", *argv], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        raise CalmError(_first_line(error)) from None
    if values.help:
        print(usage + "\n\n" + _describe(values, load_config))
        raise SystemExit(0)
    _refuse([a for a in rest if load_config is None or not _may_be_override(a)], values)
    for name in required:
        if values[name].value in (None, ""):
            raise CalmError(f"--{name} is missing")
    if load_config is None:
        return values, None
    return values, override(load_config(values), rest)


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Sets keys of the config by arguments `--config.KEY=VALUE`, then locks it.

    Raises:
        CalmError: an unknown key, named with the nearest known one; a value of another type; any
            other argument.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    keys = _keys(config)
    arguments = _last_of_each(arguments)
    for argument in arguments:
        match = OVERRIDE.match(argument)
        if not match:
            continue
        name, outer = match[1], match[1].partition("[")[0]
        has_sections = any(key.startswith((f"{outer}.", f"{outer}[")) for key in keys)
        # The items of a list of plain values are not keys.
        if (name if has_sections else outer) not in keys:
            raise unknown_key(name, keys)
    arguments = ["calm", *map(_quote_keywords, arguments)]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        rest = values(arguments, known_only=True)[1:]
    except flags.Error as error:
        raise CalmError(_first_line(error).split(". ")[0]) from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # For a key within a list, such as data.train[4].weight, the error only says "out of range".
        raise CalmError(f"{' '.join(arguments[1:])}: {_first_line(error)}") from None
    _refuse(rest)
    return values.config


def load_file(file: str) -> ConfigDict:
    """The config that a Python file's `get_config()` returns; FILE:NAME calls `get_config("NAME")`.

    Raises:
        CalmError: as `call_file`.
    """
    return call_file(file, "get_config", ConfigDict)


def call_file(file: str, function: str, result: type) -> Any:
    """What a function of a Python file returns, a `result`; FILE:NAME calls it with "NAME".

    Raises:
        CalmError: there is no such file or function, it fails, or it returns something else; the
            message names the line.
    """
    path, _, name = file.partition(":")
    if not pathlib.Path(path).is_file():
        raise CalmError(f"--config={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("calm_config", path)
    if spec is None:
        raise CalmError(f"--config={path} is not a Python file")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, function)(*([name] if name else []))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == spec.origin]  # fmt: skip
        line = f":{lines[-1]}" if lines else ""
        raise CalmError(
            f"--config={path}{line}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(found, result):
        raise CalmError(f"--config={path}: {function}() returns {type(found).__name__}")
    return found


def _keys(config: ConfigDict) -> list[str]:
    """All dotted keys, including those of sections and of items in lists of sections."""
    keys = []
    for key, value in flatten(config).items():
        parts = key.split(".")
        keys += [".".join(parts[: end + 1]) for end in range(len(parts))]
        for number, section in enumerate(value if isinstance(value, tuple) else ()):
            if isinstance(section, ConfigDict):
                keys += [f"{key}[{number}].{inner}" for inner in flatten(section)]
    return list(dict.fromkeys(keys))


def _last_of_each(arguments: Sequence[str]) -> list[str]:
    """The last argument for each key; if a tuple's key is set twice, its flag would append."""
    joined = []  # `--config.KEY VALUE` as one
    for argument in arguments:
        if joined and OVERRIDE.fullmatch(joined[-1]) and not argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return list({argument.split("=")[0]: argument for argument in joined}.values())


def _quote_keywords(argument: str) -> str:
    """Rewrites `--config.decoder.from=X` so that it parses as Python, where `from` is a keyword."""
    flag, equals, value = argument.partition("=")
    if not OVERRIDE.match(flag):
        return argument
    start, *names = flag.split(".")
    names = [f'["{name}"]' if keyword.iskeyword(name) else f".{name}" for name in names]
    return start + "".join(names) + equals + value


def _may_be_override(argument: str) -> bool:
    """Whether it may set a key; without a dash it may be the VALUE of `--config.KEY VALUE`."""
    return bool(OVERRIDE.match(argument)) or not argument.startswith("-")


def _refuse(arguments: Sequence[str], known: Iterable[str] = ()) -> None:
    """Raises `CalmError` for the first argument, with the nearest of the flags `known`."""
    for argument in arguments:
        if not argument.startswith("-"):
            raise CalmError(f"unexpected argument {argument!r}; every argument is a --flag=value")
        flag = argument.split("=")[0].lstrip("-")
        nearest = difflib.get_close_matches(flag, list(known), n=1)
        hint = f"did you mean --{nearest[0]}?" if nearest else "--help lists the flags"
        raise CalmError(f"unknown flag --{flag}; {hint}")


def _describe(values: flags.FlagValues, load_config) -> str:
    lines = ["Flags:"]
    for name in values:
        default = values[name].default
        shown = "" if default in (None, False, []) else f" (default: {default})"
        lines.append(f"  --{name}: {values[name].help}{shown}")
    if "config" in values and load_config is not None:
        lines.append("  --config.KEY=VALUE: set one key of the config; repeatable")
        if values.config is not None:
            lines += ["", f"Keys of {values.config}, with their values:"]
            config = flatten(to_dict(load_config(values)))
            lines += [f"  --config.{key}={value!r}" for key, value in config.items()]
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
