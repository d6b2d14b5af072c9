"""Reading optimised HLO: against programs whose products, traffic and collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tca4rec_jax.compile_ahead.hlo import parse, type_bytes
from tca4rec_jax.compile_ahead.work import analyse

N, LOOPS = 64, 5


def compiled_text(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def matrix(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_loop_counts_as_often_as_it_runs():
    def chain(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    work = analyse(compiled_text(chain, matrix(N, N), matrix(LOOPS, N, N)))
    assert work.flops == LOOPS * 2 * N**3
    assert work.unknown_loops == 0
    assert not work.collectives
    # Each step reads a matrix of the stack, not the stack.
    array = 4 * N * N
    assert LOOPS * 3 * array <= work.bytes <= LOOPS * 12 * array


def test_a_loop_that_the_data_end_is_counted_once_and_said():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ w, x)

    work = analyse(compiled_text(until, matrix(N, N), matrix(N, N)))
    assert work.unknown_loops == 1
    assert work.flops == 2 * N**3


def test_the_costliest_branch_counts():
    def switch(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    work = analyse(compiled_text(switch, jax.ShapeDtypeStruct((), jnp.int32), matrix(N, N)))
    assert work.flops == 2 * 2 * N**3


def test_batched_products():
    text = compiled_text(
        lambda a, b: jnp.einsum("bqh,bkh->bqk", a, b), matrix(3, 5, 7), matrix(3, 11, 7)
    )
    assert analyse(text).flops == 2 * 3 * 5 * 11 * 7


def test_collectives_with_their_bytes():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def sharding(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def step(x, w):
        def body(total, w):
            return total + jax.lax.psum(x @ jax.lax.all_gather(w, "data", tiled=True), "data"), None

        return jax.lax.scan(body, jnp.zeros((N, N)), w)[0]

    rows = PartitionSpec(None, "data")
    text = compiled_text(
        jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(),
                      check_vma=False),
        matrix(N, N), matrix(LOOPS, N, N),
        in_shardings=(sharding(), sharding(None, "data")),
    )  # fmt: skip
    work = analyse(text)
    found = {one.kind: one for one in work.collectives}
    assert set(found) == {"all-gather", "all-reduce"}
    for one in found.values():
        assert (one.bytes, one.group, one.times) == (4 * N * N, 2, LOOPS)
    assert found["all-gather"].moved == 4 * N * N / 2
    assert found["all-reduce"].moved == 4 * N * N
    assert work.moved == LOOPS * 6 * N * N


def test_a_call_of_the_host_is_found():
    def shout(x):
        jax.debug.callback(lambda total: None, jnp.sum(x))
        return x + 1

    assert analyse(compiled_text(shout, matrix(N))).host_transfers
    assert not analyse(compiled_text(lambda x: x + 1, matrix(N))).host_transfers


TPU = """HloModule jit_f, num_partitions=16
%fused (param_0: bf16[64,2048,128], param_1: bf16[64,1024,128]) -> bf16[64,2048,1024] {
  %param_0 = bf16[64,2048,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[64,1024,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,2048,1024]{2,1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
window={size=64 stride=63 lhs_dilate=64}, dim_labels=0bf_0oi->0bf
}
%condition (arg: (s32[], bf16[8,128])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(28)
  %count = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}
%body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %all-gather.1 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={1}
  %cut = bf16[8,128]{1,0:T(8,128)(2,1)} slice(%all-gather.1), slice={[0:8],[0:128]}, \
backend_config={"window_config":{"estimated_cycles":"1500"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%count.1, %cut)
}
ENTRY %main (a: bf16[64,2048,128], b: bf16[64,1024,128], t: (s32[], bf16[8,128])) -> (s32[]) {
  %a = bf16[64,2048,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,1024,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(2)
  %fusion = bf16[64,2048,1024]{2,1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"70450"}}
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%t), \
condition=%condition, body=%body
}
"""


def test_what_a_tpus_compiler_writes():
    """Batch axes as windows, trip counts in the condition, cycles, groups as mesh axes, VMEM."""
    work = analyse(TPU)
    assert work.flops == 2 * 64 * 2048 * 1024 * 128
    assert work.unknown_loops == 0
    (gather,) = work.collectives
    assert (gather.bytes, gather.group, gather.times) == (2 * 8 * 512, 4, 28)
    assert sum(kernel.cycles * kernel.times for kernel in work.kernels) == 70450 + 28 * 1500
    (cut,) = (kernel for kernel in work.kernels if kernel.name == "cut")
    assert cut.bytes == 2 * 8 * 128  # what it reads lies on the chip


def test_collectives_inside_fusions_are_counted_once_each():
    """Start and end of one; another of the same channel in a chain of its own."""
    fused = """%{0} (x: f32[4]) -> f32[16] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %g = f32[16]{{0}} all-gather(%x), channel_id=1, replica_groups={{{{0,1,2,3}}}}, \
frontend_attributes={{chain_id="{1}"}}
}}
"""
    names = {"start": 7, "end": 7, "other": 8}
    calls = [f"  %{n}.1 = f32[16]{{0}} fusion(%x), kind=kCustom, calls=%{n}\n" for n in names]
    entry = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
    text = "".join(fused.format(*item) for item in names.items())
    work = analyse(f"HloModule x, num_partitions=4\n{text}{entry}{''.join(calls)}}}\n")
    assert [one.bytes for one in work.collectives] == [64, 64]


def test_what_links_carry_inside_a_fusion_is_no_traffic():
    """A TPU's collective that starts beside a product: a fusion of its own inside the fusion."""
    text = """HloModule one, num_partitions=2

%start (p: f32[1024]) -> f32[2048] {
  %p = f32[1024]{0} parameter(0)
  ROOT %gathered = f32[2048]{0} custom-call(%p), custom_call_target="x"
}

%beside (x: f32[1024], y: f32[8,8]) -> (f32[2048], f32[8,8]) {
  %x = f32[1024]{0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %async = f32[2048]{0} fusion(%x), kind=kCustom, calls=%start, \
backend_config={"custom_fusion":"AsyncCollectiveStart"}
  %dot = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (f32[2048]{0}, f32[8,8]{1,0}) tuple(%async, %dot)
}

ENTRY %main (x: f32[1024], y: f32[8,8]) -> (f32[2048], f32[8,8]) {
  %x = f32[1024]{0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  ROOT %fusion = (f32[2048]{0}, f32[8,8]{1,0}) fusion(%x, %y), kind=kOutput, calls=%beside
}
""".replace("\\\n", "")
    work = analyse(text)
    assert work.flops == 2 * 8**3
    assert work.bytes == 2 * 4 * 8 * 8  # the product's operand and result


