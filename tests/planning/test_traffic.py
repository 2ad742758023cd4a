"""Bytes moved to and from memory, for a program small enough to count by hand."""

from calm_jax.planning import hlo, traffic

PROGRAM = """\
HloModule jit_step

%add_rows (p0: f32[10,64], p1: f32[64], p2: s32[]) -> f32[64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = f32[64]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%p0, %p2, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  ROOT %sum = f32[64]{0} add(%flat, %p1)
}

%put_row (q0: f32[10,64], q1: f32[64], q2: s32[]) -> f32[10,64] {
  %q0 = f32[10,64]{1,0} parameter(0)
  %q1 = f32[64]{0} parameter(1)
  %q2 = s32[] parameter(2)
  %one = f32[1,64]{1,0} bitcast(%q1)
  %none = s32[] constant(0)
  ROOT %put = f32[10,64]{1,0} dynamic-update-slice(%q0, %one, %q2, %none)
}

ENTRY %main (w: f32[10,64], x: f32[64], i: s32[]) -> f32[10,64] {
  %w = f32[10,64]{1,0} parameter(0)
  %x = f32[64]{0} parameter(1)
  %i = s32[]{:S(4)} parameter(2)
  %y = f32[64]{0} fusion(%w, %x, %i), kind=kLoop, calls=%add_rows
  %near = f32[64]{0:S(1)} negate(%y)
  %nearer = f32[64]{0:S(1)} exponential(%near)
  ROOT %z = f32[10,64]{1,0} fusion(%w, %nearer, %i), kind=kLoop, calls=%put_row
}
"""


def test_slices_updates_and_fast_memory():
    row = 64 * 4
    read_row, read_x, write_y, read_y, write_row = row, row, row, row, row
    expected = read_row + read_x + write_y + read_y + write_row
    assert traffic.bytes_moved(hlo.parse(PROGRAM)) == expected


def test_slices_and_updates_of_a_fusion_inside_a_fusion():
    calls = "kind=kLoop, calls="
    nested = PROGRAM.replace(
        "ENTRY",
        f"""\
%outer_add (r0: f32[64], r1: f32[10,64], r2: s32[]) -> f32[64] {{
  %r0 = f32[64]{{0}} parameter(0)
  %r1 = f32[10,64]{{1,0}} parameter(1)
  %r2 = s32[] parameter(2)
  %seen = f32[10,64]{{1,0}} bitcast(%r1)
  ROOT %inner = f32[64]{{0}} fusion(%seen, %r0, %r2), {calls}%add_rows
}}

%outer_put (s0: f32[10,64], s1: f32[64], s2: s32[]) -> f32[10,64] {{
  %s0 = f32[10,64]{{1,0}} parameter(0)
  %s1 = f32[64]{{0}} parameter(1)
  %s2 = s32[] parameter(2)
  ROOT %in = f32[10,64]{{1,0}} fusion(%s0, %s1, %s2), {calls}%put_row
}}

ENTRY""",
    )
    nested = nested.replace(
        f"fusion(%w, %x, %i), {calls}%add_rows", f"fusion(%x, %w, %i), {calls}%outer_add"
    )
    entry = nested.index("ENTRY")
    nested = nested[:entry] + nested[entry:].replace("%put_row", "%outer_put")
    assert "%outer_add\n" in nested[entry:] and "%outer_put\n" in nested[entry:]
    assert traffic.bytes_moved(hlo.parse(nested)) == traffic.bytes_moved(hlo.parse(PROGRAM))
