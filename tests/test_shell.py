"""Commands that are told, against what bash reads."""

import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.shell import command_line


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet="ab=-'\"$!`\\ \n(),é"), max_size=4))
def test_bash_reads_a_command_as_it_was_given(arguments):
    line = command_line("train", *arguments)
    assert "\n" not in line
    code = f"calm() {{ printf '%s\\0' \"$@\"; }}; {line}"
    printed = subprocess.run(["bash", "-c", code], capture_output=True, check=True).stdout
    assert printed.decode().split("\0")[:-1] == ["train", *arguments]


def test_a_command_is_legible():
    arguments = ["--config.augments=('models/a',)", "--config.name=a b", "--workdir=runs/a"]
    assert command_line("train", *arguments) == (
        'calm train --config.augments="(\'models/a\',)" --config.name="a b" --workdir=runs/a'
    )
