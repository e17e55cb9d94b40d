"""Eight CPU devices, strict ranks and a compilation cache for every test; set before JAX starts."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Compilation is most of the suite's time, and unoptimised machine code computes the same.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.setdefault("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "qwen_jax_test_cache")
)

import jax  # noqa: E402
import pytest  # noqa: E402
from golden_files import Golden  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/ instead of comparing"
    )


@pytest.fixture
def golden(request):
    return Golden(request.config.getoption("--update-golden"))
