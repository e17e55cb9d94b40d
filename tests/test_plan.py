"""Plans: what is read off a compiled program, on CPU devices that stand in for the hardware."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from tiny import abstract_params, mesh_of

from qwen_jax import losses, sharding
from qwen_jax.config import Config, MeshConfig
from qwen_jax.model import transformer
from qwen_jax.plan import checks, flops, hlo, report, search, timing
from qwen_jax.plan.__main__ import main
from qwen_jax.plan.hardware import CHIPS, Chip, Topology, find_topology
from qwen_jax.plan.program import DoesNotFit, compile_step, state_bytes
from qwen_jax.stages.pretrain import flops_per_token
from qwen_jax.trainer import step

ROW = 128  # positions
ROOMY = Chip("gpu", 1e12, 8 * 2**30, 1e10, 1e9, 1e8, 1e9)


def eight_devices(chip: Chip = ROOMY) -> Topology:
    return Topology("cpu:8", chip, jax.devices()[:8], 1)


def small_run(**model) -> Config:
    """A run on eight devices whose weights are larger than its batches."""
    from configs import tiny

    values = tiny.get_config()
    values.data.update(train="stdlib:train", batch_size=32, seq_len=ROW, virtual_shards=8)
    values.train.num_microbatches = 2
    cfg = Config.from_dict(values.to_dict())
    size = {"vocab_size": 1024, "d_model": 256, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4}
    size |= {"head_dim": 64, "d_ff": 384, "loss_chunk": 16, "attention": "blocked", "remat": "full"}
    size |= {"compute_dtype": "bfloat16"}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **(size | model)))


def small_ppo(response_len: int, queries: int = 64) -> Config:
    """PPO with the model of `small_run`."""
    from configs import ppo

    values = ppo.get_config("1_8b")
    values.init_from, values.data.train = "BASE", "chat:DATA"
    values.data.update(batch_size=32, seq_len=ROW, virtual_shards=8)
    values.train.update(steps=400, num_microbatches=2, eval_every=400)
    values.checkpoint.every_steps = 400
    values.ppo.update(reward_from="RM", prompt_len=16, response_len=response_len, queries=queries)
    values.ppo.update(responses_per_query=1, epochs=1)
    model = dataclasses.replace(small_run().model, vocab_size=1024)
    return dataclasses.replace(Config.from_dict(values.to_dict()), model=model)


@functools.cache
def planned():
    return compile_step(small_run(), eight_devices())


def compiled(fn, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(fn).lower(*arrays).compile().as_text())


class TestHlo:
    def test_loops_count_as_often_as_they_turn(self):
        def nested(x):
            def outer(x, _):
                return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0], None

            return jax.lax.scan(outer, x, length=7)[0]

        module = compiled(nested, (64, 64))
        sines = [runs for one, _, runs in module.everything() if one.opcode == "sine"]
        assert sines == [35.0]

    def test_text_of_something_else(self):
        with pytest.raises(ValueError, match="no ENTRY"):
            hlo.parse("module @jit_f {}")

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("replica_groups={{0,1},{2,3}}, dimensions={0}", (0, 1)),
            ("replica_groups=[4,2]<=[8], x=1", (0, 1)),
            ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", (0, 4)),
            ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", (0, 4)),
            ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", (0, 1, 2, 3)),
            ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1", (0, 1, 2, 3)),
            ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x=1", (0, 4)),
            ("replica_groups=mesh['a'=8] {'a'}", tuple(range(8))),
            ("source_target_pairs={{0,2},{2,4},{4,0},{1,3}}, x=1", (0, 2, 4)),
            ("x=1", ()),
        ],
    )
    def test_groups_of_devices(self, text, expected):
        assert hlo.group_of(text) == expected

    def test_bytes_that_devices_exchange(self):
        mesh = mesh_of(8, fsdp=8)
        whole = jax.NamedSharding(mesh, jax.P())
        split = jax.NamedSharding(mesh, jax.P("fsdp"))
        array = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=split)
        text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(array).compile().as_text()
        (gather,) = hlo.collectives(hlo.parse(text))
        assert gather.kind == "all-gather" and gather.group == tuple(range(8))
        assert gather.sent == 1024 * 256 * 4 * 7 / 8

    def test_a_reduction_sends_twice_what_a_scatter_sends(self):
        def sums(x, *, scatter):
            if scatter:
                return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
            return jax.lax.psum(x, "fsdp")

        sent = {}
        for scatter in (True, False):
            mesh = mesh_of(8, fsdp=8)
            fn = jax.shard_map(
                functools.partial(sums, scatter=scatter), mesh=mesh, in_specs=jax.P(),
                out_specs=jax.P("fsdp" if scatter else None), check_vma=False,
            )  # fmt: skip
            array = jax.ShapeDtypeStruct((1024, 8), jnp.float32)
            text = jax.jit(fn).lower(array).compile().as_text()
            sent[scatter] = sum(x.sent for x in hlo.collectives(hlo.parse(text)))
        assert sent[False] == 2 * sent[True] == 2 * 1024 * 8 * 4 * 7 / 8

    def test_exchanges_between_slices_of_tpus(self):
        """The hosts make them of what each device sends; here between two slices, in a loop."""
        text = """
