"""Before any backend starts: eight CPU devices, JAX at its strictest, and laws that draw the same every time."""

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("laws", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.load_profile("laws")
