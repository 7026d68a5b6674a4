"""Reading compiled programs: loops, groups of devices, and what counts as traffic."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.planning import hlo, topology


class Grid:
  """A mesh's shape is all that is read."""

  devices, axis_names = np.empty((2, 2, 4)), ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",)),
    ("replica_groups=[8,2]<=[16]", ("tensor",)),
    ("replica_groups=[8,2]<=[2,8]T(1,0)", ("data",)),
    ("replica_groups=[4,4]<=[2,2,4]T(2,1,0)", ("data", "fsdp")),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=4] {'b'}", ("fsdp",)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=4] {'a','c'}", ("data", "tensor")),
    ("replica_groups=mesh['a'=16] {'a':(2)2}", ("fsdp",)),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'a'}", ("tensor",)),
    ("source_target_pairs={{0,0},{1,5},{5,1}}", ("fsdp",)),
  ],
)
def test_groups_are_mesh_axes(groups, axes):
  assert hlo._axes(hlo._groups(f"  %x = f32[2] all-reduce(%y), {groups}, to_apply=%add"), Grid) == axes


def test_an_unknown_way_to_write_groups_is_not_passed_over():
  with pytest.raises(ValueError, match="unknown way"):
    hlo._groups("  %x = f32[2] all-reduce(%y), replica_groups=something")


@pytest.fixture(scope="module")
def program():
  """Five turns of a loop, each gathering a weight over fsdp, and a sum over tensor at the end."""
  pytest.importorskip("libtpu")
  mesh = topology.get("v5e:2x4").mesh({"data": 1, "fsdp": 4, "tensor": 2})
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  def f(x, weights):
    y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ jax.lax.with_sharding_constraint(w, place())), None), x, weights)
    return jnp.sum(y, axis=0)

  x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=place("tensor"))
  weights = jax.ShapeDtypeStruct((5, 512, 512), jnp.float32, sharding=place(None, "fsdp"))
  with jax.set_mesh(mesh):
    compiled = jax.jit(f, out_shardings=place()).lower(x, weights).compile()
  return compiled.as_text(), mesh


def test_collectives_of_a_loop_count_every_turn(program):
  found = {(c.kind, c.axes): c for c in hlo.collectives(*program)}
  gather, total = found["all-gather", ("fsdp",)], found["all-reduce", ("tensor",)]
  assert gather.group == 4 and gather.size == 5 * 512 * 512 * 4 and gather.sent == gather.size * 3 / 4
  assert total.group == 2 and total.count == 1 and total.size == 512 * 4 and total.sent == total.size
  assert len(found) == 2


def test_traffic_of_a_loop(program):
  """Five weights are read, written once gathered, and read again, unless on-chip memory holds them."""
  whole = 5 * 512 * 512 * 4
  assert whole / 4 <= hlo.hbm_bytes(program[0]) <= 3.5 * whole


def test_traffic_by_hand():
  text = """HloModule m

%fused (p0: f32[10,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
}

%body (t: (s32[], f32[10,100])) -> (s32[], f32[10,100]) {
  %t = (s32[], f32[10,100]{1,0}) parameter(0)
  %i = s32[]{:T(128)S(1)} get-tuple-element(%t), index=0
  %w = f32[10,100]{1,0} get-tuple-element(%t), index=1
  %row = f32[1,100]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %near = f32[1,100]{1,0:T(8,128)S(1)} copy(%row)
  ROOT %out = (s32[], f32[10,100]{1,0}) tuple(%i, %w)
}

%condition (t.1: (s32[], f32[10,100])) -> pred[] {
  %t.1 = (s32[], f32[10,100]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)S(1)} get-tuple-element(%t.1), index=0
  %n = s32[]{:T(128)S(1)} constant(10)
  ROOT %less = pred[]{:T(512)S(1)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[10,100]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %zero = s32[]{:T(128)S(1)} constant(0)
  %start = (s32[], f32[10,100]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[10,100]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[10,100]{1,0} get-tuple-element(%loop), index=1
}
"""
  # A turn: 400 bytes of the row read and written by the slice, and 400 read by the copy into on-chip memory.
  assert hlo.hbm_bytes(text) == 10 * (400 + 400 + 400)
  assert re.search("while", text) and hlo._turns(hlo._computations(text))["body"] == 10


