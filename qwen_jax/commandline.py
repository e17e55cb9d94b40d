"""Flags and parsing shared by the commands that read a checkpoint or a config."""

import difflib
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags


def model_flags() -> flags.FlagValues:
    """New flags that name a language model: what `api.load` takes, and `--help`."""
    values = checkpoint_flags()
    flags.DEFINE_string("subtree", "", "`policy` for a checkpoint of PPO", flag_values=values)
    return values


def checkpoint_flags() -> flags.FlagValues:
    """New flags that name a checkpoint, and `--help`."""
    values = flags.FlagValues()
    own = {"flag_values": values}
    flags.DEFINE_string(
        "checkpoint", "", "workdir, one of its steps, Hugging Face directory or .gguf", **own
    )
    flags.DEFINE_string("dtype", "as_is", "of the parameters: as_is, float32 or bfloat16", **own)
    flags.DEFINE_string("tokenizer", "", "`official` or a file, instead of the model's own", **own)
    flags.DEFINE_bool("help", False, "shows this", **own)
    return values


def parse(
    values: flags.FlagValues, argv: Sequence[str], about: str, *, needs_checkpoint: bool = True
) -> None:
    """Reads the command line into the flags; `--help` prints `about` and the flags, and exits.

    Raises:
      ValueError: a flag that does not exist, a wrong value, a stray argument, or no checkpoint
        where the flags have one.
    """
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        # absl's own exit code for a bad flag is 1, which launchers would take for a crash.
        raise ValueError(str(error)) from error
    if values.help:
        print(f"{about}\n{values.main_module_help()}")
        sys.exit(0)
    if needs_checkpoint and "checkpoint" in values and not values.checkpoint:
        raise ValueError("--checkpoint=DIR is needed")
    if rest:
        raise ValueError(f"only flags are understood, --name=value; got {rest}")


def run_flags() -> flags.FlagValues:
    """New flags that name the config of a run, whose settings are flags too."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "a file in configs/", lock_config=True, flag_values=values
    )
    return values


def parse_run(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Reads a command line with a config.

    Raises:
      ValueError: every mistake on it; of an unknown setting the nearest known one is named.
    """
    sys.argv = list(argv)  # config_flags looks there for the overrides
    try:
        rest = values(argv)
        if len(rest) > 1:
            raise ValueError(f"unexpected arguments {rest[1:]}; settings are --config.name=value")
        if values.config is None:
            raise ValueError("--config is missing; for example --config=configs/tiny.py")
        # A file that cannot be read raises here, not when it was parsed.
        is_config = isinstance(values.config.lock(), ml_collections.ConfigDict)
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_setting(argv) or str(error)) from error
    except (flags.Error, TypeError, OSError) as error:
        raise ValueError(str(error)) from error
    if not is_config:
        raise ValueError("--config: get_config() of the file must return a ConfigDict")


def _unknown_setting(argv: Sequence[str]) -> str:
    """Names the first override of a setting that the config lacks, and its nearest neighbour."""
    files = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
    if not files:
        return ""
    path, _, argument = files[-1].split("=", 1)[1].partition(":")
    get_config = runpy.run_path(path)["get_config"]
    config = get_config(argument) if argument else get_config()
    known = [f"config.{name}" for name in _dotted(config.to_dict())]
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config.") and name not in known:
            group = name.rpartition(".")[0]
            keys = [key for parent, _, key in (k.rpartition(".") for k in known) if parent == group]
            near = difflib.get_close_matches(name.rpartition(".")[2], keys or known, n=1, cutoff=0)
            advice = f"--{group}.{near[0]}" if keys else f"--{near[0]}"
            return f"--{name}: there is no such setting; did you mean {advice}?"
    return ""


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
