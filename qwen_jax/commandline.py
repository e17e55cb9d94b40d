"""Flags and parsing shared by the commands that read a checkpoint."""

import sys
from collections.abc import Sequence

from absl import flags


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