def test_a_product_by_cublas_reads_its_slice_and_its_workspace_is_no_traffic():
    text = """HloModule one

%layer (stack: bf16[4,8,16], at: s32[], x: bf16[3,8]) -> (bf16[3,16], s8[1024]) {
  %x = bf16[3,8]{1,0} parameter(2)
  %stack = bf16[4,8,16]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), \
dynamic_slice_sizes={1,8,16}
  %weights = bf16[8,16]{1,0} bitcast(%slice)
  ROOT %product = (bf16[3,16]{1,0}, s8[1024]{0}) custom-call(%x, %weights), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"lhs_contracting_dimensions":["1"]}}
}

ENTRY %main (stack: bf16[4,8,16], at: s32[], x: bf16[3,8]) -> (bf16[3,16], s8[1024]) {
  %stack = bf16[4,8,16]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %x = bf16[3,8]{1,0} parameter(2)
  ROOT %f = (bf16[3,16]{1,0}, s8[1024]{0}) fusion(%stack, %at, %x), kind=kCustom, calls=%layer
}
""".replace("\\\n", "")
    work = analyse(text)
    assert work.flops == 2 * 3 * 8 * 16
    assert work.bytes == 2 * (8 * 16 + 3 * 8 + 3 * 16) + 4


def test_types_and_what_is_no_hlo():
    assert type_bytes("(f32[2,3]{1,0}, pred[], s4[10]{0}, token[])") == 24 + 1 + 5
    assert type_bytes("f8e4m3fn[16]{0}") == 16
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")


def test_products_of_the_whole_match_the_compilers_own_count_where_there_is_no_loop():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 40, 5)

    def product(*matrices):
        out = matrices[0]
        for one in matrices[1:]:
            out = out @ one
        return out

    shapes = [matrix(int(a), int(b)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    compiled = jax.jit(product).lower(*shapes).compile()
    assert analyse(compiled.as_text()).flops == compiled.cost_analysis()["flops"]
