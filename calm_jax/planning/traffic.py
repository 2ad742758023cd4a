"""Bytes that a compiled program moves to and from a chip's main memory in one step."""

import re

from calm_jax.planning.hlo import FREE, Array, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")


def bytes_moved(module: Module) -> int:
    """Reads and writes of all instructions; what stays in a chip's fast memory is not counted.

    Of an operand that is only sliced, the slice counts; of one that is updated in place, the
    update.
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
        moved = result[1]  # the result stands after the operand, which is not read as a whole
        return moved.bytes * (_is_slow(operands[0]) + (not moved.fast))
    if opcode.endswith("-start"):
        return _slow(result)
    if opcode in _SLICES:
        return _slow(result) + sum(x.bytes for x in result) * _is_slow(operands[0])
    if opcode == "dynamic-update-slice":
        return operands[1].bytes * (1 + (not result[0].fast))
    return _slow(result) + sum(_slow(x.arrays) for x in operands)


def _of_fusion(fusion: Instruction, operands: list[Instruction], module: Module) -> int:
    inside = module.computations[fusion.called("calls")]
    users: dict[str, list[Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    parameters = {int(x.argument): x for x in inside.values() if x.opcode == "parameter"}
    passed = _passed_through(fusion)
    total = 0
    for number, operand in enumerate(operands):
        if number in passed:
            continue
        uses = _uses(parameters[number], users)
        if uses and all(use.opcode in _SLICES for use in uses):
            total += sum(use.bytes for use in uses) * _is_slow(operand)
        elif not (uses and all(_updates(use, parameters[number], inside) for use in uses)):
            total += _slow(operand.arrays)
    outputs = list(fusion.arrays)
    root = module.root(fusion.called("calls"))
    roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(outputs):
        return total + _slow(outputs)
    for number, (made, output) in enumerate(zip(roots, outputs, strict=True)):
        if number in passed.values() or output.fast:
            continue
        made = _through_bitcasts(made, inside)
        is_update = made.opcode == "dynamic-update-slice"
        total += inside[made.operands[1]].bytes if is_update else output.bytes
    return total


def _uses(instruction: Instruction, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """Instructions that read it, seen through what moves nothing."""
    found = []
    for user in users.get(instruction.name, []):
        found += _uses(user, users) if user.opcode == "bitcast" else [user]
    return found


def _updates(use: Instruction, parameter: Instruction, inside: dict[str, Instruction]) -> bool:
    if use.opcode != "dynamic-update-slice":
        return False
    return _through_bitcasts(inside[use.operands[0]], inside) is parameter


def _through_bitcasts(instruction: Instruction, inside: dict[str, Instruction]) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = inside[instruction.operands[0]]
    return instruction


def _passed_through(fusion: Instruction) -> dict[int, int]:
    """Operands that come out again as they are, and as which output."""
    listed = re.search(r"output_to_operand_aliasing=\{(.*?)\}, [a-z]", fusion.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", listed[1]) if listed else []
    return {int(operand): int(output or 0) for output, operand in pairs}


def _is_slow(instruction: Instruction) -> bool:
    return any(not array.fast for array in instruction.arrays)


def _slow(arrays: list[Array] | tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.fast)
