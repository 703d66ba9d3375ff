"""The kernels read from a GPU's program, against costs counted by hand."""

import jax
import pytest

from siglip.planning import compile, kernels

# As XLA for GPUs writes it, cut to what matters: b = 512 pairs of 196 tokens, width 768, 12 heads, in a loop of 3 turns.
PROGRAM = """HloModule jit_train_step, is_scheduled=true

%transposed (a: f32[512,196,768]) -> f32[196,768,512] {
  %a = f32[512,196,768]{2,1,0} parameter(0)
  ROOT %transpose.1 = f32[196,768,512]{2,1,0} transpose(%a), dimensions={1,2,0}
}

%filled () -> (f32[3,100352,768], f32[3,100352,768]) {
  %zero = f32[] constant(0)
  %broadcast.1 = f32[3,100352,768]{2,1,0} broadcast(%zero), dimensions={}
  %copy.1 = f32[3,100352,768]{2,1,0} copy(%broadcast.1)
  ROOT %tuple.1 = (f32[3,100352,768]{2,1,0}, f32[3,100352,768]{2,1,0}) tuple(%broadcast.1, %copy.1)
}

%updated (stack: f32[3,100352,768], new: bf16[100352,768], i: s32[]) -> f32[3,100352,768] {
  %stack = f32[3,100352,768]{2,1,0} parameter(0)
  %new = bf16[100352,768]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %none = s32[] constant(0)
  %wide = f32[100352,768]{1,0} convert(%new)
  %row = f32[1,100352,768]{2,1,0} bitcast(%wide)
  ROOT %dynamic-update-slice.1 = f32[3,100352,768]{2,1,0} dynamic-update-slice(%stack, %row, %i, %none, %none)
}

%body (p: (s32[], f32[3,100352,768], bf16[768,768])) -> (s32[], f32[3,100352,768], bf16[768,768]) {
  %p = (s32[], f32[3,100352,768]{2,1,0}, bf16[768,768]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %saved = f32[3,100352,768]{2,1,0} get-tuple-element(%p), index=1
  %w = bf16[768,768]{1,0} get-tuple-element(%p), index=2
  %x = bf16[100352,768]{1,0} constant({...})
  %custom-call.1 = (bf16[100352,768]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp(TwoTower)/img/Transformer/encoderblock/MlpBlock_0/Dense_1/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %y = bf16[100352,768]{1,0} get-tuple-element(%custom-call.1), index=0
  %fused_dynamic-update-slice = f32[3,100352,768]{2,1,0} fusion(%saved, %y, %j), kind=kLoop, calls=%updated
  ROOT %next = (s32[], f32[3,100352,768]{2,1,0}, bf16[768,768]{1,0}) tuple(%j, %fused_dynamic-update-slice, %w)
}

%condition (q: (s32[], f32[3,100352,768], bf16[768,768])) -> pred[] {
  %q = (s32[], f32[3,100352,768]{2,1,0}, bf16[768,768]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

ENTRY %main (weights: bf16[768,768], stream: f32[512,196,768], q: bf16[512,196,12,64]) -> f32[196,768,512] {
  %weights = bf16[768,768]{1,0} parameter(0)
  %stream = f32[512,196,768]{2,1,0} parameter(1)
  %heads = bf16[512,196,12,64]{3,2,1,0} parameter(2)
  %first = s32[] constant(0)
  %loop_broadcast_fusion = (f32[3,100352,768]{2,1,0}, f32[3,100352,768]{2,1,0}) fusion(), kind=kLoop, calls=%filled
  %stacks = f32[3,100352,768]{2,1,0} get-tuple-element(%loop_broadcast_fusion), index=0
  %carry = (s32[], f32[3,100352,768]{2,1,0}, bf16[768,768]{1,0}) tuple(%first, %stacks, %weights)
  %while.1 = (s32[], f32[3,100352,768]{2,1,0}, bf16[768,768]{1,0}) while(%carry), condition=%condition, body=%body
  %attention.1 = (bf16[512,12,196,64]{3,1,2,0}, f32[512,12,196]{2,1,0}, u8[0]{0}) custom-call(%heads, %heads, %heads), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/jvp(TwoTower)/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/dot_product_attention_fwd"}
  %all-reduce-start.1 = bf16[768,768]{1,0} all-reduce-start(%weights), to_apply=%condition
  %custom-call.2 = (f32[768,768]{1,0}, s8[33554432]{0}) custom-call(%weights, %weights), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %all-reduce-done.1 = bf16[768,768]{1,0} all-reduce-done(%all-reduce-start.1)
  ROOT %input_transpose_fusion.1 = f32[196,768,512]{2,1,0} fusion(%stream), kind=kInput, calls=%transposed, metadata={op_name="jit(train_step)/jvp(TwoTower)/img/Transformer/encoderblock/add"}
}
"""  # noqa: E501

