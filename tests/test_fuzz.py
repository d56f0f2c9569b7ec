"""Options drawn at random and crossed, against the definition: `python -m pytest -m fuzz --fuzz-minutes 10`.

A seed draws one case. What fails names its seed, and `--fuzz-seed N` runs that case alone. Seeds begin at the clock's,
or at `--fuzz-first N`, as in `.ci/run`, whose verdict does not depend on the day.
"""

import functools
import inspect
import time

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_linear

import jax_ls
from jax_ls import (
    Dense,
    OneHot,
    Rows,
    Sparse,
    Uniform,
    adaptive,
    cross_entropy,
    kl_divergence,
    noise,
    penalties,
    priors,
    sigmoid_cross_entropy,
    smooth,
    smoothed_cross_entropy,
)

pytestmark = pytest.mark.fuzz

BATCHES = [(), (1,), (5,), (2, 3), (0,)]
SIZES = [1, 2, 3, 7, 13]


def fuzz(case, request):
    """Runs `case(rng)` for seed after seed until the time is over."""
    if (only := request.config.getoption("--fuzz-seed")) is not None:
        print(case(np.random.default_rng(only)))
        return
    end, first = time.time() + 60 * request.config.getoption("--fuzz-minutes"), request.config.getoption("--fuzz-first")
    seed = first = time.time_ns() // 1000 % 2**40 if first is None else first
    while time.time() < end:
        try:
            case(np.random.default_rng(seed))
        except Exception as error:
            error.add_note(f"{request.node.name}: --fuzz-seed {seed}")
            raise
        seed += 1
    print(f"{request.node.name}: {seed - first} cases, seeds {first} to {seed - 1}")


class Draw:
    """What one case draws: shapes, which classes and examples count, and random numbers."""

    def __init__(self, rng, dtypes=cases.DTYPES):
        self.rng = rng
        self.batch, self.size = BATCHES[rng.integers(len(BATCHES))], SIZES[rng.integers(len(SIZES))]
        self.dtype = str(rng.choice(dtypes))
        self.shape = (*self.batch, self.size)
        kind = rng.choice(["all", "some", "each"])
        self.class_where = None if kind == "all" else self.bools(self.shape if kind == "each" else (self.size,))
        if self.class_where is not None:
            self.class_where[..., rng.integers(self.size)] = True
        self.exists = np.broadcast_to(True if self.class_where is None else self.class_where, self.shape)

    def maybe(self, chance=0.5):
        return self.rng.random() < chance

    def bools(self, shape):
        return self.rng.random(shape) < 0.7

    def each(self, low, high):
        """A number, or one for each example."""
        return self.rng.uniform(low, high, self.batch if self.maybe() else ())

    def labels(self):
        rows = [self.rng.choice(np.flatnonzero(self.exists[i])) for i in np.ndindex(self.batch)]
        return np.array(rows, np.int32).reshape(self.batch)

    def simplex(self, *shape, zeros=True):
        """Distributions; some of their entries are 0."""
        p = self.rng.dirichlet(np.ones(self.size), shape)
        if zeros and self.maybe():
            p = p * (self.rng.random(p.shape) < 0.7)
        return p

    def kept(self, p):
        """Distributions with mass on a class that exists, for every example."""
        return p + 0.01 * (np.arange(self.size) == np.argmax(self.exists.all(tuple(range(len(self.batch))))))

    def real(self, arrays):
        return cases.rounded(arrays, self.dtype)


def options_of(d, logits):
    """Options that losses share: for the call, and for the definition."""
    ours, exact = {}, {}
    if d.class_where is not None:
        ours["class_where"] = exact["class_where"] = d.class_where
    if d.maybe():
        ours["where"] = exact["where"] = d.bools(d.batch)
    arrays = {}
    if d.maybe():
        arrays["class_weights"] = d.rng.uniform(0, 2, d.size) * (d.rng.random(d.size) < 0.8)
    if d.maybe():
        arrays["z_loss"] = np.array(d.rng.uniform(0, 0.1))
    narrow, wide = d.real(arrays)
    return ours | narrow, exact | wide


