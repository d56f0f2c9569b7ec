"""One of two processes, or all there is: the loss of a layer and its gradients, on a mesh of all devices.

python process_worker.py COORDINATOR INDEX RESULTS
"""

import functools
import itertools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import linear_cross_entropy

# What is split over the processes: where each argument of `loss` lies.
LAYOUTS = {
    "tokens": (P("x"), P(), P("x"), P("x"), P(), P()),
    "classes": (P(), P(None, "x"), P(), P(), P("x"), P("x")),
    "FSDP": (P("x"), P("x", None), P("x"), P("x"), P(), P()),
    "FSDP along K": (P("x"), P(None, "x"), P("x"), P("x"), P("x"), P()),
}
PLANS = {"tokens": {"chunk_size": 2}, "classes": {"block_size": 5}}


def problem():
    """Hidden states, kernel, labels, weights, prior, classes that exist; weights differ much over the processes."""
    rng = np.random.default_rng(0)
    tokens, features, classes = 12, 4, 14
    exists = np.arange(classes) < classes - 1
    weights = np.where(np.arange(tokens) < tokens // 2, 3, [1, 0] * (tokens // 2))
    arrays = [rng.normal(size=(tokens, features)), rng.normal(size=(features, classes))]
    arrays += [rng.integers(0, classes - 1, tokens).astype(np.int32), weights, rng.dirichlet(np.ones(classes)), exists]
    return [x.astype(np.float32) if x.dtype.kind == "f" or x is weights else x for x in arrays]


def loss(hidden, kernel, labels, weights, prior, exists, plan="tokens"):
    options = {"smoothing": 0.3, "prior": prior, "weights": weights, "class_where": exists, "plan": plan}
    return linear_cross_entropy(hidden, kernel, labels, **options, **PLANS[plan])


def results():
    """Of each layout and plan the loss, and its gradients in hidden, kernel, weights and prior."""
    out = {}
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, P())
    for (name, specs), plan in itertools.product(LAYOUTS.items(), PLANS):
        with jax.set_mesh(mesh):
            arrays = [
                jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i, x=x: x[i])
                for x, spec in zip(problem(), specs, strict=True)
            ]
            step = jax.value_and_grad(functools.partial(loss, plan=plan), argnums=(0, 1, 3, 4))
            value, slopes = jax.jit(step)(*arrays)
            gathered = jax.jit(jax.sharding.reshard, static_argnums=1)(slopes, whole)
        named = zip(("loss", "hidden", "kernel", "weights", "prior"), (value, *gathered), strict=True)
        out |= {f"{name}, {plan}: {key}": np.asarray(x.addressable_data(0)) for key, x in named}
    return out


def main(coordinator, index, path):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(index), initialization_timeout=45)
    assert (jax.process_count(), jax.device_count()) == (2, 2)
    np.savez(path, **results())
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
