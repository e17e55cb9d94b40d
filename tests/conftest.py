"""Eight CPU devices, strict ranks and a compilation cache for every test; set before JAX starts."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.setdefault("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] += f" {_FLAG}"
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