def magnitude(z, exact, epsilon=0.0):
    """The size of the numbers that a loss sums."""
    top = float(np.max(np.abs(z), initial=1))
    size = 4 * (1 + top) * (1 + float(np.max(np.abs(epsilon), initial=0)))
    return size * float(np.max(exact.get("class_weights", 1.0), initial=1)) + exact.get("z_loss", 0.0) * (top + 3) ** 2


def logits_of(d):
    scale = 10 ** d.rng.uniform(-2, 1.3)
    narrow, wide = d.real({"z": scale * d.rng.normal(size=d.shape)})
    return narrow["z"], wide["z"]


def along(x, axis):
    """An array with its classes last, with its classes on `axis`."""
    return jnp.moveaxis(jnp.asarray(x), -1, axis)


def a_loss(rng):
    """smoothed_cross_entropy: labels, priors, spread, masks, weights, axis, dtype; value and gradients."""
    d = Draw(rng)
    with cases.precision(d.dtype):
        z, exact_z = logits_of(d)
        ours, exact = options_of(d, z)
        axis = int(rng.integers(-len(d.shape), len(d.shape)))
        spread = str(rng.choice(["all", "others"]))
        epsilon, exact_epsilon = (
            x["e"] for x in cases.rounded({"e": d.each(-0.5, 1)}, "float64" if d.dtype == "float64" else "float32")
        )
        hard = d.labels()
        labels, exact_labels = hard, hard
        if d.maybe(0.3):
            mass = d.simplex(*d.batch) * d.exists + 0.01 * d.exists
            narrow, wide = d.real({"y": mass / mass.sum(-1, keepdims=True)})
            labels, exact_labels = along(narrow["y"], axis), wide["y"]
        elif d.maybe(0.3) and hard.size:
            ours["ignore_index"] = exact["ignore_index"] = int(hard.flat[0])
        prior = exact_prior = None
        kind = str(rng.choice(["none", "one", "each", "rows", "teacher", "geometric"]))
        if kind in ("one", "each"):
            narrow, wide = d.real({"u": d.kept(d.simplex(*(d.batch if kind == "each" else ())))})
            prior, exact_prior = narrow["u"], wide["u"]
            if prior.ndim == 2 and prior.shape[0] == prior.shape[1]:
                prior = Dense(prior)
        elif kind == "rows" and exact_labels is hard:
            narrow, wide = d.real({"t": d.kept(d.simplex(d.size))})
            prior, exact_prior = Rows(narrow["t"], hard), wide["t"][hard]
        elif kind == "geometric" and exact_labels is hard:
            table = priors.geometric(d.size, alpha=0.3)
            prior, exact_prior = Rows(table, hard), np.asarray(table, np.float64)[hard]
        elif kind == "teacher":
            prior = priors.teacher(0.5 * z)
            exact_prior = np.asarray(prior.probabilities, np.float64)
        arrays = dict(ours)
        if "class_where" in arrays and np.ndim(arrays["class_where"]) == len(d.shape):
            arrays["class_where"] = along(arrays["class_where"], axis)
        weigh = jnp.asarray(cases.cotangent(d.batch), jnp.float64 if d.dtype == "float64" else jnp.float32)

        def total(z, epsilon):
            losses = smoothed_cross_entropy(z, labels, epsilon, prior=prior, spread=spread, axis=axis, **arrays)
            return jnp.sum(losses * weigh), losses

        (_, losses), (slope, by_epsilon) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
            along(z, axis), epsilon
        )

        def definition(z, e=exact_epsilon):
            return reference.losses(z, exact_labels, e, prior=exact_prior, spread=spread, **exact)

        told = f"{d.shape} {d.dtype} axis={axis} {spread} prior={kind} ε{np.shape(epsilon)} {sorted(arrays)}"
        size = magnitude(exact_z, exact, exact_epsilon)
        near = functools.partial(cases.assert_close, size=4 * size)
        check(told, near, losses, definition(exact_z))
        pull = cases.cotangent(d.batch)[..., None] * reference.gradient_by_class(definition, exact_z)
        check(f"{told} ∂z", near, jnp.moveaxis(slope, axis, -1), pull)
        of_epsilon = reference.gradient(
            lambda e: np.sum(cases.cotangent(d.batch) * definition(exact_z, e)), exact_epsilon
        )
        check(f"{told} ∂ε", functools.partial(near, size=40 * size), by_epsilon, of_epsilon)
    return told