@pytest.mark.parametrize(
  "start, moved",
  [
    # Into on-chip memory, which costs nothing: what is read.
    ("(f32[8,100]{1,0:S(1)}, f32[8,100]{1,0}, u32[]{:S(2)}) copy-start(%a)", 3200),
    ("(f32[8,100]{1,0}, f32[8,100]{1,0}, u32[]{:S(2)}) copy-start(%a)", 6400),
    # Of a large operand a slice alone.
    ("((f32[8,100]{1,0}), f32[1,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:100]}", 400),
    ("((f32[8,100]{1,0}), f32[1,100]{1,0}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:100]}", 800),
    ("((f32[8,100]{1,0}, s32[], s32[]), f32[1,100]{1,0:S(1)}, s32[]) dynamic-slice-start(%a, %i, %i)", 400),
    ("f32[1,100]{1,0:S(1)} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,100}", 400),
    ("(f32[8,100]{1,0}, f32[32,100]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}", 16000),
    ("f32[8,100]{1,0} all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add", 6400),
    ("(f32[8,100]{1,0}, f32[8,100]{1,0}, u32[], u32[]) collective-permute-start(%a)", 6408),
  ],
)
def test_traffic_of_what_runs_beside_other_work(start, moved):
  text = "ENTRY %main (a: f32[8,100], i: s32[]) -> f32[8,100] {\n  %a = f32[8,100]{1,0} parameter(0)\n"
  text += f"  %i = s32[]{{:S(6)}} parameter(1)\n  %start = {start}\n"
  text += "  ROOT %done = f32[8,100]{1,0} copy-done(%start)\n}\n"
  assert hlo.hbm_bytes(text) == moved


def test_traffic_of_fusions_within_fusions():
  """A layer's weights are sliced out inside the fusion that multiplies, the result is stacked inside another."""
  text = """HloModule m

%slice (p: f32[64,10,20], i: s32[]) -> f32[10,20] {
  %p = f32[64,10,20]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %layer = f32[1,10,20]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,10,20}
  ROOT %flat = f32[10,20]{1,0} bitcast(%layer)
}

%same (p.1: f32[5,10]) -> f32[5,10] {
  %p.1 = f32[5,10]{1,0} parameter(0)
  ROOT %as_it_is = f32[5,10]{1,0} bitcast(%p.1)
}

%multiply (p.2: f32[5,10], p.3: f32[64,10,20], i.1: s32[]) -> f32[5,20] {
  %p.2 = f32[5,10]{1,0} parameter(0)
  %x.1 = f32[5,10]{1,0} fusion(%p.2), kind=kLoop, calls=%same
  %p.3 = f32[64,10,20]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %w.1 = f32[10,20]{1,0} fusion(%p.3, %i.1), kind=kLoop, calls=%slice
  ROOT %product = f32[5,20]{1,0} dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (p.4: f32[64,5,20], p.5: f32[5,20], i.2: s32[]) -> f32[64,5,20] {
  %p.4 = f32[64,5,20]{2,1,0} parameter(0)
  %p.5 = f32[5,20]{1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %row = f32[1,5,20]{2,1,0} bitcast(%p.5)
  ROOT %update = f32[64,5,20]{2,1,0} dynamic-update-slice(%p.4, %row, %i.2, %i.2, %i.2)
}

ENTRY %main (x: f32[5,10], w: f32[64,10,20], y: f32[64,5,20], n: s32[]) -> f32[64,5,20] {
  %x = f32[5,10]{1,0} parameter(0)
  %w = f32[64,10,20]{2,1,0} parameter(1)
  %y = f32[64,5,20]{2,1,0} parameter(2)
  %n = s32[]{:S(6)} parameter(3)
  %z = f32[5,20]{1,0} fusion(%x, %w, %n), kind=kOutput, calls=%multiply
  ROOT %out = f32[64,5,20]{2,1,0} fusion(%y, %z, %n), kind=kLoop, calls=%put
}
"""
  layer, x, z = 10 * 20 * 4, 5 * 10 * 4, 5 * 20 * 4
  assert hlo.hbm_bytes(text) == (x + layer + z) + (z + 2 * z)  # what is updated in place counts as read and written


def test_sums_over_slices_go_by_the_hosts():
  """A mean over two slices: within each over the wires, then a quarter of it from every chip to the other slice."""
  pytest.importorskip("libtpu")
  mesh = topology.get("v5e:2x2", slices=2).mesh({"data": 4})
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  x = jax.ShapeDtypeStruct((64, 512, 256), jnp.float32, sharding=place(("slice", "data")))
  text = jax.jit(lambda x: jnp.mean(x, axis=0), out_shardings=place()).lower(x).compile().as_text()
  found = {c.axes: c for c in hlo.collectives(text, mesh)}
  between = found[("slice",)]
  assert (between.kind, between.group, between.count) == ("all-reduce", 2, 1)
  assert between.size == between.sent == 512 * 256 * 4 / 4
  assert found[("data",)].group == 4 and not [axes for axes in found if "slice" in axes and len(axes) > 1]
