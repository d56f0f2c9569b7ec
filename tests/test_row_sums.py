"""The sums over classes as TPUs and GPUs take them: their branch of the program, run on the CPU.

All other tests run the branch for CPUs, which `tests/reference.py` defines. Both must give the same.
"""

import contextlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls
from jax_ls import Dense, Rows, Sparse, adaptive, cross_entropy, noise, penalties, row_sums, smoothed_cross_entropy
from jax_ls.logits import on_logits

N, K = 6, 41
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, K)).astype(np.float32) * 4
# Two classes tie for the maximum, and one class has no chance.
LOGITS[0, [3, 30]], LOGITS[1, 5] = 20, -np.inf
LABELS = RNG.integers(0, K, N)
LABELS[1] = 7
EXISTS = RNG.random((N, K)) < 0.7
EXISTS[np.arange(N), LABELS] = True
EACH_PRIOR = RNG.dirichlet(np.ones(K), N).astype(np.float32) * np.isfinite(LOGITS)
TABLE = RNG.dirichlet(np.ones(K), K).astype(np.float32)
TABLE[:, 5] = 0
NOISE = (0.8 * np.eye(K) + 0.2 * RNG.dirichlet(np.ones(K), K)).astype(np.float32)
WHERE = np.arange(N) != 2
WEIGHTS = np.linspace(0.5, 2, K, dtype=np.float32)
CLASSES = np.arange(K) != 5
FINITE = np.where(np.isfinite(LOGITS), LOGITS, -9).astype(np.float32)


def smoothed(**options):
    return lambda z: smoothed_cross_entropy(z, LABELS, 0.1, **options)


# Of logits that may hold −inf.
LOSSES = {
    "labels": lambda z: cross_entropy(z, LABELS),
    "prior (batch, K)": smoothed(prior=EACH_PRIOR),
    "prior (batch, K) and classes": smoothed(prior=EACH_PRIOR, class_where=EXISTS),
    "q (batch, K)": lambda z: cross_entropy(z, 2 * Dense(jnp.asarray(EACH_PRIOR))),
    "classes (K,)": smoothed(class_where=CLASSES, z_loss=0.1, where=WHERE),
    "prior and weights": smoothed(prior=TABLE[0], class_weights=WEIGHTS, spread="others", class_where=CLASSES),
    "rows": smoothed(prior=Rows(jnp.asarray(TABLE), jnp.asarray(LABELS))),
    "sparse": smoothed(prior=Sparse(jnp.stack([LABELS, 0 * LABELS], axis=-1), jnp.full((N, 2), 0.5))),
    "confidence_penalty": lambda z: penalties.confidence_penalty(z, 0.1),
    "confidence_penalty, few classes": lambda z: penalties.confidence_penalty(z, 0.1, class_where=np.arange(K) > 30),
    "likeliest": lambda z: on_logits(lambda z: z.pick(z.likeliest) - z.top, z),
    "focal_loss": lambda z: jax_ls.focal_loss(z, LABELS),
    "forward_correction, T (K, K)": lambda z: noise.forward_correction(z, LABELS, matrix=NOISE),
    "early_learning": lambda z: noise.early_learning(z, LABELS, EACH_PRIOR, where=WHERE),
}
# Of finite ones.
LOSSES_OF_FINITE = {
    "classes (batch, K)": smoothed(class_where=EXISTS),
    "classes (batch, K), others": smoothed(class_where=EXISTS, spread="others", class_weights=WEIGHTS),
    "prior (batch, K), others": smoothed(prior=EACH_PRIOR, class_where=EXISTS, spread="others"),
    "jensen": lambda z: penalties.jensen(z, 0.3, class_where=EXISTS),
    "jensen, prior": lambda z: penalties.jensen(z, 0.7, prior=EACH_PRIOR),
    "max_suppression": penalties.max_suppression,
    "margin": penalties.margin,
    "conditional": penalties.conditional,
    "squared_logits": penalties.squared_logits,
    "focal_loss, smoothed": lambda z: jax_ls.focal_loss(z, LABELS, 2.0, 0.1, prior=EACH_PRIOR),
    "logit_norm_loss": lambda z: jax_ls.logit_norm_loss(z, LABELS, 0.5, 0.1),
    "bi_tempered_loss": lambda z: jax_ls.bi_tempered_loss(z, LABELS, smoothing=0.1),
    "adaptive.margin": lambda z: smoothed_cross_entropy(z, LABELS, adaptive.margin(z, LABELS, 0.1)),
    "axis=1": lambda z: smoothed_cross_entropy(z.T[None], LABELS[None], 0.1, axis=1, prior=TABLE[0])[0],
}