def check(told, compare, actual, expected):
    try:
        compare(actual, np.asarray(expected))
    except AssertionError as error:
        error.add_note(told)
        raise


def a_target(d, depth=2):
    """A target of any kind, and what it is written out: (q, (*batch, K))."""
    rng, shape = d.rng, d.shape
    kind = str(rng.choice(["hot", "uniform", "dense", "one", "rows", "sparse", "sum", "scaled", "weighted", "smooth"]))
    if not depth and kind in ("sum", "scaled", "weighted", "smooth"):
        kind = "hot"
    if kind == "hot":
        y = d.labels()
        return OneHot(y), np.eye(d.size)[y]
    if kind == "uniform":
        return Uniform(), d.exists / d.exists.sum(-1, keepdims=True)
    if kind in ("dense", "one"):
        p = d.simplex(*(d.batch if kind == "dense" else ())).astype(np.float32)
        return Dense(p), np.broadcast_to(p.astype(float), shape) * d.exists
    if kind == "rows":
        y, table = d.labels(), d.simplex(d.size).astype(np.float32)
        return Rows(table, y), table.astype(float)[y] * d.exists
    if kind == "sparse":
        y = np.stack([d.labels() for _ in range(3)], -1)
        w = rng.uniform(0, 1, y.shape).astype(np.float32)
        return Sparse(y, w), np.sum(np.eye(d.size)[y] * w[..., None].astype(float), -2)
    q, p = a_target(d, depth - 1)
    if kind == "sum":
        r, s = a_target(d, depth - 1)
        return q + r, p + s
    if kind == "scaled":
        w = d.each(-0.5, 1).astype(np.float32)
        return w * q, w.astype(float)[..., None] * p
    if kind == "weighted":
        w = rng.uniform(0, 2, shape if d.maybe() else (d.size,)).astype(np.float32)
        return q.weighted(w), p * w
    # One vector for all examples is taken for one example's.
    shared = isinstance(q, Dense) and q.probabilities.ndim == 1
    if shared and d.class_where is not None and d.class_where.ndim > 1:
        # Refused: it has one row of classes, not one for each example.
        return q, p
    epsilon, u = (
        (rng.uniform(0, 1, ()) if shared else d.each(0, 1)).astype(np.float32),
        d.kept(d.simplex()).astype(np.float32),
    )
    spread = str(rng.choice(["all", "others"]))
    rows = np.array(
        [
            reference.smooth(
                p[i],
                reference.pick(epsilon, i).astype(float),
                d.size,
                prior=u.astype(float) * d.exists[i],
                spread=spread,
                exists=None if d.class_where is None else d.exists[i],
            )
            for i in np.ndindex(d.batch)
        ]
    ).reshape(shape)
    return smooth(q, epsilon, prior=u, spread=spread, class_where=d.class_where), rows


