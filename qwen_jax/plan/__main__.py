"""`python -m qwen_jax.plan --config=configs/7b.py --topology=v5p:2x4x4`: without the hardware.

Compiles the very step that `qwen_jax.train` would run and prints memory, exchanges between devices
and a modelled step time. Exit codes: 0 it fits, 2 a wrong setting or a missing compiler, 3 it does
not fit; then what would is said.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qwen_jax import commandline, sharding
from qwen_jax.config import Config
from qwen_jax.plan import hardware, report, search
from qwen_jax.plan.program import DoesNotFit, compile_step
from qwen_jax.train import EXIT_CONFIG, check_mesh, resolve_backend

EXIT_DOES_NOT_FIT = 3


def main(argv: Sequence[str]) -> int:
    """Makes one plan, or searches for one; returns the exit code."""
    try:
        values = parse_flags(argv)
        cfg, topology = read(values)
        if values.search:
            return _search(cfg, topology, values)
        program = compile_step(cfg, topology)
    except ValueError as error:
        _log(f"error: {error}")
        return EXIT_CONFIG
    except DoesNotFit as error:
        _log(f"does not fit: {error}")
        _log(search.advice(cfg, topology, error))
        return EXIT_DOES_NOT_FIT
    if values.hlo:
        Path(values.hlo).write_text(program.text)
    _write(report.as_dict(program, values.price), values)
    return 0


def read(values: flags.FlagValues) -> tuple[Config, hardware.Topology]:
    """The checked config, its attention decided, and the devices.

    Raises:
      ValueError: as `train` would, or there is no such topology or no compiler for it.
    """
    cfg = Config.from_dict(values.config.to_dict())
    hardware.use_cpu_for_the_rest()
    topology = hardware.find_topology(values.topology, values.slices)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices)
    check_mesh(cfg, mesh)
    return resolve_backend(cfg, mesh, _log), topology


def _search(cfg: Config, topology: hardware.Topology, values: flags.FlagValues) -> int:
    best = search.best_setting(cfg, topology, values.compilations, _log)
    if best is None:
        _log("does not fit: none of the settings tried")
        return EXIT_DOES_NOT_FIT
    _write(report.as_dict(best, values.price), values)
    changes = report.overrides(best.config, cfg)
    print(f"best setting found: {changes or 'the one that was given'}")
    return 0


def _write(figures: dict, values: flags.FlagValues) -> None:
    print(report.as_text(figures))
    if values.json:
        Path(values.json).write_text(json.dumps(figures, indent=2) + "\n")


def parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The command line (ValueError for every mistake on it)."""
    values = commandline.run_flags()
    own = {"flag_values": values}
    flags.DEFINE_string("topology", "", "v5p:2x4x4, h100:8, h100:4x8 (nodes x GPUs), ...", **own)
    flags.DEFINE_integer("slices", 1, "slices of TPUs", **own)
    flags.DEFINE_float("price", None, "of one device for one hour", 0, **own)
    flags.DEFINE_string("json", "", "writes the figures to this file as well", **own)
    flags.DEFINE_string("hlo", "", "writes the compiled program to this file", **own)
    flags.DEFINE_bool("search", False, "tries meshes, microbatches and remat policies", **own)
    flags.DEFINE_integer("compilations", 6, "settings that --search compiles at most", 1, **own)
    commandline.parse_run(values, argv)
    if not values.topology:
        raise ValueError("--topology is missing; for example --topology=v5p:2x4x4")
    return values


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
    sys.exit(main(sys.argv))
