"""What the static cost of kernels is read from: a schedule cut down by hand from libtpu 0.0.52's, and a small HLO."""

import pathlib
import sys
import types

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import record
import tpu_hlo
import tpu_schedule
import tpu_static_cost

DATA = pathlib.Path(__file__).parent / "data" / "tpu_schedule"

# Per core 79 steps of a grid, each with 13 trips of an inner loop of 8 bundles; two bundles for the first step only.
SCHEDULE = (DATA / "packed-bundles-post-ra.txt").read_text()
SLOTS = (DATA / "per-bundle-utilization.txt").read_text()

HLO = """HloModule jit_f, is_scheduled=true

%body (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %negate.1 = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p.1)
}

ENTRY %main (x.1: bf16[100,192], w.1: f32[3,5]) -> bf16[100,192] {
  %x.1 = bf16[100,192]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = f32[3,5]{0,1:T(4,128)} parameter(1)
  %bitcast.1 = bf16[100,192]{1,0:T(8,128)(2,1)} bitcast(%x.1)
  %fusion.1 = (bf16[100,192]{1,0:T(8,128)(2,1)S(1)}, bf16[100,192]{1,0:T(8,128)(2,1)}) fusion(%bitcast.1), kind=kLoop
  %get-tuple-element.1 = bf16[100,192]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=1
  %copy.1 = f32[3,5]{1,0:T(4,128)} copy(%w.1)
  %copy-start.1 = (f32[3,5]{1,0:T(4,128)S(1)}, f32[3,5]{1,0:T(4,128)}, u32[]{:S(2)}) copy-start(%copy.1)
  %copy-done.1 = f32[3,5]{1,0:T(4,128)S(1)} copy-done(%copy-start.1)
  %zero.1 = bf16[8,128]{1,0:T(8,128)(2,1)} constant(0)
  %while.1 = bf16[8,128]{1,0:T(8,128)(2,1)} while(%zero.1), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %kernel.1 = bf16[100,192]{1,0:T(8,128)(2,1)} custom-call(%bitcast.1), custom_call_target="tpu_custom_call"
}
"""


def test_bytes_of_loops():
  """Three trips, each of which reads and writes an array [8,128] of bfloat16."""
  program = tpu_hlo.computations(HLO)
  assert tpu_hlo.loop_bytes(program, 3) == [3 * 2 * 2 * 8 * 128]
  assert tpu_hlo.loop_bytes(program, 4) == []


def test_a_schedule_weighs_its_loops():
  schedule = tpu_schedule.parse("kernel.1", SCHEDULE, SLOTS)
  assert schedule.grid == (1, 79) and schedule.names_core
  assert [(x.trips, x.is_grid) for x in schedule.loops] == [(79, True), (13, False)]
  assert schedule.cycles == 2 + 2 + 79 * (28 - 2 - 8) + 79 * 13 * 8
  assert schedule.parts() == {"before": 11 + 2 / 79, "inner": 13 * 8, "after": 7}
  counted = schedule.counted(schedule.inner)
  assert (counted["MATMUL"], counted["VLOAD:FILL"], counted["VSTORE:SPILL"]) == (12, 1, 1)
  assert schedule.busy()["MATMUL"] == (79 * 4 + 79 * 13 * 12) / (4 * schedule.cycles)


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    (", 13 /* loop exit test */", ", %s8_s8", "no constant number of trips"),
    ("%s12015_s8 = sadd.s32 1,", "%s12015_s8 = sadd.s32 2,", "does not count by one"),
    (", 81 /* loop exit test */", ", 60 /* loop exit test */", "no outermost loop is that of a pipeline"),
    ("   0x2   :", "   0x3   :", "Bundle 0x3 of the schedule stands where 0x2"),
    ("  0x1d   :", "  dummy  :", "29 bundles, but the use of the slots is given for 30"),
  ],
)
def test_a_schedule_that_is_not_understood(old, new, message):
  assert old in SCHEDULE
  with pytest.raises(record.MeasurementError, match=message):
    tpu_schedule.parse("kernel.1", SCHEDULE.replace(old, new), SLOTS)