def a_distribution(rng):
    """cross_entropy and kl_divergence of any sum, weight and smoothing of targets, with the gradient in the logits."""
    d = Draw(rng, ["float32", "bfloat16"])
    z, exact_z = logits_of(d)
    ours, exact = options_of(d, z)
    q, p = a_target(d)
    relative = bool((p >= 0).all()) and d.maybe()
    loss = kl_divergence if relative else cross_entropy
    told = f"{d.shape} {d.dtype} {loss.__name__} {jax.tree.structure(q)} {sorted(ours)}"
    weigh = jnp.asarray(cases.cotangent(d.batch), jnp.float32)

    def total(z, q):
        losses = loss(z, q, **ours)
        return jnp.sum(losses * weigh), losses

    (_, losses), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(z, q)
    options = {name: exact[name] for name in ("class_weights", "z_loss") if name in exact}

    def definition(z):
        expected = np.zeros(d.batch, z.dtype)
        for i in np.ndindex(d.batch):
            if "where" not in exact or exact["where"][i]:
                expected[i] = reference.cross_entropy(z[i], p[i], exists=d.exists[i], relative=relative, **options)
        return expected

    size = 4 * magnitude(exact_z, exact, np.abs(p).sum(-1))
    near = functools.partial(cases.assert_close, size=size)
    check(told, near, losses, definition(exact_z))
    pull = cases.cotangent(d.batch)[..., None] * reference.gradient_by_class(definition, exact_z)
    check(f"{told} ∂z", near, slope, pull)
    return told


def an_element(rng):
    """sigmoid_cross_entropy."""
    d = Draw(rng)
    with cases.precision(d.dtype):
        z, exact_z = logits_of(d)
        narrow, exact = d.real({"y": rng.uniform(0, 1, d.shape), "u": rng.uniform(0, 1, d.size)})
        epsilon = d.rng.uniform(-0.5, 1, d.shape if d.maybe() else ())
        where = d.bools(d.shape) if d.maybe() else None
        losses = sigmoid_cross_entropy(z, narrow["y"], epsilon, prior=narrow["u"], where=where)
        expected = reference.sigmoid_cross_entropy(exact_z, exact["y"], np.broadcast_to(epsilon, d.shape), exact["u"])
        expected = expected if where is None else np.where(where, expected, 0)
        told = f"{d.shape} {d.dtype} where={where is not None}"
        check(told, functools.partial(cases.assert_close, size=magnitude(exact_z, {}, epsilon)), losses, expected)
    return told


def a_layer(rng):
    """linear_cross_entropy by both plans: value, and gradients in every real array."""
    d = Draw(rng, ["float32", "bfloat16", "float64"])
    if d.class_where is not None and d.class_where.ndim > 1:
        d.class_where = d.class_where.any(tuple(range(len(d.batch)))) | (np.arange(d.size) == 0)
        d.exists = np.broadcast_to(d.class_where, d.shape)
    chosen = [word for word in ("others", "softcap", "transposed") if d.maybe(0.4)]
    words = " ".join(chosen)
    features = int(rng.integers(1, 5))
    floats = {
        "hidden": rng.normal(size=(*d.batch, features)),
        "kernel": rng.normal(size=(d.size, features) if "transposed" in chosen else (features, d.size)),
        "epsilon": d.each(-0.5, 1),
    }
    fixed = {"labels": d.labels()}
    if d.class_where is not None:
        fixed["class_where"] = d.class_where
    if d.maybe():
        floats["bias"] = rng.normal(size=d.size)
    if d.maybe():
        floats["weights"] = rng.uniform(0.5, 2, d.batch) * d.bools(d.batch)
    if d.maybe():
        floats["class_weights"] = rng.uniform(0.1, 2, d.size)
    if d.maybe():
        floats["z_loss"] = np.array(rng.uniform(0, 0.1))
    if d.maybe(0.3):
        floats["prior"] = d.kept(d.simplex(zeros=False))
    elif d.maybe(0.3):
        floats["table"] = d.kept(d.simplex(d.size, zeros=False))
    reduction = str(rng.choice(["mean", "sum", "none", "sum_by_nonzero_weights"]))
    held = None if d.maybe(0.3) else int(rng.integers(1, 9))
    told = f"{d.shape} D={features} {d.dtype} {words} {reduction} held={held} {sorted(floats | fixed)}"
    with cases.precision(d.dtype):
        weigh = cases.cotangent(d.batch) if reduction == "none" else np.ones(())
        narrow, exact = cases.rounded(floats, d.dtype)
        value, slopes = test_linear.expected(exact, fixed, words, reduction, weigh)
        wide = jnp.asarray(weigh, jnp.float64 if d.dtype == "float64" else jnp.float32)
        for plan, name in (("tokens", "chunk_size"), ("classes", "block_size")):
            # A block holds at most all classes.
            fits = held if held is None or plan == "tokens" else min(held, d.size)
            options = {name: fits, "plan": plan, "reduction": reduction}
            loss, gradients = test_linear.ours(narrow, fixed, wide, words, **options)
            tokens = max(int(np.prod(d.batch)), 1)
            check(
                f"{plan} {told}",
                functools.partial(test_linear.assert_near, dtype=d.dtype, size=60 * tokens),
                loss,
                value,
            )
            for key, slope in slopes.items():
                near = functools.partial(test_linear.assert_near, dtype=d.dtype, size=120 * tokens)
                check(f"{plan} {told} ∂{key}", near, gradients[key], slope)
    return told


