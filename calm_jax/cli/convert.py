"""`calm convert`: published checkpoints to frozen folders, and back."""

import ast
from collections.abc import Sequence
from typing import Any

from absl import flags

from calm_jax.cli import config
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu

USAGE = """Turns a published checkpoint into a frozen folder, or back into a Hugging Face one.

  calm convert --source=downloads/Llama-3.2-1B --target=models/anchor --verify
  calm convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --target=models/anchor
  calm convert --source=palm_8k.pt --target=models/palm --dtype=bfloat16 --option=norm_offset=1.0
  calm convert --source=downloads/base --adapter=downloads/lora --target=models/augment
  calm convert --source=models/anchor --target=exported --to=huggingface

SOURCE is a folder of Hugging Face, a T5X or Orbax checkpoint, or a .gguf, .npz, .pt or .safetensors
file, on this machine. TARGET must not exist yet; once it is written, SOURCE is no longer needed.

Families and their options:

"""


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "the checkpoint, or a frozen folder", flag_values=values)
    flags.DEFINE_string("target", None, "the folder to write", flag_values=values)
    flags.DEFINE_string(
        "format", "auto", "family of the checkpoint, one of the above", flag_values=values
    )
    flags.DEFINE_string(
        "dtype",
        None,
        "float32 or bfloat16; default: the smaller one that holds the source exactly (float32 if "
        "the source is quantised)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "adapter", None, "folder of a LoRA adapter of PEFT to merge into SOURCE", flag_values=values
    )
    flags.DEFINE_multi_string(
        "option", [], "NAME=VALUE, an option of the family; repeatable", flag_values=values
    )
    flags.DEFINE_bool(
        "verify",
        False,
        "record logits of fixed prompts in TARGET, and compare them with those of transformers if "
        "it is installed",
        flag_values=values,
    )
    flags.DEFINE_string(
        "to", None, "huggingface: write the frozen folder SOURCE as its models", flag_values=values
    )


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    values, _ = config.parse(argv, USAGE + _families(), _define, required=("source", "target"))

    from calm_jax.checkpoints.convert.conversion import convert
    from calm_jax.checkpoints.convert.export import export

    quiet_libtpu()
    if values.to is None:
        options = _options(values.option)
        convert(
            values.source,
            values.target,
            format=values.format,
            dtype=values.dtype,
            adapter=values.adapter,
            verify=values.verify,
            **options,
        )
    else:
        for name in ("format", "dtype", "adapter", "option", "verify"):
            if values[name].present:
                raise CalmError(f"--{name} has no effect with --to={values.to}")
        export(values.source, values.target, to=values.to)
    print(values.target)
    return 0


def _families() -> str:
    from calm_jax.checkpoints.convert.registry import families

    lines = []
    for family in families().values():
        lines.append(f"  {family.name}")
        lines += [f"    {name}: {text}" for name, text in family.options.items()]
    return "\n".join(lines)


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for option in given:
        name, equals, text = option.partition("=")
        if not equals:
            raise CalmError(f"--option={option} is not NAME=VALUE")
        if name in ("source", "target", "format", "dtype", "adapter", "verify"):
            raise CalmError(f"--option={option} is not an option of a family; give --{name}")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options
