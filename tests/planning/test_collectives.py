"""Collectives read from programs: written by hand, and compiled for eight devices."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from calm_jax.planning import collectives, hlo

MESH = {"slices": 1, "data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 2, 2, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 4)


def members(shape, used):
    """Groups along the axes `used` of a mesh, by walking over its devices."""
    groups = {}
    for device in range(math.prod(shape)):
        coordinates, rest = [], device
        for size in reversed(shape):
            coordinates.append(rest % size)
            rest //= size
        coordinates.reverse()
        fixed = tuple(c for axis, c in enumerate(coordinates) if axis not in used)
        groups.setdefault(fixed, []).append(device)
    return sorted(groups.values())


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    used=st.sets(st.integers(0, 3), min_size=1),
)
def test_three_notations_of_the_same_groups(shape, used):
    used = sorted(axis for axis in used if axis < len(shape)) or [0]
    expected = members(shape, used)
    outside = [axis for axis in range(len(shape)) if axis not in used]
    sizes = ",".join(map(str, shape))
    listed = ",".join("{" + ",".join(map(str, group)) + "}" for group in expected)
    order = ",".join(map(str, [*outside, *used]))
    counted = f"[{len(expected)},{len(expected[0])}]<=[{sizes}]T({order})"
    named = ",".join(f"'axis_{axis}'={size}" for axis, size in enumerate(shape))
    lies = ",".join(f"'axis_{axis}'" for axis in used)
    for text in (f"{{{listed}}}", counted, f"mesh[{named}] {{{lies}}}"):
        found = collectives.replica_groups(f"channel_id=1, replica_groups={text}, use_x=true", 1)
        assert sorted(map(sorted, found)) == expected, text


def test_part_of_an_axis():
    found = collectives.replica_groups("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x=1", 8)
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7]]
    found = collectives.replica_groups("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x=1", 8)
    assert found == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_without_groups_all_take_part():
    assert collectives.replica_groups("channel_id=1, replica_groups={}, x=1", 3) == [[0, 1, 2]]


BY_HAND = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (param_0: bf16[4,8]) -> (bf16[4,8], bf16[8,8], u32[]) {
  %param_0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%param_0), channel_id=7, \
replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %custom.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%go_on (param_0.1: bf16[4,8]) -> bf16[8,8] {
  %param_0.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%param_0.1), channel_id=7, \
replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (input: f32[16]) -> f32[8] {
  %input = f32[16]{0} parameter(0)
  %all-reduce.3 = f32[16]{0} all-reduce(%input), channel_id=2, replica_groups={{0,4},{1,5},{2,6},\
{3,7}}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %part = f32[8]{0} dynamic-slice(%all-reduce.3, %place), dynamic_slice_sizes={8}
}

%body (state: (s32[], bf16[4,8], f32[16])) -> (s32[], bf16[4,8], f32[16]) {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0}, /*index=2*/f32[16]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %x = f32[16]{0} get-tuple-element(%state), index=2
  %gathered.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, \
calls=%start
  %gathered.2 = bf16[8,8]{1,0} fusion(%w), kind=kCustom, calls=%go_on
  %scattered = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16]{0}) tuple(%i, %w, %x)
}

%condition (state.1: (s32[], bf16[4,8], f32[16])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (w.1: bf16[4,8], x.1: f32[16]) -> f32[16] {
  %w.1 = bf16[4,8]{1,0} parameter(0)
  %x.1 = f32[16]{0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %first = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16]{0}) tuple(%one, %w.1, %x.1)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16]{0}) while(%first), condition=%condition, \
body=%body
  %moved = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}) collective-permute-start(%x.1), \
source_target_pairs={{0,0},{1,2},{2,1},{3,3}}
  %alone = f32[16]{0} all-reduce(%x.1), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, \
to_apply=%add
  ROOT %out = f32[16]{0} get-tuple-element(%loop), index=2
}
"""