ONE = "for all examples"
# What each takes after the logits: labels, an average over classes, numbers in a domain where it is smooth.
METHODS = {
    jax_ls.focal_loss: ("labels", (1, 4), (0, 1)),
    jax_ls.poly_loss: ("labels", (-1, 3, ONE), (0, 1)),
    jax_ls.logit_norm_loss: ("labels", (0.1, 2), (0, 1)),
    jax_ls.bi_tempered_loss: ("labels", (0, 0.9), (1.1, 2), (0, 1)),
    noise.forward_correction: ("hard", (0.05, 0.8)),
    noise.backward_correction: ("hard", (0, 0.8)),
    noise.bootstrap: ("hard", (0, 1)),
    noise.early_learning: ("hard", "average", (0, 3)),
    noise.generalized_cross_entropy: ("hard", (0.1, 1)),
    noise.label_relaxation: ("hard", (0.05, 0.9)),
    noise.symmetric_cross_entropy: ("hard", (0, 1), (0, 1)),
    penalties.conditional: ((0.5, 10),),
    penalties.confidence_penalty: ((0, 2),),
    penalties.jensen: ((0.05, 0.95),),
    penalties.margin: ((0.5, 10),),
    penalties.max_suppression: (),
    penalties.squared_logits: (),
    penalties.z_loss: (),
    adaptive.confidence: ("hard", (0, 1)),
    adaptive.entropy: ((0, 1),),
    adaptive.margin: ("hard", (0, 1)),
    adaptive.uncertainty: ("hard", (0, 1)),
}


