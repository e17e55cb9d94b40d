"""Where slices of the real benchmarks are, for tests that prove scorers on them."""

import os
from pathlib import Path

import pytest
from tiny import ROOT


def data_folder(name: str) -> Path:
    """The folder of one benchmark; skips the test where there is none.

    QWEN_JAX_EVAL_DATA names the folder that holds them; without it `../shared/data` is tried.
    """
    named = os.environ.get("QWEN_JAX_EVAL_DATA")
    folder = (Path(named) if named else ROOT.parent / "shared/data") / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set QWEN_JAX_EVAL_DATA to a folder with {name}/")
    return folder
