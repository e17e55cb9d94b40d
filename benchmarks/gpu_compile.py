"""Compiles the programs of `benchmarks/gpu.py` for a GPU that is not here, and says what they need.

    .venv-plan/bin/python -m benchmarks.gpu --compile_only --topology=h100:1 --json=predicted.json

Needs the compilers of `make plan-env`. The steps of training go through `qwen_jax.plan`.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.gpu_figures import say
from benchmarks.gpu_ours import decode_config, endless
from benchmarks.gpu_setups import SETUPS, decoding
from qwen_jax import assembly, sharding
from qwen_jax.config import Config
from qwen_jax.generate.decode import begin, extend, unrolled
from qwen_jax.generate.sampling import SamplingConfig
from qwen_jax.plan import hardware
from qwen_jax.plan.hardware import Topology
from qwen_jax.plan.program import DoesNotFit, compile_step
from qwen_jax.stages import pretrain
from qwen_jax.stages.experience import draw_answers, make_writer, measure_fn
from qwen_jax.stages.networks import networks
from qwen_jax.train import resolve_backend
from qwen_jax.trainer.state import abstract_state

GIB = 2**30


def compile_all(topology_name: str, timing: tuple[int, int], only: list[str]) -> list[dict]:
    """Every program, its memory and how long the compiler took.

    timing: warm-up and timed steps. only: ids of benchmarks.

    Raises:
      ValueError: no such topology, or no compiler for it.
    """
    hardware.use_cpu_for_the_rest()
    topology = hardware.find_topology(topology_name)
    programs: dict[str, Callable[[], tuple[int, int]]] = {}
    for name, setup in SETUPS.items():
        if name.split()[0] not in only:
            continue
        cfg = setup(smoke=False)
        mesh = sharding.make_mesh(cfg.mesh, topology.devices)
        cfg = resolve_backend(cfg, mesh, say)
        programs[f"{name} step"] = functools.partial(_step, cfg, topology)
        if cfg.ppo is not None:
            programs |= _rollout(name, cfg, mesh, topology)
    if "D1" in only:
        programs |= _decoding(sum(timing), topology)
    results = []
    for name, program in programs.items():
        began = time.perf_counter()
        try:
            arguments, peak = program()
        except DoesNotFit as error:
            results.append({"name": name, "fits": False, "says": str(error)})
        else:
            fits = peak <= topology.chip.memory
            secs = time.perf_counter() - began
            found = {"arguments": arguments, "peak": peak, "limit": topology.chip.memory}
            results.append({"name": name, "fits": fits, "secs": secs} | found)
        say(line(results[-1]))
    return results


def line(found: dict) -> str:
    """One program for people."""
    if "peak" not in found:
        return f"{found['name']:28} DOES NOT FIT: {found['says']}"
    sizes = (f"{found[name] / GIB:8.2f}" for name in ("arguments", "peak", "limit"))
    verdict = "" if found["fits"] else "  DOES NOT FIT"
    return f"{found['name']:28}{' '.join(sizes)} GiB {found['secs']:6.0f} s{verdict}"


def _step(cfg: Config, topology: Topology) -> tuple[int, int]:
    memory = compile_step(cfg, topology).memory
    return memory.arguments, memory.peak


def _needs(lowered) -> tuple[int, int]:
    found = lowered.compile().memory_analysis()
    return found.argument_size_in_bytes, found.peak_memory_in_bytes


def _rollout(name: str, cfg: Config, mesh, topology: Topology) -> dict[str, Callable]:
    """Drawing and measuring the answers of one rollout, the rest of the state beside them."""
    ppo, nets, ends = cfg.ppo, networks(cfg.model, cfg.lora), endless(cfg.model.vocab_size)
    parts = assembly.skeleton(cfg)
    state = abstract_state(parts.init, parts.tx, jax.random.key(0), mesh, parts.trained)
    vocab, answers = cfg.model.vocab_size, ppo.queries * ppo.responses_per_query

    def placed(tree):
        return sharding.abstract_batch(tree, mesh)

    def everywhere(tree):
        where = sharding.replicated(mesh)
        return jax.tree.map(lambda x: shape_at(x, where), tree)

    draw = functools.partial(
        draw_answers, cfg=cfg.model, ppo=ppo, ends=ends, num_real=vocab,
        sampling=SamplingConfig(ppo.temperature, 0, ppo.top_p),
    )  # fmt: skip
    num_parts = answers * cfg.train.num_microbatches // cfg.data.batch_size
    measure = measure_fn(cfg.model, ppo, nets, ends, vocab, num_parts)
    writer = make_writer(cfg.model, ppo, nets)
    with sharding.use_mesh(mesh):
        policy = everywhere(jax.eval_shape(writer, state.params))
        query = {
            "prompt": jax.ShapeDtypeStruct((ppo.queries, ppo.prompt_len), jnp.int32),
            "prompt_len": jax.ShapeDtypeStruct((ppo.queries,), jnp.int32),
        }
        key = everywhere(jax.eval_shape(lambda: jax.random.key(0)))
        rows = jax.eval_shape(draw, policy, query, key)

    def drawing():
        with jax.default_device(topology.devices[0]), sharding.use_mesh(mesh):
            arguments, peak = _needs(jax.jit(draw).lower(policy, placed(query), key))
        beside = sharding.bytes_per_device(state)
        return arguments + beside, peak + beside

    def measuring():
        with jax.default_device(topology.devices[0]), sharding.use_mesh(mesh):
            arguments, peak = _needs(jax.jit(measure).lower(state.params, placed(rows)))
        beside = sharding.bytes_per_device(state.opt_state)
        return arguments + beside, peak + beside

    return {f"{name} generate": drawing, f"{name} score": measuring}


def shape_at(x, where) -> jax.ShapeDtypeStruct:
    """The same shape on the device that is compiled for."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _decoding(pieces: int, topology: Topology) -> dict[str, Callable]:
    """Reading the prompts and the steps after them, for each batch size of D1."""
    setup = decoding(smoke=False)
    model, made_for = setup.model, decode_config(setup, pieces)
    where = jax.sharding.SingleDeviceSharding(topology.devices[0])
    width = setup.prompt_len(pieces)

    def here(tree):
        return jax.tree.map(lambda x: shape_at(x, where), tree)

    def weights():
        import flax.linen as nn

        return unrolled(nn.unbox(pretrain.init_fn(model)(jax.random.key(0))), cfg=model)

    params, key = here(jax.eval_shape(weights)), here(jax.eval_shape(lambda: jax.random.key(0)))
    programs = {}
    for batch in setup.batches:
        row = here(jax.ShapeDtypeStruct((batch,), jnp.int32))
        prompts = here(jax.ShapeDtypeStruct((batch, width), jnp.int32))
        asked = (params, prompts, row, key, row)

        def reading(asked=asked):
            with jax.default_device(topology.devices[0]):
                return _needs(begin.lower(*asked, made_for=made_for))

        def writing(asked=asked):
            state = here(jax.eval_shape(functools.partial(begin, made_for=made_for), *asked))
            until = here(jax.ShapeDtypeStruct((), jnp.int32))
            with jax.default_device(topology.devices[0]):
                return _needs(extend.lower(params, state, until, made_for=made_for))

        programs |= {f"D1 batch {batch} prompts": reading, f"D1 batch {batch} steps": writing}
    return programs