def a_method(rng):
    """Every other loss, penalty and rule: of masked batches of any dtype and layout, as of the classes of one example.

    The latter are cut out, in float64: so masks, priors, weights, axes and dtypes are seen to mean what they say.
    """
    d = Draw(rng, ["float32", "bfloat16"])
    method = list(METHODS)[rng.integers(len(METHODS))]
    with jax.enable_x64(True):
        z, exact_z = logits_of(d)
        takes = inspect.signature(method).parameters
        ours, exact = options_of(d, z)
        ours, exact = ({name: x for name, x in given.items() if name in takes} for given in (ours, exact))
        axis = int(rng.integers(-len(d.shape), len(d.shape)))
        options, static = {}, {"axis": axis}
        if "spread" in takes:
            options["spread"] = static["spread"] = str(rng.choice(["all", "others"]))
        arrays = {"weigh": cases.cotangent(d.batch)}
        if "prior" in takes and d.maybe():
            arrays["prior"] = d.kept(d.simplex())
            arrays["prior"] /= arrays["prior"].sum()
        numbers = []
        for i, taken in enumerate(METHODS[method]):
            if taken == "average":
                mass = (d.simplex(*d.batch) + 0.01) * d.exists
                arrays[f"{i} {taken}"] = 0.9 * mass / mass.sum(-1, keepdims=True)
            elif taken == "labels" and d.maybe(0.3):
                mass = (d.simplex(*d.batch) + 0.01) * d.exists
                arrays[f"{i} dense"] = mass / mass.sum(-1, keepdims=True)
            elif taken in ("labels", "hard"):
                arrays[f"{i} hard"] = d.labels()
            else:
                arrays[f"{i} number"] = np.array(rng.uniform(*taken[:2])) if ONE in taken else d.each(*taken)
                numbers.append(f"{i} number")
        narrow, wide = {}, {}
        for name, x in arrays.items():
            narrow[name] = jnp.asarray(x, "int32" if "hard" in name else "float32")
            wide[name] = np.asarray(narrow[name]).astype("int32" if "hard" in name else "float64")
        positions = [name for name in arrays if name[0].isdigit()]

        def total(z, moving, given):
            given = given | moving
            shown = [along(given[x], axis) if "dense" in x or "average" in x else given[x] for x in positions]
            own = {"prior": given["prior"]} if "prior" in given else {}
            losses = method(z, *shown, **own, **masks, **static)
            return jnp.sum(losses * given["weigh"]), losses

        masks = dict(ours)
        if d.class_where is not None and d.class_where.ndim > 1:
            masks["class_where"] = along(d.class_where, axis)
        moving = {name: narrow[name] for name in numbers}
        (_, losses), (slope, by_number) = jax.value_and_grad(total, (0, 1), has_aux=True)(
            along(z, axis), moving, narrow
        )
        told = f"{method.__name__} {d.shape} {d.dtype} {sorted(ours)} {sorted(arrays)} {static}"
        assert losses.dtype == "float32", told
        expected = {"loss": np.zeros(d.batch), "z": np.zeros(d.shape)}
        expected |= {name: np.zeros(wide[name].shape) for name in numbers}
        for i in np.ndindex(d.batch):
            if "where" in exact and not exact["where"][i]:
                continue
            kept = np.flatnonzero(d.exists[i])
            shown = {}
            for name, x in wide.items():
                if name == "prior":
                    shown[name] = x[kept] / x[kept].sum()
                elif "dense" in name or "average" in name:
                    shown[name] = x[i][kept]
                elif "hard" in name:
                    shown[name] = np.int32(np.searchsorted(kept, x[i]))
                else:
                    shown[name] = reference.pick(x, i)
            own = options | ({"prior": shown["prior"]} if "prior" in shown else {})
            own |= {"z_loss": exact["z_loss"]} if "z_loss" in exact else {}
            own |= {"class_weights": exact["class_weights"][kept]} if "class_weights" in exact else {}

            def of_one(z, moving, shown=shown, own=own):
                given = shown | moving
                return method(z, *(given[name] for name in positions), **own)

            moved = {name: jnp.asarray(shown[name]) for name in numbers}
            one, (by_z, by_moved) = jax.value_and_grad(of_one, (0, 1))(jnp.asarray(exact_z[i][kept]), moved)
            weight = wide["weigh"][i]
            expected["loss"][i], expected["z"][(*i, kept)] = one, weight * by_z
            for name in numbers:
                expected[name][i if expected[name].ndim else ()] += weight * by_moved[name]
    scale = 1 + np.max(np.abs(exact_z), initial=0)
    if method is jax_ls.logit_norm_loss:
        # Its slope is that of z / ‖z‖.
        scale /= min(1, np.min(np.linalg.norm(exact_z * d.exists, axis=-1), initial=1))
    for name, actual in {"loss": losses, "z": jnp.moveaxis(slope, axis, -1), **by_number}.items():
        x = expected[name]
        assert np.isfinite(x).all(), f"{told} {name}: {x}"
        size = scale**2 * max(1.0, float(np.max(np.abs(x), initial=0)))
        near = functools.partial(
            np.testing.assert_allclose, rtol=1e-2 if d.dtype == "bfloat16" else 1e-4, atol=2e-5 * size
        )
        check(f"{told} ∂{name}", near, np.asarray(actual).astype(np.float64), x)
    return told


@pytest.mark.parametrize("case", [a_loss, a_distribution, an_element, a_layer, a_method], ids=lambda f: f.__name__)
def test_fuzz(case, request):
    fuzz(case, request)
