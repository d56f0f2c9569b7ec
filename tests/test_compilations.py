"""Every public function compiles once for the same shapes, also without an outer `jax.jit`: the second call is free.

A function that builds its loops and derivatives anew at each call compiles at each call, is slow, and frees nothing.
"""

import contextlib
import doctest
import io

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from test_package import PUBLIC, named

import jax_ls
from jax_ls import calibration, chunked_loss, nnx, on_logits, online, plotting, sweeps, values, with_label_smoothing

mpl.use("Agg")

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """A list that gets an entry for each program that is compiled, or read from the persistent cache."""
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def example(name):
    """The example of a public name's docstring, to be run again and again with the same objects of the user's."""
    namespace = {public: getattr(jax_ls, public) for public in jax_ls.__all__}
    namespace |= {"jax_ls": jax_ls, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    (test,) = doctest.DocTestFinder(recurse=False).find(named(name), name, globs=namespace)
    lines = [compile(line.source, f"<{name}>", "single") for line in test.examples]

    def run(_):
        names = dict(namespace)
        with contextlib.redirect_stdout(io.StringIO()):
            for line in lines:
                exec(line, names)

    return run


N, K, D = 12, 5, 3


def batch(seed):
    """Logits, labels and masks of the same shapes, with other numbers for another seed."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, K, N), jnp.int32), jnp.asarray(rng.random(N) < 0.8)


def hidden(seed):
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((N, D), (D, K)))
    return x, w, jnp.asarray(rng.integers(0, K, N), jnp.int32)


def squares(logits, labels):
    return jnp.square(logits).sum(-1)


def trained(key, epsilon):
    return {"a": epsilon + jax.random.uniform(key)}


SMOOTHED = with_label_smoothing(optax.losses.softmax_cross_entropy, 0.1)
CHUNKED = chunked_loss(squares, chunk_size=4)
METRIC = nnx.CalibrationError()


# Where an example makes a new function, which has to be compiled, or holds too little.
def _max_suppression(z):
    return z.pick(z.likeliest) - z.mean()


# A formula that is defined anew for each call is compiled anew: `on_logits` says so. Users name theirs.
CALLS = {
    "on_logits": lambda seed: on_logits(_max_suppression, batch(seed)[0]),
    "Logits": lambda seed: on_logits(_max_suppression, batch(seed)[0]),
    "with_label_smoothing": lambda seed: SMOOTHED(batch(seed)[0], jax.nn.one_hot(batch(seed)[1], K)),
    "chunked_loss": lambda seed: CHUNKED(*hidden(seed)),
    "sweeps.sweep": lambda seed: sweeps.sweep(trained, np.linspace(0, 1 + seed, 4), 2),
    "plotting.plot_sweep": lambda seed: plotting.plot_sweep(sweeps.sweep(trained, np.linspace(0, 1 + seed, 4), 2)),
}

OPTIONS = {
    "fit_temperature": lambda z, y, w: calibration.fit_temperature(z, y, where=w, bounds=(0.1, 10.0)),
    "fit_temperature, no mask": lambda z, y, w: calibration.fit_temperature(z, y),
    "reliability by mass": lambda z, y, w: calibration.reliability(z, y, where=w, binning="mass", num_bins=3),
    "reliability by edges": lambda z, y, w: calibration.reliability(z, y, edges=jnp.linspace(0, 1, 4)),
    "classwise_reliability": lambda z, y, w: calibration.classwise_reliability(z, y, where=w, binning="mass"),
    "classwise_calibration_error": lambda z, y, w: calibration.classwise_calibration_error(z, y, where=w, norm=2),
    "expected_calibration_error": lambda z, y, w: calibration.expected_calibration_error(z, y, where=w, norm=2),
    "area_under_risk_coverage": lambda z, y, w: calibration.area_under_risk_coverage(z, y, where=w),
    "online": lambda z, y, w: online.next_epoch(online.update(online.init(K), z, y, where=w)),
    "online, decay": lambda z, y, w: online.update(online.init(K, decay=0.9), z, y, where=w),
    "metric": lambda z, y, w: METRIC.update(logits=z, labels=y, mask=w),
    "hl_gauss": lambda z, y, w: values.hl_gauss(z[:, 0], values.Support(-2, 2, 7), sigma_ratio=0.5),
    "grad of a loss": lambda z, y, w: jax.grad(mean_loss)(z, y, w),
}


def mean_loss(z, y, w):
    return jax_ls.mean(jax_ls.smoothed_cross_entropy(z, y, 0.1, where=w))


def assert_free(call):
    for seed in (0, 1):
        call(seed)
    with compilations() as found:
        call(2)
    plt.close("all")
    assert not found, f"{len(found)} programs were compiled at the third call"


def test_compilations_are_counted():
    with compilations() as found:
        jax.jit(lambda x: x + len(found))(jnp.zeros(3))
    assert found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_compiles_once(name):
    assert_free(CALLS.get(name) or example(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_compile_once(name):
    assert_free(lambda seed: OPTIONS[name](*batch(seed)))
