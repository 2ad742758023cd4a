"""What the chips of a mesh send each other in one step: kind, mesh axes, bytes."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from calm_jax.planning.hlo import Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction with which chips exchange data."""

    name: str
    kind: str  # one of `KINDS`
    axes: tuple[str, ...]  # mesh axes along which the members of a group differ
    group: tuple[int, ...]  # positions in the mesh of the first group's chips
    times: int  # how often it runs in a step
    bytes: float  # what each chip sends in all runs together, with the best algorithm on a ring


def find(module: Module, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Every collective of a program compiled for a mesh, except those within one chip."""
    found = []
    for instruction, times, computation, _ in module.executed():
        if instruction.opcode == "send":
            operand = module.computations[computation][instruction.operands[0]]
            found += _between_slices(instruction, times, operand.bytes, mesh)
            continue
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        inside = module.computations[computation]
        if "chain_id=" in instruction.attributes and not _starts(inside):
            continue  # an exchange that overlaps several fusions is written in each of them
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups = _groups(instruction, mesh)
        if len(groups[0]) == 1:
            continue
        operands = [inside[name] for name in instruction.operands]
        sent = _sent(kind, sum(operand.bytes for operand in operands), len(groups[0]))
        axes = _axes(groups, mesh)
        found.append(
            Collective(instruction.name, kind, axes, tuple(groups[0]), times, times * sent)
        )
    return found


def totals(found: Sequence[Collective]) -> list[dict]:
    """Runs, and bytes that each chip sends in a step, by kind and axes; most bytes first."""
    table = collections.defaultdict(lambda: [0, 0.0])
    for collective in found:
        row = table[collective.kind, collective.axes]
        row[0] += collective.times
        row[1] += collective.bytes
    rows = [
        {"kind": kind, "axes": list(axes), "runs": runs, "bytes": round(sent)}
        for (kind, axes), (runs, sent) in table.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _starts(computation: dict[str, Instruction]) -> bool:
    """Whether a fusion starts an exchange that further fusions continue."""
    return any("AsyncCollectiveStart" in x.attributes for x in computation.values())


def _between_slices(
    send: Instruction, times: int, operand_bytes: int, mesh: jax.sharding.Mesh
) -> list[Collective]:
    """What a chip sends to its host, which exchanges it with the hosts of other slices."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    slices = mesh.shape["slices"]
    if not found or slices == 1:
        return []
    kind = found[1].lower().replace("_", "-")
    kind = kind if kind in KINDS else "collective-permute"
    group = tuple(range(0, mesh.size, mesh.size // slices))
    sent = _sent(kind, operand_bytes, slices)
    return [Collective(send.name, kind, ("slices",), group, times, times * sent)]


def _sent(kind: str, operand_bytes: int, size: int) -> float:
    """Bytes that each of `size` chips sends, given the bytes of its operand."""
    return (
        operand_bytes
        * {
            "all-gather": size - 1,
            "reduce-scatter": (size - 1) / size,
            "all-reduce": 2 * (size - 1) / size,
            "all-to-all": (size - 1) / size,
            "collective-permute": 1,
        }[kind]
    )


def _groups(instruction: Instruction, mesh: jax.sharding.Mesh) -> list[list[int]]:
    """Groups of positions in the mesh; for a permutation, its pairs."""
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    if pairs:
        listed = _listed(pairs[1])
        return [pair for pair in listed if pair[0] != pair[1]] or [[0]]
    return replica_groups(text, mesh.size)


def replica_groups(text: str, size: int) -> list[list[int]]:
    """The groups in an instruction's attributes; without any, all `size` chips are one group.

    XLA has three notations. `{{0,2},{1,3}}` lists them. `[2,2]<=[2,2]T(1,0)` numbers the chips in
    one shape, transposes it and cuts it into rows. `mesh['a'=2,'b'=4] {'b'}` names a mesh of its
    own and the axes that a group spans, whole or in part: `'b':(1)2` is the part of `b` of size 2
    that follows a part of size 1.
    """
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if listed:
        return _listed(listed[1])
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if counted:
        shape = [int(x) for x in counted[3].split(",")]
        order = [int(x) for x in counted[4].split(",")] if counted[4] else range(len(shape))
        numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return numbers.reshape(int(counted[1]), int(counted[2])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"?\{([^}]*)\}",
        text,
    )
    if named:
        return _of_named_axes(*named.groups())
    return [list(range(size))]


def _of_named_axes(axes: str, order_shape: str | None, order: str | None, used: str):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: [(size, False)] for name, size in sizes.items()}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        whole, first = sizes[name], int(before or 1)
        taken = int(part) if part else whole
        cuts = [(first, False), (taken, True), (whole // (first * taken), False)]
        parts[name] = cuts if part else [(whole, True)]
    flat = [cut for name in sizes for cut in parts[name]]
    numbers = np.arange(math.prod(sizes.values()))
    if order_shape:
        numbers = numbers.reshape([int(x) for x in order_shape.split(",")])
        numbers = numbers.transpose([int(x) for x in order.split(",")]) if order else numbers
    numbers = numbers.reshape([size for size, _ in flat])
    inside = [axis for axis, (_, taken) in enumerate(flat) if taken]
    outside = [axis for axis, (_, taken) in enumerate(flat) if not taken]
    length = math.prod(flat[axis][0] for axis in inside)
    return numbers.transpose([*outside, *inside]).reshape(-1, length).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    moved = set()
    for group in groups:
        positions = np.stack(np.unravel_index(group, shape))
        moved |= set(np.flatnonzero((positions != positions[:, :1]).any(axis=1)).tolist())
    return tuple(name for number, name in enumerate(mesh.shape) if number in moved)


def _listed(text: str) -> list[list[int]]:
    return [[int(x) for x in inner.split(",")] for inner in re.findall(r"\{([\d,]+)\}", text)]
