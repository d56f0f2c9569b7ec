"""Before any backend starts: eight CPU devices, JAX at its strictest, and laws that draw the same every time."""

import itertools
import os
import pathlib

# Most of the time goes into compiling programs that run once on small arrays, so LLVM need not try hard. What XLA fuses
# and allocates, which the tests of memory look at, stays as users get it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

# What was compiled once is read back by the next run, and by the scripts that tests start. JAX reads these when it is
# imported.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--fuzz-minutes", type=float, default=1, help="how long each test of test_fuzz.py draws cases")
    parser.addoption("--fuzz-first", type=int, help="the first case of test_fuzz.py; the clock's by default")
    parser.addoption("--fuzz-seed", type=int, help="the one case of test_fuzz.py to run")


hypothesis.settings.register_profile("laws", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.load_profile("laws")


def pytest_collection_modifyitems(items):
    """XLA on CPU writes copies of the logits out before jaxlib 0.10.2, and a test of memory would count them."""
    if jax.__version_info__ < (0, 10, 2):
        for item in items:
            if item.get_closest_marker("memory"):
                item.add_marker(pytest.mark.skip(reason="memory is that of jaxlib 0.10.2 and newer"))


TESTS = itertools.count(1)
MAPS = pathlib.Path("/proc/self/maps")


def pytest_runtest_teardown():
    """Every compiled program maps memory, and Linux gives a process 65,530 maps: LLVM crashes at the next one."""
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()