@contextlib.contextmanager
def branch(platform):
    """Programs that are traced within are those of a platform, with rows and columns in parts on "cuda"."""

    def chosen(*operands, default, **others):
        return others.get(platform, default)(*operands)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", chosen)
        # 41 classes in 3 parts of 13, and 2 left over; in columns, 2 parts of 20, and 1 left over.
        patch.setattr(row_sums, "LONGEST_ROW", 16)
        yield
    jax.clear_caches()


def values_and_gradients(losses, z):
    def both(z):
        out = {}
        for name, loss in losses.items():
            value, pull = jax.vjp(loss, z)
            out[name] = value, pull(jnp.linspace(1, 2, N, dtype=z.dtype))[0]
        return out

    return jax.jit(both)(z)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(("losses", "logits"), [(LOSSES, LOGITS), (LOSSES_OF_FINITE, FINITE)], ids=["any", "finite"])
def test_every_platform_gives_the_same(losses, logits, platform):
    expected = values_and_gradients(losses, logits)
    with branch(platform):
        actual = values_and_gradients(losses, logits)
    for name in losses:
        for x, y in zip(actual[name], expected[name], strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_derivatives_in_numbers_of_the_row_and_in_priors(platform):
    """Of first and second order, against differences."""

    def loss(z, prior, alpha):
        focal = jax_ls.focal_loss(z, LABELS, 2.0, 0.3, prior=prior)
        return (focal + penalties.jensen(z, alpha, prior=prior) + smoothed_cross_entropy(z, LABELS, prior=prior)).sum()

    with cases.precision("float64"), branch(platform):
        given = jnp.asarray(FINITE / 4, float), jnp.asarray(EACH_PRIOR + 0.01, float), jnp.asarray(0.3)
        direction = jax.tree.map(lambda x: x * RNG.normal(size=x.shape) * 1e-4, given)
        ahead, behind = (jax.tree.map(lambda x, dx, s=s: x + s * dx, given, direction) for s in (1, -1))
        function = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        _, changes = jax.jit(lambda x, dx: jax.jvp(function, (*x,), (*dx,)))(given, direction)
        (_, gradient), (after, gradient_after), (before, gradient_before) = (
            function(*x) for x in (given, ahead, behind)
        )
        slope = sum(jnp.vdot(g, dx) for g, dx in zip(gradient, direction, strict=True))
        np.testing.assert_allclose(jnp.stack([jnp.asarray(slope), changes[0]]), (after - before) / 2, rtol=1e-5)
        for change, x, y in zip(changes[1], gradient_after, gradient_before, strict=True):
            np.testing.assert_allclose(change, (x - y) / 2, rtol=1e-4, atol=1e-9)


# Run on the CPU, a reduction that is not in parts adds one class after the other, which no TPU does.
@pytest.mark.parametrize(("platform", "size"), [("tpu", 8192), ("cuda", 128256)])
def test_every_row_is_right_to_1e_5(platform, size):
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, size)) * 3 + 1e3, jnp.bfloat16)
    labels = np.array([5, 77, size - 1])
    wide = np.asarray(z, np.float64)
    lse = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    expected = lse - 0.9 * wide[np.arange(3), labels] - 0.1 * wide.mean(1)
    with branch(platform):
        losses = smoothed_cross_entropy(z, labels, 0.1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 64, 59])
def test_columns_of_any_length(size):
    z = np.random.default_rng(2).normal(size=(2, size, 3)).astype(np.float32)
    labels = np.random.default_rng(3).integers(0, size, (2, 3))
    expected = smoothed_cross_entropy(np.moveaxis(z, 1, -1), labels, 0.1)
    with branch("cuda"):
        np.testing.assert_allclose(smoothed_cross_entropy(z, labels, 0.1, axis=1), expected, rtol=1e-5, atol=1e-5)