%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p = (s32[], bf16[64,128]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %now = token[] after-all()
  %send.1 = (bf16[64,128]{1,0}, u32[], token[]) send(%x, %now), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:255}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%next, %x)
}
%condition (p.1: (s32[], bf16[64,128])) -> pred[] {
  %p.1 = (s32[], bf16[64,128]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}
ENTRY %main (x.1: bf16[64,128]) -> (s32[], bf16[64,128]) {
  %x.1 = bf16[64,128]{1,0} parameter(0)
  %four = s32[] constant(4)
  %start = (s32[], bf16[64,128]{1,0}) tuple(%four, %x.1)
  ROOT %while.1 = (s32[], bf16[64,128]{1,0}) while(%start), condition=%condition, body=%body
}
""".replace("\\\n", "")
        (exchange,) = hlo.collectives(hlo.parse(text))
        assert exchange.kind == "all-reduce" and exchange.group == ()
        assert exchange.runs == 6 and exchange.sent == 64 * 128 * 2

    def test_a_gather_spread_over_fusions_counts_once(self):
        line = "  %gather.{} = bf16[8,128]{{1,0}} all-gather(%q.{}), replica_groups={{{{0,1}}}}\n"
        parts = []
        for number, name in enumerate(("start", "async_collective_fusion.1", "last")):
            parts.append(
                f"%{name} (q.{number}: bf16[4,128]) -> bf16[8,128] {{\n"
                f"  %q.{number} = bf16[4,128]{{1,0}} parameter(0)\n"
                + line.format(number, number).replace("  %", "  ROOT %")
                + "}\n"
            )
        calls = (
            ("async-collective-start", "start"),
            ("fusion.1", "async_collective_fusion.1"),
            ("async-collective-done", "last"),
        )
        body = "".join(
            f"  %{name} = bf16[8,128]{{1,0}} fusion(%x), kind=kCustom, calls=%{called}\n"
            for name, called in calls
        )
        entry = "ENTRY %main (x: bf16[4,128]) -> bf16[8,128] {\n"
        entry += "  %x = bf16[4,128]{1,0} parameter(0)\n"
        (gather,) = hlo.collectives(hlo.parse("".join(parts) + entry + body + "}\n"))
        assert gather.sent == 8 * 128 * 2 / 2 and gather.runs == 1


class TestFlops:
    @pytest.mark.parametrize("devices", [1, 8])
    @pytest.mark.parametrize("remat, forward_passes", [("none", 1), ("full", 2)])
    def test_products_of_a_step(self, devices, remat, forward_passes):
        """Those of the model by its formula; the reference's attention computes full squares."""
        cfg = small_run(remat=remat, attention="reference", compute_dtype="float32")
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(1, 1, devices, 1, 1))
        topology = dataclasses.replace(eight_devices(), devices=jax.devices()[:devices])
        program = compile_step(cfg, topology)
        tokens, model = program.tokens, cfg.model
        once = flops_per_token(model, ROW) + 6 * model.num_layers * ROW * model.d_model
        again = (once - 6 * model.vocab_size * model.d_model) / 3
        again -= 2 * model.num_layers * model.d_model * model.d_ff  # no gradient needs `down`
        expected = tokens * (once + (forward_passes - 1) * again)
        assert program.work.attention == 0
        assert program.work.products == pytest.approx(expected, rel=1e-3)

    def test_an_unknown_kernel_is_not_passed_over(self):
        from jax.experimental import pallas

        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...]

        shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        call = pallas.pallas_call(kernel, out_shape=shape, interpret=True)
        with pytest.raises(ValueError, match="not known"):
            flops.count(jax.make_jaxpr(call)(jnp.ones(shape.shape)))