def test_bytes_of_an_hlo():
  program = tpu_hlo.computations(HLO)
  sizes = tpu_hlo.hlo_bytes(program)
  row, small = 104 * 256 * 2, 4 * 128 * 4  # as tiled; of w, by columns, two tiles
  assert sizes == {"fusion.1": 2 * row, "copy.1": small * 3, "copy-start.1": small, "negate.1": 3 * 2 * 8 * 128 * 2}


LOOP = """HloModule jit_f, is_scheduled=true

%sliced (p.1: bf16[8,8,128], p.2: s32[], p.3: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = s32[] parameter(1)
  %p.3 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(2)
  %slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,8,128}
  %bitcast.1 = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
  ROOT %add.1 = bf16[8,128]{1,0:T(8,128)(2,1)} add(%bitcast.1, %p.3)
}

%updated (q.1: bf16[8,8,128], q.2: bf16[8,128], q.3: s32[]) -> bf16[8,8,128] {
  %q.1 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %q.3 = s32[] parameter(2)
  %bitcast.2 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} bitcast(%q.2)
  ROOT %update.1 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%q.1, %bitcast.2, %q.3)
}

%one (o.1: bf16[8,128]) -> bf16[8,128] {
  %o.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %negate.1 = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%o.1)
}

%other (o.2: bf16[8,128]) -> bf16[8,128] {
  ROOT %o.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
}

%body (carry: (s32[], bf16[8,8,128], bf16[8,128])) -> (s32[], bf16[8,8,128], bf16[8,128]) {
  %carry = (s32[], bf16[8,8,128]{2,1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry), index=0
  %all.1 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %read.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%all.1, %i.1, %x.1), kind=kLoop, calls=%sliced
  %kernel.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%all.1), custom_call_target="tpu_custom_call"
  %if.1 = bf16[8,128]{1,0:T(8,128)(2,1)} conditional(%i.1, %read.1, %x.1), branch_computations={%one, %other}
  %written.1 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} fusion(%all.1, %if.1, %i.1), kind=kLoop, calls=%updated
  ROOT %out.1 = (s32[], bf16[8,8,128], bf16[8,128]) tuple(%i.1, %written.1, %if.1)
}

%condition (carry.2: (s32[], bf16[8,8,128], bf16[8,128])) -> pred[] {
  %carry.2 = (s32[], bf16[8,8,128]{2,1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%carry.2), index=0
  %n.1 = s32[] constant(7)
  ROOT %less.1 = pred[] compare(%i.2, %n.1), direction=LT
}

ENTRY %main (start: (s32[], bf16[8,8,128], bf16[8,128])) -> (s32[], bf16[8,8,128], bf16[8,128]) {
  %start = (s32[], bf16[8,8,128]{2,1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %all.2 = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%start), index=1
  %kernel.2 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%all.2, %all.2), custom_call_target="tpu_custom_call"
  ROOT %while.1 = (s32[], bf16[8,8,128], bf16[8,128]) while(%start), condition=%condition, body=%body
}
"""


def test_bytes_of_a_loop():
  """Seven trips: a slice and an update of one of eight entries count as one entry, a branch of two as half of it."""
  sizes = tpu_hlo.hlo_bytes(tpu_hlo.computations(LOOP), kernels=True, buffer=(8, 0.5))
  entry = 8 * 128 * 2
  assert sizes == {
    "read.1": 7 * (3 * entry + 4),  # the slice, x, the result; the number of the trip
    "kernel.1": 7 * (0.5 * 8 + 1) * entry,
    "kernel.2": (8 + 1) * entry,  # outside the loop; the buffer is two operands
    "negate.1": 7 * 2 * entry / 2,
    "written.1": 7 * (2 * entry + 4),
  }


def test_a_loop_without_a_number_of_trips():
  with pytest.raises(record.MeasurementError, match="has no known number of trips"):
    tpu_hlo.hlo_bytes(tpu_hlo.computations(LOOP.replace("constant(7)", "parameter(1)")))


