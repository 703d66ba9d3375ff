"""What is read from compiled programs, against programs whose cost is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from siglip.planning import compile


def compile_for(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_a_product_inside_nested_loops_is_counted_as_often_as_it_runs():
    def loops(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
        return lax.scan(lambda x, _: lax.scan(inner, x, length=5), x, length=7)[0]

    stats = compile.read(compile_for(loops, (16, 32), (32, 32)))
    assert stats.matmul_flops == 5 * 7 * 2 * 16 * 32 * 32
    assert stats.output_bytes == 16 * 32 * 4
    assert stats.collective_bytes == {}


def test_a_loop_of_unknown_length_is_refused():
    program = compile_for(lambda x: lax.while_loop(lambda x: x[0, 0] < 3.0, lambda x: x @ x + 1, x), (8, 8))
    with pytest.raises(ValueError, match="does not tell how often it runs"):
        compile.read(program)


def test_bytes_of_collectives_are_those_of_the_larger_side():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spec = PartitionSpec("data")

    def collectives(x):
        gathered = lax.all_gather(x, "data", tiled=True)
        scattered = lax.psum_scatter(jnp.sin(gathered), "data", tiled=True)
        return lax.scan(
            lambda x, _: (lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]), None), scattered, length=3
        )[0]

    program = compile_for(jax.shard_map(collectives, mesh=mesh, in_specs=spec, out_specs=spec), (32, 8))
    stats = compile.read(program)
    whole, block = 32 * 8 * 4, 8 * 8 * 4
    assert stats.collective_bytes == {"all-gather": whole, "reduce-scatter": whole, "collective-permute": 3 * block}
    assert stats.collective_runs == {"all-gather": 1, "reduce-scatter": 1, "collective-permute": 3}
    assert stats.in_flight == []  # the CPU has no asynchronous collectives


# A schedule as a TPU's compiler writes it, cut to what matters: one permute has a product under it, the other has none.
SCHEDULED = """HloModule jit_f, is_scheduled=true

%products (a: bf16[8,16]) -> f32[8,8] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_oi->bf
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %collective-permute-start.1 = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]) collective-permute-start(%x), channel_id=1
  %fusion.1 = f32[8,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kOutput, calls=%products
  %collective-permute-done.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.1)
  %collective-permute-start.2 = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[]) collective-permute-start(%x), channel_id=2
  %collective-permute-done.2 = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.2)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%i, %collective-permute-done.1)
}

%condition (q: (s32[], bf16[8,16])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(255)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (start: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
}
"""


def test_a_schedule_tells_what_runs_while_a_collective_is_in_flight():
    class Scheduled:
        def as_text(self):
            return SCHEDULED

        def memory_analysis(self):
            return compile_for(lambda x: x, (2,)).memory_analysis()

    stats = compile.read(Scheduled())
    assert stats.matmul_flops == 255 * 2 * 8 * 8 * 16
    assert stats.collective_bytes == {"collective-permute": 255 * (8 * 16 + 4 * 16) * 2}
    assert stats.in_flight == [
        compile.InFlight("collective-permute", 8 * 16 * 2, matmuls=1, runs=255),
        compile.InFlight("collective-permute", 4 * 16 * 2, matmuls=0, runs=255),
    ]
