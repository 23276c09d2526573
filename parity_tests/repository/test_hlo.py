"""What the benchmarks read from the text of a compiled TPU program, and the step that they compile."""

import dataclasses
import os
from unittest import mock

import jax
import pytest

from benchmarks.hlo import Counts, count
from benchmarks.sharded_step import training_step
from jax_moe import sharding

with mock.patch.dict(os.environ):  # it sets variables for the TPU compiler
    from benchmarks.tpu_train import MODELS, Options, contract, operations

TEXT = """HloModule step

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = bf16[8,8]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
  %g = bf16[16,8]{1,0:T(8,128)} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %p = bf16[4,8] collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  %f = bf16[4,4] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"3"}
  ROOT %s = (f32[4], f32[2]) all-reduce(%x, %y), replica_groups=mesh['x'=2,'y'=4], device_ids=([8]) {'x'}, to_apply=%sum
}

%all-reduce-scatter.1 (p: bf16[16,4]) -> bf16[4,4] {
  %r = bf16[16,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = bf16[4,4]{1,0} dynamic-slice(%r, %i), dynamic_slice_sizes={4,4}
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c.1), direction=LT
}

%elsewhere (p: f32[4]) -> f32[4] {
  ROOT %f = f32[4] fusion(%p), kind=kCustom, calls=%x, backend_config={"estimated_cycles":"9223372036854775807"}
}

%usual (p: f32[4]) -> f32[4] {
  ROOT %e = (f32[4], /*index=1*/f32[4]) all-to-all(%p, %p), replica_groups={{0,1},{2,3}}
}

%larger (p: f32[4]) -> f32[4] {
  ROOT %h = f32[8] all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%condition, body=%body
  %o = ((f32[4]), f32[4], u32[]) call-start(%q), async_execution_thread="sparsecore", to_apply=%elsewhere
  %d = f32[] conditional(%q, %p, %t), true_computation=%usual, false_computation=%larger
  %k = f32[] conditional(%q, %p, %t), branch_computations={%larger, %usual}
  %b = (bf16[2,8], bf16[16,8]) all-gather-start(%q), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %r = bf16[4,8] fusion(%w), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}
"""


def test_loops_count_with_their_trips() -> None:
    """Five trips of 10 cycles; what a chip sends in each: 3/4 of 256 gathered bytes, 64 permuted ones, 3/4 of 128 that
    are reduced and scattered, and twice half of 24 reduced ones; and 7/8 of 256 gathered bytes in the entry. Of two
    conditionals the branch that sends half of 32 bytes, not the one that sends 3/4 of them.
    """
    sent = {"all-gather": 5 * 192.0 + 224, "collective-permute": 5 * 64.0, "reduce-scatter": 5 * 96.0,
            "all-reduce": 5 * 24.0, "all-to-all": 2 * 16.0}
    assert count(TEXT) == Counts(5 * 10 + 100, 1, sent)
    assert count(TEXT.replace("direction=LT", "direction=NE")).cycles == 110  # no bound that is known


def test_a_collective_of_unknown_chips_is_an_error() -> None:
    with pytest.raises(ValueError, match="must name its replica_groups"):
        count(TEXT.replace("replica_groups=[1,8]<=[8], ", ""))


def test_operations_of_a_published_model() -> None:
    """Mixtral at 4096 tokens: 6 times the active weights but the embedding, and the attention's products."""
    config = contract(Options("mixtral-8x7b", mesh="data=16"))
    active = 12_879_925_248 - 32_000 * 4096
    assert operations(config, 10, 4096) == 10 * (6 * active + 3 * 32 * 32 * 256 * 4096)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_the_step_is_traced(model: str) -> None:
    """At full width, few layers: its loss is a scalar, and the state keeps its shapes."""
    options = Options(model, topology="v5p:1x1x1", mesh="data=1", layers=4 if model == "deepseek-v3" else 1, length=64)
    mesh = sharding.device_mesh({"data": 1})
    with jax.set_mesh(mesh):
        step, arguments, _ = training_step(contract(options), mesh, options.batch, options.length, options.remat)
        state, loss = jax.eval_shape(step, *arguments)
    assert loss.shape == () and loss.dtype == "float32"
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (state, arguments[0])]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "gpt-5"}, "train='gpt-5': must be one of mixtral-8x7b, "),
        ({"topology": "v4:2x2"}, "topology='v4:2x2': must be of one of v5e, v5p, v6e"),
        ({"topology": "v5p:2xx4"}, "topology='v5p:2xx4': must be a chip and its sizes"),
        ({"mesh": "data=8"}, "mesh='data=8': must be of the 16 chips of v5p:2x2x4"), ({"length": 0}, "length=0"),
    ],
)
def test_options_are_checked(changes: dict, said: str) -> None:
    assert "mixtral-8x7b" in MODELS
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(Options("mixtral-8x7b"), **changes)