def test_permuted_bytes_of_a_loop():
  """Seven trips; an array on the chip is sent, too. What XLA makes, and what is outside of loops, does not count."""
  own, of_xla = (f', metadata={{op_name="jit(step)/{x}"}}' for x in ("ppermute", "dot_general"))
  permute = "bf16[8,128]{1,0:T(8,128)(2,1)S(1)} collective-permute(%x.1), channel_id=1, source_target_pairs="
  two, one = "{{0,1},{1,2}}", "{{0,1}}"
  lines = [
    f"  %sent.1 = {permute}{two}{own}",
    f"  %sent.2 = {permute}{one}{own}",
    f"  %sent.3 = {permute}{one}{of_xla}",
  ]
  start = f"bf16[8,8,128]{{2,1,0}} collective-permute-start(%all.2), source_target_pairs={one}{own}"
  hlo = LOOP.replace("  ROOT %out.1", "\n".join([*lines, "  ROOT %out.1"]))
  hlo = hlo.replace("  ROOT %while.1", f"  %sent.4 = {start}\n  ROOT %while.1")
  program = tpu_hlo.computations(hlo)
  assert tpu_hlo.permuted_bytes(program) == {2: 7 * 2 * 8 * 128 * 2, 1: 7 * 8 * 128 * 2}
  assert not tpu_hlo.permuted_bytes(program, beside_loops=True)


def test_permuted_bytes_beside_a_loop():
  """Of three, one is done after a loop that began after it."""
  start = 'bf16[8,128]{1,0} collective-permute-start(%x.1), source_target_pairs={{0,1}}, metadata={op_name="ppermute"}'
  loop = "  %inner.1 = (s32[]) while(%carry), condition=%condition, body=%one"

  def done(k):
    return f"  %done.{k} = bf16[8,128]{{1,0}} collective-permute-done(%start.{k})"

  starts = [f"  %start.{k} = {start}" for k in range(3)]
  lines = [starts[0], done(0), starts[1], loop, done(1), starts[2], done(2), "  ROOT %out.1"]
  program = tpu_hlo.computations(LOOP.replace("  ROOT %out.1", "\n".join(lines)))
  assert tpu_hlo.permuted_bytes(program) == {1: 3 * 7 * 8 * 128 * 2}
  assert tpu_hlo.permuted_bytes(program, beside_loops=True) == {1: 7 * 8 * 128 * 2}


@pytest.mark.parametrize("cores", [1, 2])
def test_bytes_of_a_kernel(cores):
  """The last block is cut short, a block that stays is read once per core, one that is visited again, again."""

  def kernel(x, w, y, out):
    out[...] = x[...] + w[...] + y[...]

  def call(x, w, y):
    rows = pl.BlockSpec((32, 128), lambda i: (i, 0))
    whole, turn = pl.BlockSpec((1, 128), lambda i: (0, 0)), pl.BlockSpec((1, 128), lambda i: (i % 2, 0))
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid=(4,), in_specs=[rows, whole, turn], out_specs=rows, out_shape=out)(x, w, y)

  shapes = [jax.ShapeDtypeStruct((n, 128), jnp.float32) for n in (100, 1, 2)]
  (equation,) = tpu_static_cost.pallas_calls(jax.make_jaxpr(call)(*shapes).jaxpr)
  assert tpu_static_cost.kernel_bytes(equation, cores) == 128 * 4 * (100 + cores + 4 + 100)


@pytest.mark.parametrize(
  ("weights", "direction", "arrays"),
  [
    ("mlp", "forward", 25 + 4),
    ("mlp", "backward", 25 + 4 + 25),
    ("array", "forward", 25 + 4),
    ("array", "backward", 54),
  ],
)
def test_the_floor(weights, direction, arrays):
  """Of sources, streams and their gradients, and of weights and theirs; in bfloat16."""
  options = types.SimpleNamespace(
    chips="v5p",
    shapes="405m",
    implementations="pallas",
    weights=weights,
    directions=direction,
    sources=None,
    ways=4,
    batch=2,
    length=8,
  )
  (case,) = tpu_static_cost.cases(options)
  of_weights = {"mlp": 1024 * 128 + 128 * 100 + 100, "array": 2 * 8 * 100}[weights]
  times = {"forward": 1, "backward": 2}[direction]
  assert tpu_static_cost.floor_bytes(case) == 2 * (arrays * 2 * 8 * 1024 + times * of_weights)


@pytest.mark.parametrize(("option", "value"), [("--chips", "v5p,v9"), ("--shapes", "9b"), ("--weights", "rnn")])
def test_an_unknown_name(option, value, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["tpu_static_cost.py", option, value])
  assert tpu_static_cost.main() == 2
  assert capsys.readouterr().err.startswith(f"{option} has {value.split(',')[-1]!r}; use some of ")