def test_a_program_by_hand():
    mesh = types.SimpleNamespace(shape=MESH, size=8)
    found = collectives.find(hlo.parse(BY_HAND), mesh)
    # The loop starts at 1 and ends before 5. A gather beside two fusions is one gather.
    assert collectives.totals(found) == [
        {"kind": "all-gather", "axes": ["fsdp"], "runs": 4, "bytes": 4 * 4 * 8 * 2},
        {"kind": "reduce-scatter", "axes": ["data"], "runs": 4, "bytes": 4 * 16 * 4 // 2},
        {"kind": "collective-permute", "axes": ["fsdp", "tensor"], "runs": 1, "bytes": 16 * 4},
    ]


@pytest.mark.parametrize("listed", [True, False])
def test_of_a_conditional_the_larger_branch_runs(listed):
    branches = (
        "branch_computations={%small, %large}"
        if listed
        else "true_computation=%small, false_computation=%large"
    )
    text = f"""\
%small (a: (f32[16], f32[4096])) -> f32[16] {{
  %a = (f32[16]{{0}}, f32[4096]{{0}}) parameter(0)
  %a.1 = f32[16]{{0}} get-tuple-element(%a), index=0
  ROOT %sum.1 = f32[16]{{0}} all-reduce(%a.1), channel_id=1, replica_groups={{}}, to_apply=%add
}}

%large (b: f32[16]) -> f32[16] {{
  %b = f32[16]{{0}} parameter(0)
  %twice = f32[16]{{0}} add(%b, %b)
  ROOT %sum.2 = f32[16]{{0}} all-reduce(%twice), channel_id=2, replica_groups={{}}, to_apply=%add
}}

ENTRY %main (which: s32[], a.2: (f32[16], f32[4096]), b.2: f32[16]) -> f32[16] {{
  %which = s32[] parameter(0)
  %a.2 = (f32[16]{{0}}, f32[4096]{{0}}) parameter(1)
  %b.2 = f32[16]{{0}} parameter(2)
  ROOT %out = f32[16]{{0}} conditional(%which, %a.2, %b.2), {branches}
}}
"""
    found = collectives.find(hlo.parse(text), types.SimpleNamespace(shape=MESH, size=8))
    assert [x.name for x in found] == ["sum.2"]


def test_between_slices_hosts_send():
    text = """\
ENTRY %main (x.1: f32[16]) -> f32[16] {
  %x.1 = f32[16]{0} parameter(0)
  %token = token[] after-all()
  %send = (f32[16]{0}, u32[], token[]) send(%x.1, %token), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %debug = (f32[16]{0}, u32[], token[]) send(%x.1, %token), channel_id=4, is_host_transfer=true
  ROOT %inside = f32[16]{0} all-reduce(%x.1), channel_id=1, replica_groups={{0,1},{2,3}}, \
to_apply=%add
}
"""
    mesh = types.SimpleNamespace(shape={"slices": 2, "data": 1, "fsdp": 2, "tensor": 2}, size=8)
    found = collectives.find(hlo.parse(text), mesh)
    assert [(x.kind, x.axes, x.group, x.bytes) for x in found] == [
        ("all-reduce", ("slices",), (0, 4), 64),
        ("all-reduce", ("tensor",), (0, 1), 64),
    ]


def test_a_compiled_program(mesh):
    """Inside `shard_map` every exchange stands as it is written, so its bytes are known."""

    def inside(x):  # float32 [4, 16] on each device
        def turn(x, _):
            x = x + jax.lax.psum(x, "tensor")
            x = x * jax.lax.all_gather(x, "fsdp").sum(0)
            return x, None

        x, _ = jax.lax.scan(turn, x, None, length=6)
        x = jax.lax.psum(x, ("data", "fsdp"))
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    spec = PartitionSpec(("data", "fsdp", "tensor"))
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    argument = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(mapped).lower(argument).compile().as_text()
    found = collectives.totals(collectives.find(hlo.parse(text), mesh))
    local = 4 * 16 * 4
    assert {(row["kind"], *row["axes"]): (row["runs"], row["bytes"]) for row in found} == {
        ("all-reduce", "tensor"): (6, 6 * local),  # twice half of it
        ("all-gather", "fsdp"): (6, 6 * local),
        ("all-reduce", "data", "fsdp"): (1, 2 * local * 3 // 4),
        ("collective-permute", "data"): (1, local),
    }


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_a_sharded_product(mesh, axis):
    """What the partitioner adds by itself: one sum over the axis that the factors are split by."""
    split = NamedSharding(mesh, PartitionSpec(None, axis))
    rows = NamedSharding(mesh, PartitionSpec(axis, None))
    whole = NamedSharding(mesh, PartitionSpec())
    product = jax.jit(jnp.matmul, in_shardings=(split, rows), out_shardings=whole)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 64), (64, 24))]
    compiled = product.lower(*shapes).compile()
    found = collectives.totals(collectives.find(hlo.parse(compiled.as_text()), mesh))
    assert found == [{"kind": "all-reduce", "axes": [axis], "runs": 1, "bytes": 8 * 24 * 4}]


def test_sizes_of_arrays():
    module = hlo.parse(BY_HAND)
    start = module.computations["main"]["moved"]
    assert [array.shape for array in start.arrays] == [(16,), (16,), ()]
    assert [array.fast for array in start.arrays] == [False, False, True]
    assert np.dtype("float32").itemsize * 32 + 4 == start.bytes