class TestChecks:
    def test_the_step_is_clean(self):
        """But for what XLA does on CPUs: it sums the gradients of layers whole."""
        of_layers = ("[256, 256]", "[256, 384]", "[384, 256]")
        program = compile_step(small_run(compute_dtype="float32"), eight_devices())
        for problem in checks.all_problems(program):
            assert "all-reduce of a whole" in problem, problem
            assert any(shape in problem for shape in of_layers), problem

    def test_a_gradient_that_every_device_gets_whole(self, monkeypatch):
        def sum_and_slice(x, *, over, into, dimension):
            del into
            size = x.shape[dimension] // 8
            start = jax.lax.axis_index("fsdp") * size
            whole = jax.lax.optimization_barrier(sharding.sum_over(x, *over))
            return jax.lax.dynamic_slice_in_dim(whole, start, size, dimension)

        monkeypatch.setattr(losses, "scatter_sum", sum_and_slice)
        problems = checks.reduced_weights(compile_step(small_run(), eight_devices()))
        assert any("all-reduce of a whole weight f32[1024, 256]" in x for x in problems)

    def test_weights_gathered_in_float32(self):
        """As XLA for CPUs does, which multiplies in float32; see also test_plan_compiled.py."""
        problems = checks.gathered_weights(planned())
        assert problems and all("gathered as f32, not bf16" in problem for problem in problems)

    def test_a_state_that_is_not_donated(self, monkeypatch):
        def keeps_the_old_state(stage, num_microbatches):
            return jax.jit(step.make_train_step(stage, num_microbatches))

        monkeypatch.setattr("qwen_jax.plan.program.jit_train_step", keeps_the_old_state)
        (problem,) = checks.donation(compile_step(small_run(), eight_devices()))
        assert "do not take the memory of the donated state" in problem

    def test_logits_of_all_positions(self, monkeypatch):
        real = losses._score_chunks

        def in_one_piece(hidden_BLD, *rest, chunk, with_grad):
            return real(hidden_BLD, *rest, chunk=hidden_BLD.shape[1], with_grad=with_grad)

        monkeypatch.setattr(losses, "_score_chunks", in_one_piece)
        problems = checks.logits(compile_step(small_run(), eight_devices()))
        assert problems and "more than the 32 positions" in problems[0]

    def test_an_attention_kernel_that_runs_twice(self):
        """Read off a text, for no such kernel compiles for a CPU."""
        line = '  %splash_mha_fwd.{} = f32[8]{{0}} custom-call(%p), custom_call_target="tpu"\n'
        head = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        cfg = small_run(attention="splash", num_layers=1, remat="save_matmuls")
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_microbatches=1))
        for times, clean in ((1, True), (2, False)):
            text = head + "".join(line.format(n) for n in range(times)) + "}\n"
            work = dataclasses.replace(planned().work, module=hlo.parse(text))
            program = dataclasses.replace(planned(), config=cfg, work=work)
            assert (checks.attention_runs(program) == []) == clean

    def test_residuals_are_what_saves_the_second_run(self, monkeypatch):
        """Without them the backward pass computes the attention's products once more."""
        cfg = small_run(remat="save_matmuls")
        kept = compile_step(cfg, eight_devices()).work.products
        monkeypatch.setattr(transformer, "RESIDUALS", "another name")
        assert compile_step(cfg, eight_devices()).work.products > 1.005 * kept


