"""Bytes that a compiled program moves to and from a chip's main memory in one step."""

import re
from collections.abc import Iterator

from calm_jax.planning.hlo import FREE, Array, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")


def bytes_moved(module: Module) -> int:
    """Bytes read and written by all instructions, except in a chip's fast memory.

    If an operand is only sliced, only the slice counts; if an array is updated in place, only the
    update counts.
    """
    return sum(
        times * _moved(instruction, module, computation)
        for instruction, times, computation, launcher in module.executed()
        if computation == launcher
    )


def _moved(instruction: Instruction, module: Module, computation: str) -> int:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    around = module.computations[computation]
    operands = [around[name] for name in instruction.operands]
    result = list(instruction.arrays)
    if opcode == "fusion":
        return _of_fusion(instruction, operands, module)
    if opcode == "copy-start":
        return _slow(result[:2])
    if opcode == "slice-start":
        moved = result[1]  # the slice; result[0] is the operand, which is not read as a whole
        return moved.bytes * (_is_slow(operands[0]) + (not moved.fast))
    if opcode.endswith("-start"):
        return _slow(result)
    if opcode in _SLICES:
        return _slow(result) + sum(x.bytes for x in result) * _is_slow(operands[0])
    if opcode == "dynamic-update-slice":
        return operands[1].bytes * (1 + (not result[0].fast))
    return _slow(result) + sum(_slow(x.arrays) for x in operands)


def _of_fusion(fusion: Instruction, operands: list[Instruction], module: Module) -> int:
    passed = _passed_through(fusion)
    total = 0
    for number, operand in enumerate(operands):
        if number not in passed and _is_slow(operand):
            total += min(_slow(operand.arrays), _read(fusion, number, module))
    for number, output in enumerate(fusion.arrays):
        if number not in passed.values() and not output.fast:
            total += min(output.bytes, _written(fusion, number, module))
    return total


def _read(fusion: Instruction, number: int, module: Module) -> int:
    """Bytes that a fusion, with the fusions inside it, reads from one of its operands."""
    inside = module.computations[fusion.called("calls")]
    (parameter,) = (
        x for x in inside.values() if x.opcode == "parameter" and int(x.argument) == number
    )
    total = 0
    for use, position in _uses(parameter, inside):
        if use.opcode == "fusion":
            total += _read(use, position, module)
        elif use.opcode in _SLICES and position == 0:
            total += use.bytes
        elif use.opcode != "dynamic-update-slice" or position > 0:
            total += parameter.bytes
    return total


def _written(fusion: Instruction, number: int, module: Module) -> int:
    """Bytes that a fusion writes to one of its outputs; only the update if it is in place."""
    inside = module.computations[fusion.called("calls")]
    root = module.root(fusion.called("calls"))
    made = _through_bitcasts(
        inside[root.operands[number]] if root.opcode == "tuple" else root, inside
    )
    if made.opcode == "fusion":
        return _written(made, 0, module) if len(made.arrays) == 1 else made.bytes
    return inside[made.operands[1]].bytes if made.opcode == "dynamic-update-slice" else made.bytes


def _uses(
    instruction: Instruction, inside: dict[str, Instruction]
) -> Iterator[tuple[Instruction, int]]:
    """The instructions that read `instruction`, directly or through bitcasts; as which operand."""
    for user in inside.values():
        for position, name in enumerate(user.operands):
            if name != instruction.name:
                continue
            if user.opcode == "bitcast":
                yield from _uses(user, inside)
            else:
                yield user, position


def _through_bitcasts(instruction: Instruction, inside: dict[str, Instruction]) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = inside[instruction.operands[0]]
    return instruction


def _passed_through(fusion: Instruction) -> dict[int, int]:
    """Numbers of the operands that are returned unchanged, each with its output's number."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?)\}, [a-z]", fusion.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", listed[1]) if listed else []
    return {int(operand): int(output or 0) for output, operand in pairs}


def _is_slow(instruction: Instruction) -> bool:
    return any(not array.fast for array in instruction.arrays)


def _slow(arrays: list[Array] | tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.fast)