STREAM, WEIGHTS = 512 * 196 * 768, 768 * 768


@pytest.fixture(scope="module")
def found():
    return {kernel.name: kernel for kernel in kernels.read_kernels(PROGRAM)}


def test_a_kernel_reads_its_operands_and_writes_its_results_once(found):
    assert found["custom-call.1"].bytes == 2 * (STREAM + WEIGHTS + STREAM)  # not its workspace
    assert found["attention.1"].bytes == 2 * 4 * STREAM + 4 * 512 * 12 * 196
    assert found["input_transpose_fusion.1"].bytes == 2 * 4 * STREAM
    assert found["loop_broadcast_fusion"].bytes == 2 * 3 * 4 * STREAM
    # In place: the new row is read and written, the stack is not, and neither is the loop's counter worth more than itself.
    assert found["fused_dynamic-update-slice"].bytes == 2 * STREAM + 4 * STREAM + 4


def test_library_calls_count_as_the_products_that_they_are(found):
    assert found["custom-call.1"].flops == 2 * 512 * 196 * 768 * 768
    assert found["attention.1"].flops == 2 * 2 * 512 * 12 * 196 * 196 * 64
    assert [found[name].runs for name in ("custom-call.1", "custom-call.2")] == [3, 1]


def test_what_a_step_should_not_have_is_found(found):
    flagged = {name: (k.is_transpose, k.fills) for name, k in found.items() if k.is_transpose or k.fills}
    assert flagged == {"input_transpose_fusion.1": (True, False), "loop_broadcast_fusion": (False, True)}
    assert found["input_transpose_fusion.1"].is_in_a_block
    assert found["fused_dynamic-update-slice"].kind == "stacks of a scan"


def test_totals_follow_the_roofline(found):
    rates = kernels.Rates(matmul=1e12, attention=2e12, memory=1e12)
    totals = kernels.by_kind(found.values(), rates)
    product = found["custom-call.1"]
    seconds = pytest.approx(3 * product.flops / 1e12)
    assert totals["matrix products, blocks"] == (3, 3 * product.flops, 3 * product.bytes, seconds)
    attention = found["attention.1"]
    assert totals["attention, cuDNN"].seconds == max(attention.flops / 2e12, attention.bytes / 1e12)
    assert totals["transposes"].seconds == 2 * 4 * STREAM / 1e12
    assert list(totals)[0] == "matrix products, blocks"


def test_stats_of_a_gpu_program_have_its_products_and_what_they_hide():
    class Compiled:
        def as_text(self):
            return PROGRAM

        def memory_analysis(self):
            return jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((2,), "float32")).compile().memory_analysis()

    stats = compile.read(Compiled())
    attention = 2 * 2 * 512 * 12 * 196 * 196 * 64
    assert stats.matmul_flops == 3 * 2 * STREAM * 768 + 2 * 768**3 + attention
    assert stats.in_flight == [compile.InFlight("all-reduce", 2 * WEIGHTS, matmuls=1, runs=1)]
