"""What is freed stays with the process; XLA gets the share of a GPU that plans count on."""

import os
import platform
import subprocess
import sys

import pytest
from tiny import ROOT

PROGRAM = """
import resource, sys
from qwen_jax.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
bytearray(64 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(64 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> int:
    command = [sys.executable, "-c", PROGRAM, argument]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_large_block_costs_its_page_faults_once():
    assert faults("keep") < 100
    assert faults("as it is") > 100


SHARE = """
from jaxlib import xla_client
from qwen_jax import train
assert train.main(["train", "--config=configs/1_8b.py", "--dry_run"]) == 0
print(xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"])
"""


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
@pytest.mark.parametrize("given", [None, "0.5"])
def test_share_of_a_gpu(name, given):
    """As JAX reads it when it looks for GPUs."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_FRACTION")}
    environment |= {} if given is None else {name: given}
    command = [sys.executable, "-c", SHARE]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=environment).stdout
    assert float(out.split()[-1]) == (0.92 if given is None else 0.5)
