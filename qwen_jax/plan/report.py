"""What a plan says: a page for people, a dictionary for programs."""

from typing import Any

from qwen_jax.config import Config
from qwen_jax.plan import timing
from qwen_jax.plan.program import Program

GIB = 2**30
SECS_PER_DAY = 86_400


def as_dict(program: Program, price: float | None) -> dict[str, Any]:
    """All figures of a plan. price: of one device for one hour, in whatever currency."""
    cfg, chip, memory = program.config, program.topology.chip, program.memory
    estimate, between = timing.estimate(program), timing.between(program)
    devices, step, whole = program.mesh.size, estimate.step, timing.with_between(program)
    days = cfg.train.steps * whole / SECS_PER_DAY
    rows, work = cfg.data.batch_size // cfg.train.num_microbatches, program.work
    figures: dict[str, Any] = {
        "config": cfg.name,
        "stage": cfg.stage,
        "topology": program.topology.name,
        "slices": program.topology.slices,
        "devices": devices,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "attention": cfg.model.attention,
        "remat": cfg.model.remat,
        "num_microbatches": cfg.train.num_microbatches,
        "rows_per_microbatch": rows,
        "compile_secs": program.compile_secs,
        "memory_gib": {
            "arguments": memory.arguments / GIB,
            "temporaries": memory.temporaries / GIB,
            "peak": memory.peak / GIB,
            "limit": chip.memory / GIB,
            "headroom": (chip.memory - memory.peak) / GIB,
            "host": memory.host / GIB,
        },
        "between_steps": {
            name: {
                "peak_gib": other.peak / GIB,
                "secs": between[name].step,
                "bound": between[name].bound,
            }
            for name, other in program.between.items()
        },
        "steps_between": program.steps_between,
        "collectives": [
            {"kind": x.kind, "over": x.link, "calls": x.calls, "gb": x.sent / 1e9, "secs": x.secs}
            for x in estimate.exchanges
        ],
        "step_secs": step,
        "bound": estimate.bound,
        "secs": {
            "products": estimate.products,
            "attention": estimate.attention,
            "memory": estimate.memory,
            "links": estimate.links,
            "network": estimate.network,
            "host": estimate.host,
        },
        "mfu": program.model_flops / (step * devices * chip.peak_flops),
        "recomputation": (work.products + work.attention) / program.model_flops - 1,
        "tokens_per_sec": program.tokens / whole,
        "tokens_per_day": program.tokens / whole * SECS_PER_DAY,
        "tokens": program.tokens * cfg.train.steps,
        "days": days,
    }
    if price is not None:
        figures["cost"] = days * 24 * devices * price
    return figures


def as_text(figures: dict[str, Any]) -> str:
    """The page."""
    memory, secs = figures["memory_gib"], figures["secs"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()) or "one device"
    slices = f"{figures['slices']} slices of " if figures["slices"] > 1 else ""
    lines = [
        f"{figures['config']} ({figures['stage']}) on {slices}{figures['topology']}: "
        f"{figures['devices']} devices, {mesh}; {figures['num_microbatches']} microbatches of "
        f"{figures['rows_per_microbatch']} rows, remat {figures['remat']}, attention "
        f"{figures['attention']}; compiled in {figures['compile_secs']:.0f} s",
        f"memory of one device: arguments {memory['arguments']:.2f}, temporaries "
        f"{memory['temporaries']:.2f}, peak {memory['peak']:.2f} of {memory['limit']:.2f} GiB, "
        f"headroom {memory['headroom']:.2f}"
        + (f", on the host {memory['host']:.2f}" if memory["host"] else ""),
    ]
    for name, other in figures["between_steps"].items():
        lines.append(
            f"{name}, once in {figures['steps_between']} steps: peak {other['peak_gib']:.2f} GiB, "
            f"modelled {other['secs']:.2f} s, bound by {other['bound']}"
        )
    lines.append("what one device sends in a step:")
    for x in figures["collectives"]:
        lines.append(
            f"  {x['kind']:<20}{x['over']:<9}{x['calls']:>9,.0f} times {x['gb']:>10,.2f} GB "
            f"{x['secs']:>8.3f} s"
        )
    lines += [
        "modelled step (a roofline, not a measurement): " + f"{figures['step_secs']:.2f} s, bound "
        f"by {figures['bound']}",
        "  " + ", ".join(f"{name} {value:.2f}" for name, value in secs.items()) + " s",
        f"  MFU {100 * figures['mfu']:.1f} %, recomputation {100 * figures['recomputation']:.0f} % "
        f"of the model's FLOPs, {figures['tokens_per_sec']:,.0f} tokens/s",
        f"  {figures['tokens_per_day'] / 1e9:,.1f} billion tokens a day, "
        f"{figures['tokens'] / 1e9:,.1f} billion in {figures['days']:,.1f} days"
        + (f", cost {figures['cost']:,.0f}" if "cost" in figures else ""),
    ]
    return "\n".join(lines)


def overrides(cfg: Config, base: Config) -> str:
    """What differs from another config in mesh, microbatches and remat, as flags to paste."""
    pairs = [
        (f"mesh.{axis}", getattr(cfg.mesh, axis), getattr(base.mesh, axis))
        for axis in vars(cfg.mesh)
    ]
    pairs += [
        ("train.num_microbatches", cfg.train.num_microbatches, base.train.num_microbatches),
        ("model.remat", cfg.model.remat, base.model.remat),
    ]
    return " ".join(f"--config.{name}={new}" for name, new, old in pairs if new != old)
