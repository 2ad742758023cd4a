"""The text of a compiled program as instructions, with how often each runs.

XLA's own figures count the body of a loop once; here it counts as often as the loop runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
# These move no data: they name, group or reserve arrays, or their bodies are counted instead.
FREE = {
    "add-dependency", "after-all", "bitcast", "call", "conditional", "constant", "domain",
    "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
    "while",
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = ")
_OPERAND = re.compile(r"%([\w.$-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `fast`: in a memory faster than the main one."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.shape) * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`; `argument` is the text of the operands."""

    name: str
    type: str
    opcode: str
    argument: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_OPERAND.findall(self.argument))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, including those in nested tuples."""
        return tuple(
            Array(
                dtype,
                tuple(int(length) for length in lengths.split(",") if length),
                bool(re.search(r"S\([1-9]", layout or "")),
            )
            for dtype, lengths, layout in _ARRAY.findall(self.type)
        )

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as "calls" names."""
        found = re.search(rf"\b{attribute}=%?([\w.$-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program: its instructions in order, by computation, and the entry's name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction:
        return next(x for x in self.computations[computation].values() if x.is_root)

    def executed(self) -> Iterator[tuple[Instruction, int, str, str]]:
        """Every instruction that runs; in a conditional, the branch that produces most bytes.

        Yields:
            the instruction; how often it runs in a step; the computation that contains it; and the
            computation that launches it, which differs if it is part of a fusion.
        """
        yield from self._walk(self.entry, 1, self.entry)

    def _walk(self, computation: str, times: int, launcher: str):
        for instruction in self.computations[computation].values():
            yield instruction, times, computation, launcher
            opcode = instruction.opcode
            if opcode == "while":
                body = instruction.called("body")
                yield from self._walk(body, times * self.trips(instruction, computation), body)
            elif opcode == "conditional":
                branches = [
                    list(self._walk(branch, times, branch))
                    for branch in _branches(instruction.attributes)
                ]
                yield from max(branches, key=_bytes_made)
            elif opcode == "call":
                called = instruction.called("to_apply")
                yield from self._walk(called, times, called)
            elif opcode in ("fusion", "async-start"):
                yield from self._walk(instruction.called("calls"), times, launcher)

    def trips(self, loop: Instruction, computation: str) -> int:
        """How often a loop runs, from its text or else from its condition `i < limit`."""
        known = re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = loop.called("condition")
        compare = self.root(condition)
        values = [self._value(name, condition, loop, computation) for name in compare.operands]
        if compare.opcode == "fusion":
            called = compare.called("calls")
            numbers = {
                x.name: values[int(x.argument)]
                for x in self.computations[called].values()
                if x.opcode == "parameter"
            }
            compare = self.root(called)
            values = [
                numbers[name] if name in numbers else self._constant(name, called)
                for name in compare.operands
            ]
        start, limit = values if "direction=LT" in compare.attributes else reversed(values)
        if compare.opcode != "compare" or limit is None:
            raise ValueError(f"the text of the loop {loop.name} does not show how often it runs")
        return limit - (start or 0)

    def _value(self, name: str, condition: str, loop: Instruction, outside: str) -> int | None:
        """A scalar of a loop's condition: a constant, or an initial value of the loop."""
        instruction = self.computations[condition][name]
        if instruction.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            start = self.computations[outside][loop.operands[0]]
            return self._constant(start.operands[index], outside) if start.operands else None
        return self._constant(name, condition)

    def _constant(self, name: str, computation: str) -> int | None:
        instruction = self.computations[computation][name]
        if instruction.opcode in ("copy", "bitcast") and instruction.operands:
            return self._constant(instruction.operands[0], computation)
        is_number = instruction.opcode == "constant" and instruction.argument.lstrip("-").isdigit()
        return int(instruction.argument) if is_number else None


def parse(text: str) -> Module:
    """The program of `compiled.as_text()`."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _NAME.match(line)):
            instruction = _instruction(line, found)
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(line: str, found: re.Match) -> Instruction:
    start = found.end()
    end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _balanced(line, opening)
    return Instruction(
        name=found[2],
        type=line[start:end],
        opcode=line[end:opening].strip(),
        argument=line[opening + 1 : closing - 1],
        attributes=line[closing:],
        is_root=bool(found[1]),
    )


def _balanced(line: str, opening: int) -> int:
    """The index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"a parenthesis is not closed in {line[:120]}")


def _bytes_made(executed: list[tuple[Instruction, int, str, str]]) -> int:
    return sum(
        times * instruction.bytes
        for instruction, times, computation, launcher in executed
        if computation == launcher and instruction.opcode not in FREE
    )


def _branches(attributes: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.$-]+)", attributes)


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    return int(re.match(r"(?:bf|[suf])(\d+)", dtype)[1])