class TestTiming:
    def test_resources_of_a_step(self):
        found = timing.estimate(planned())
        assert found.step == max(found.core, found.links, found.network)
        assert found.network == 0 and found.links > 0 and found.memory > 0
        slow = dataclasses.replace(planned(), topology=eight_devices(_slow(link=1e3)))
        assert timing.estimate(slow).bound == "links"
        assert timing.estimate(slow).links == pytest.approx(found.links * 1e6)

    def test_another_node_is_reached_over_the_network(self):
        class TwoNodes(Topology):
            def slice_of(self, device):
                return device.id // 4

        spread = dataclasses.replace(
            planned(), topology=TwoNodes("two", ROOMY, jax.devices()[:8], 1)
        )
        found = timing.estimate(spread)
        assert found.network > found.links

    def test_traffic_of_slices(self):
        """A loop that reads one row at a time moves the array once, not once a turn."""

        def one_row_at_a_time(x):
            return jax.lax.scan(lambda total, row: (jnp.tanh(total + row), None), x[0], x)[0]

        module = compiled(one_row_at_a_time, (512, 4096))
        array = 512 * 4096 * 4
        assert array < timing.traffic(module) < 6 * array

    def test_a_product_reads_a_slice_two_fusions_deep(self):
        """As TPUs do with what a layer left for its backward pass, stacked over the layers."""
        text = """
%slices (a: bf16[80,64,32], n: s32[]) -> bf16[64,32] {
  %a = bf16[80,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,32]{2,1,0} dynamic-slice(%a, %n, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%one)
}
%multiplies (p: bf16[80,64,32], q: s32[], w: bf16[32,16]) -> bf16[64,16] {
  %p = bf16[80,64,32]{2,1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(2)
  %q = s32[] parameter(1)
  %x = bf16[64,32]{1,0} fusion(%p, %q), kind=kLoop, calls=%slices
  ROOT %y = bf16[64,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (s: bf16[80,64,32], i: s32[], v: bf16[32,16]) -> bf16[64,16] {
  %s = bf16[80,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = bf16[32,16]{1,0} parameter(2)
  ROOT %out = bf16[64,16]{1,0} fusion(%s, %i, %v), kind=kOutput, calls=%multiplies
}
"""
        moved = timing.product_traffic(hlo.parse(text))
        assert moved == 2 * (64 * 32 + 32 * 16 + 64 * 16) + 4


class TestBetweenSteps:
    def test_an_open_loop_turns_as_often_as_it_is_said(self):
        """The matrix is read in every turn, and multiplied."""

        def until_large(x, w):
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e9, lambda x: x @ w, x)

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 512), (512, 512))]
        traced = jax.jit(until_large).trace(*shapes)
        assert flops.open_loops(traced.jaxpr) == 1
        text = traced.lower().compile().as_text()
        once, often = (timing.product_traffic(hlo.parse(text, turns)) for turns in (1, 100))
        assert once == pytest.approx(4 * 512 * 514) and often == 100 * once
        assert flops.count(traced.jaxpr, 100)[0] == 100 * flops.count(traced.jaxpr)[0] > 0

    def test_rollouts_take_time_and_memory(self):
        """Twice the tokens, about twice the time to draw them; each update has its share of it."""
        short, long = (compile_step(small_ppo(length), eight_devices()) for length in (64, 128))
        figures = report.as_dict(long, price=None)
        names = ["drawing answers", "measuring them"]
        assert list(figures["between_steps"]) == names and figures["steps_between"] == 2
        drawing = [timing.between(program)[names[0]] for program in (short, long)]
        assert 1.7 < drawing[1].step / drawing[0].step < 3
        assert drawing[1].products > drawing[1].attention  # weights are read for every token
        share = sum(x.step for x in timing.between(long).values()) / 2
        assert timing.with_between(long) == timing.estimate(long).step + share
        assert figures["days"] == 400 * timing.with_between(long) / 86_400
        assert "drawing answers, once in 2 steps: peak" in report.as_text(figures)

    def test_a_rollout_that_does_not_fit(self, monkeypatch):
        """XLA for CPUs counts only arguments and results in a peak: without the first check."""
        cfg = small_ppo(128, queries=512)
        needed = compile_step(cfg, eight_devices()).between["measuring them"].peak
        monkeypatch.setattr("qwen_jax.plan.program.state_bytes", lambda cfg, mesh: (0, 0))
        with pytest.raises(DoesNotFit, match="measuring them needs .* ppo.gather_policy"):
            compile_step(cfg, eight_devices(_slow(memory=needed - 1)))


def _slow(**changes) -> Chip:
    return dataclasses.replace(ROOMY, **changes)


