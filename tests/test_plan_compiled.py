"""Every shipped pair of preset and hardware, compiled; and each check failing where it should.

Needs the compilers for TPUs and GPUs: `make test-plan`. Skipped where they are not installed. With
QWEN_JAX_PLANS=FILE the figures of the pairs are kept for `benchmarks.plan_table`.
"""

import importlib.util
import os
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_compile, plan_table
from qwen_jax import losses, sharding
from qwen_jax.model import transformer
from qwen_jax.plan import checks, search, timing
from qwen_jax.plan.__main__ import main, parse_flags, read
from qwen_jax.plan.program import compile_step
from qwen_jax.plan.shipped import SHIPPED
from qwen_jax.stages import pretrain
from qwen_jax.trainer import step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (importlib.util.find_spec("libtpu") and importlib.util.find_spec("jax_cuda13_plugin")),
        reason="needs libtpu and the CUDA plugin: make test-plan",
    ),
]

# A model of four layers whose weights are larger than its batches, in seconds.
SMALL = (
    "--config.model.num_layers=4", "--config.model.d_model=1024", "--config.model.num_heads=8",
    "--config.model.num_kv_heads=8", "--config.model.d_ff=2816", "--config.model.vocab_size=32768",
    "--config.data.batch_size=16", "--config.data.virtual_shards=16",
    "--config.data.seq_len=1024", "--config.train.num_microbatches=2",
)  # fmt: skip
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x2", "h100:8")


def run_on(topology: str, *more: str):
    return read(parse_flags(["plan", "--config=configs/7b.py", f"--topology={topology}", *more]))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pair(name):
    """It fits (or this raises) and its program is clean."""
    figures = plan_table.compile_pair(name)
    assert figures["problems"] == []
    assert 0.2 < figures["mfu"] < 0.85
    if "QWEN_JAX_PLANS" in os.environ:
        plan_table.keep(figures, Path(os.environ["QWEN_JAX_PLANS"]))


def test_the_gpu_benchmark_compiles_for_one_h100():
    programs = gpu_compile.compile_all("h100:1", (5, 20), ["P1", "P3", "D1", "R1"])
    assert len(programs) == 10 and [x["name"] for x in programs if not x["fits"]] == []


def test_7b_on_one_v5e_fails_at_once_with_advice(capsys):
    command = ["plan", "--config=configs/7b.py", "--topology=v5e:1x1"]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "115.06 GiB on each device, which has 15.75 GiB" in said
    assert "about 10 v5e would hold" in said


def test_a_step_too_large_for_the_compiler(capsys):
    command = [
        "plan",
        "--config=configs/1_8b.py",
        "--topology=v5e:2x2",
        "--config.model.remat=none",
    ]
    assert main([*command, "--config.train.num_microbatches=64"]) == 3
    said = capsys.readouterr().err
    assert "the compiler needs 49.00 GiB on each device, which has 15.75 GiB" in said
    assert "should fit" in said


def test_search_is_at_least_as_good_as_the_preset():
    cfg, topology = run_on("v5p:2x2x2", *SMALL)
    given = timing.estimate(compile_step(cfg, topology)).step
    assert timing.estimate(search.best_setting(cfg, topology, 3, print)).step <= given


@pytest.mark.parametrize("topology", ["v4:2x2x2", "7x:2x2x1", "b200:8"])
def test_the_step_is_clean_on_chips_without_a_shipped_pair(topology):
    assert checks.all_problems(compile_step(*run_on(topology, *SMALL))) == []


@pytest.mark.parametrize("topology", TOPOLOGIES)
class TestNaiveVariants:
    def test_the_real_step_is_clean(self, topology):
        assert checks.all_problems(compile_step(*run_on(topology, *SMALL))) == []

    def test_attention_without_saved_residuals(self, topology, monkeypatch):
        def forgets(block, cfg):
            names = ("qkv", "attention", "attention_out", "mlp_in")
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            return transformer.nn.remat(block, policy=policy, prevent_cse=False)

        monkeypatch.setattr(transformer, "_rematerialised", forgets)
        problems = checks.attention_runs(compile_step(*run_on(topology, *SMALL)))
        assert problems and "runs 2 times a layer" in problems[0]

    def test_a_head_gradient_summed_whole(self, topology, monkeypatch):
        def sum_and_slice(x, *, over, into, dimension):
            size = x.shape[dimension] // sharding.num_shards(into)
            start = sharding.shard_index(into) * size
            whole = jax.lax.optimization_barrier(sharding.sum_over(x, *over))
            return jax.lax.dynamic_slice_in_dim(whole, start, size, dimension)

        monkeypatch.setattr(losses, "scatter_sum", sum_and_slice)
        problems = checks.reduced_weights(compile_step(*run_on(topology, *SMALL)))
        assert any("all-reduce of a whole weight f32" in problem for problem in problems)

    def test_a_head_multiplied_in_float32(self, topology, monkeypatch):
        """At full precision; else compilers cast the float32 to what they multiply in, and before
        they gather it.
        """
        real = pretrain.cross_entropy_sum

        def in_float32(hidden_BLD, *rest):
            with jax.default_matmul_precision("highest"):
                return real(hidden_BLD.astype("float32"), *rest)

        monkeypatch.setattr(pretrain, "cross_entropy_sum", in_float32)
        problems = checks.gathered_weights(compile_step(*run_on(topology, *SMALL)))
        assert any("gathered as f32" in problem for problem in problems)

    def test_a_state_that_is_not_donated(self, topology, monkeypatch):
        def keeps_the_old_state(stage, num_microbatches):
            return jax.jit(step.make_train_step(stage, num_microbatches))

        monkeypatch.setattr("qwen_jax.plan.program.jit_train_step", keeps_the_old_state)
        (problem,) = checks.donation(compile_step(*run_on(topology, *SMALL)))
        assert "do not take the memory" in problem

    def test_logits_of_all_positions(self, topology, monkeypatch):
        real = losses._score_chunks

        def in_one_piece(hidden_BLD, *rest, chunk, with_grad):
            return real(hidden_BLD, *rest, chunk=hidden_BLD.shape[1], with_grad=with_grad)

        monkeypatch.setattr(losses, "_score_chunks", in_one_piece)
        assert checks.logits(compile_step(*run_on(topology, *SMALL)))


def test_offloaded_activations_lie_on_the_host():
    here, there = (
        compile_step(*run_on("v5p:2x2x2", *SMALL, f"--config.model.remat={policy}"))
        for policy in ("save_matmuls", "offload_matmuls")
    )
    assert there.memory.host > 0 == here.memory.host
    # 4 layers, 2 microbatches of one row on each device, there and back, two bytes a number.
    one_token = 3 * 1024 + 1024 + 2 * 2816
    assert timing.host_traffic(there.module) == 4 * 2 * 1024 * one_token * 2 * 2
    assert timing.host_traffic(here.module) == 0
