"""Commands as people type them."""

import shlex


def command_line(*arguments: str) -> str:
    """The `calm` command with these arguments: one line for bash, with few quotes."""
    return " ".join(["calm", *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    if "\n" in argument:
        escaped = argument.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return f"$'{escaped}'"
    flag, equals, value = argument.partition("=")
    if shlex.quote(argument) == argument or not equals or set('"\\$`!') & set(argument):
        return shlex.quote(argument)
    return f'{shlex.quote(flag)}="{value}"'