class TestMemory:
    def test_the_state_alone_is_too_large(self):
        cramped = eight_devices(_slow(memory=10_000))
        with pytest.raises(DoesNotFit, match="parameters, moments and gradients take") as error:
            compile_step(small_run(), cramped)
        said = search.advice(small_run(), cramped, error.value)
        assert "must be spread" in said and "v5e" in said

    @pytest.mark.parametrize(
        "said",
        [
            "Ran out of memory in memory space hbm. Used 33.91G of 15.75G hbm",
            "Ran out of memory on HBM, the total memory required for HLO temporaries (33.91G) "
            "exceeds available HBM (15.75G).",
        ],
    )
    def test_the_activations_are_too_large(self, said, monkeypatch):
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
        cfg = small_run(remat="none")
        with pytest.raises(DoesNotFit, match=r"needs 33.91 GiB .* has 8.00 GiB") as error:
            compile_step(cfg, eight_devices())
        assert error.value.needed == 33.91 * 2**30
        said = search.advice(cfg, eight_devices(), error.value)
        assert "--config.train.num_microbatches=" in said and "--config.model.remat=" in said

    def test_another_fault_of_the_compiler_is_not_hidden(self, monkeypatch):
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            compile_step(small_run(), eight_devices())

    def test_state_bytes(self):
        cfg = small_run()
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(cfg.model)))
        state, gradients = state_bytes(cfg, planned().mesh)
        assert gradients == pytest.approx(4 * count / 8, rel=0.02)
        assert state == pytest.approx(12 * count / 8, rel=0.02)


class TestSearch:
    def test_it_is_never_worse_than_what_was_given(self):
        said = []
        cfg = small_run()
        best = search.best_setting(cfg, eight_devices(), 3, said.append)
        assert best is not None and len(said) == 3
        found = timing.estimate(best)
        assert found.step <= timing.estimate(planned()).step
        assert f"{found.step:.2f}" in " ".join(said)

    def test_no_setting_fits(self):
        assert search.best_setting(small_run(), eight_devices(_slow(memory=1)), 2, print) is None

    def test_guesses_follow_what_is_kept(self):
        mesh = planned().mesh
        sizes = {
            policy: search.guess(small_run(remat=policy), eight_devices(), mesh).num_bytes
            for policy in ("none", "save_matmuls", "save_attention", "full")
        }
        assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


class TestReport:
    def test_figures_and_page(self):
        program = planned()
        found = timing.estimate(program)
        figures = report.as_dict(program, price=2.0)
        assert figures["devices"] == 8 and figures["mesh"] == {"fsdp": 8}
        assert figures["days"] == pytest.approx(400 * found.step / 86_400)
        assert figures["cost"] == pytest.approx(figures["days"] * 24 * 8 * 2.0)
        share = program.model_flops / (found.step * 8 * 1e12)
        assert figures["mfu"] == pytest.approx(share)
        page = report.as_text(figures)
        assert "all-gather" in page and "MFU" in page and "cost" in page

    def test_overrides_to_paste(self):
        base = small_run()
        other = dataclasses.replace(
            base,
            mesh=dataclasses.replace(base.mesh, fsdp=4, tensor=2),
            model=dataclasses.replace(base.model, remat="none"),
        )
        expected = "--config.mesh.fsdp=4 --config.mesh.tensor=2 --config.model.remat=none"
        assert report.overrides(other, base) == expected
        assert report.overrides(base, base) == ""


class TestCommand:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "--topology is missing"),
            (["--topology=v9:2x2"], "chips: v4, v5e, v5p"),
            (["--topology=v5p:2x4x4x4"], "has 3 dimensions"),
            (["--topology=h100:3x5"], "at most 8 GPUs a node"),
            (["--topology=h100:8", "--slices=2"], "nodes of GPUs"),
            (["--topology=v5e:2x2", "--slices=0"], "--slices=0"),
            (["--topology=v5e:2x2", "--config.mesh.fdsp=2"], "did you mean"),
        ],
    )
    def test_mistakes(self, arguments, message, capsys):
        assert main(["plan", "--config=configs/tiny.py", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_every_chip_has_figures(self):
        for chip in CHIPS.values():
            assert min(chip.peak_flops, chip.memory, chip.memory_bandwidth, chip.link) > 0
            assert chip.platform == "gpu" or (chip.torus and chip.wraps)

    def test_without_a_compiler(self):
        from importlib.util import find_spec

        if find_spec("libtpu") or find_spec("jax_cuda13_plugin"):
            pytest.skip("the compilers are installed")
        for name in ("v5e:2x2", "h100:8"):
            with pytest.raises(ValueError, match="make plan-env"):
                find_topology(name)
