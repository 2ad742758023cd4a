"""`calm convert`: published checkpoints to frozen folders, and back."""

import ast
from collections.abc import Sequence
from typing import Any

from absl import flags

from calm_jax.cli import config, models
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu

USAGE = """Turns a published checkpoint into a frozen folder, and back into a Hugging Face one.

  calm convert --source=downloads/Llama-3.2-1B --target=models/anchor --verify
  calm convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --target=models/anchor
  calm convert --source=palm_8k.pt --target=models/palm --dtype=bfloat16 --option=norm_offset=1.0
  calm convert --source=downloads/base --adapter=downloads/lora --target=models/augment
  calm convert --source=models/anchor --target=exported --to=huggingface
  calm convert --source=runs/mine --target=pair --to=huggingface --augments=exported
  calm convert --source=pair --target=bridge --anchor=models/anchor --augments=models/augment

SOURCE is a folder of Hugging Face, a T5X or Orbax checkpoint, or a .gguf, .npz, .pt or .safetensors
file, on this machine. TARGET must not exist yet; once it is written, SOURCE is no longer needed.

With --to=huggingface, SOURCE is a frozen folder, a composed run or an exported bridge. TARGET of a
bridge holds the bridge and code for PyTorch, and names the Hugging Face models that it joins: those
that anchor and augments were converted from, or --anchor and --augments. Without --to such a folder
becomes an exported bridge again; --anchor and --augments are then the frozen folders.

Families and their options:

"""

OF_A_CHECKPOINT = ("format", "dtype", "adapter", "option", "verify")
OF_A_BRIDGE = ("step", "anchor", "augments")


def _define_flags(define: config.Define) -> None:
    define("string", "source", "the checkpoint, or a frozen folder")
    define("string", "target", "the folder to write")
    define("string", "format", "family of the checkpoint, one of the above", "auto")
    define(
        "string",
        "dtype",
        "float32 or bfloat16; default: the smaller one that holds the source exactly (float32 if "
        "the source is quantised)",
    )
    define("string", "adapter", "folder of a LoRA adapter of PEFT to merge into SOURCE")
    define("multi_string", "option", "NAME=VALUE, an option of the family; repeatable", [])
    define(
        "bool",
        "verify",
        "record logits of fixed prompts in TARGET, and compare them with those of transformers if "
        "it is installed",
        False,
    )
    define("string", "to", "huggingface: write SOURCE for transformers")
    define("integer", "step", "checkpoint of a composed run; default: its best")
    define("string", "anchor", "of a bridge: its anchor's folder, or name on the hub")
    define("list", "augments", "the same for its augments, separated by commas")


def main(argv: list[str]) -> int:
    usage = USAGE + _families()
    values, _ = config.parse(argv, usage, _define_flags, required=("source", "target"))

    from calm_jax.checkpoints.convert.conversion import convert
    from calm_jax.checkpoints.huggingface.importing import import_bridge
    from calm_jax.checkpoints.kinds import PYTORCH_BRIDGE

    quiet_libtpu()
    if values.to is None and _kind(values.source) == PYTORCH_BRIDGE:
        _refuse(values, (*OF_A_CHECKPOINT, "step"), f"for {PYTORCH_BRIDGE}")
        for name in ("anchor", "augments"):
            if not values[name].value:
                raise CalmError(f"--{name} is missing: frozen folders of what the bridge joins")
        import_bridge(values.source, values.target, **models.moved(values))
    elif values.to is None:
        _refuse(values, OF_A_BRIDGE, "without --to=huggingface")
        convert(
            values.source,
            values.target,
            format=values.format,
            dtype=values.dtype,
            adapter=values.adapter,
            verify=values.verify,
            **_options(values.option),
        )
    else:
        _refuse(values, OF_A_CHECKPOINT, f"with --to={values.to}")
        _export(values)
    print(values.target)
    return 0


def _export(values: flags.FlagValues) -> None:
    from calm_jax.checkpoints.composed import export_bridge
    from calm_jax.checkpoints.convert.export import export
    from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN

    if _kind(values.source) in (BRIDGE, COMPOSED_RUN):
        given = {name: values[name].value for name in OF_A_BRIDGE}
        export_bridge(values.source, values.target, to=values.to, **given)
    else:
        _refuse(values, OF_A_BRIDGE, f"for {values.source}, which is no bridge")
        export(values.source, values.target, to=values.to)


def _kind(source: str) -> str | None:
    """The kind of a folder with a config.json."""
    from calm_jax.checkpoints.files import absolute, read_json
    from calm_jax.checkpoints.kinds import kind_of

    path = absolute(source) / "config.json"
    return kind_of(read_json(path, "a model")) if path.exists() else None


def _refuse(values: flags.FlagValues, names: Sequence[str], where: str) -> None:
    for name in names:
        if values[name].present:
            raise CalmError(f"--{name} has no effect {where}")


def _families() -> str:
    from calm_jax.checkpoints.convert.registry import FAMILIES

    lines = []
    for family in FAMILIES.values():
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
