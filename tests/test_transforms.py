"""Under every transformation of JAX the same numbers; and what changes by the step never compiles again."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from jax_ls import (
    Dense,
    OneHot,
    Rows,
    Sparse,
    Uniform,
    bi_tempered_loss,
    cross_entropy,
    focal_loss,
    kl_divergence,
    linear_cross_entropy,
    mean,
    noise,
    penalties,
    smooth,
    smoothed_cross_entropy,
    with_label_smoothing,
)

N, K = 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, K)).astype(np.float32)
LABELS = RNG.integers(0, K, N)
PRIOR = RNG.dirichlet(np.ones(K)).astype(np.float32)
EPSILONS = np.array([-0.5, 0.0, 0.1, 1.0], np.float32)
TABLE = RNG.dirichlet(np.ones(K), K).astype(np.float32)


def expected(epsilon, labels=LABELS, **options):
    return reference.losses(LOGITS.astype(np.float64), labels, epsilon, **options)


def test_vmap_over_epsilon_over_examples_and_over_priors():
    over_epsilon = jax.vmap(smoothed_cross_entropy, in_axes=(None, None, 0))
    cases.assert_close(jax.jit(over_epsilon)(LOGITS, LABELS, EPSILONS), np.array([expected(e) for e in EPSILONS]), 4)
    one_by_one = jax.vmap(lambda z, y, e: smoothed_cross_entropy(z, y, e, spread="others", ignore_index=LABELS[0]))
    each = np.linspace(0, 1, N).astype(np.float32)
    options = {"spread": "others", "ignore_index": LABELS[0]}
    cases.assert_close(jax.jit(one_by_one)(LOGITS, LABELS, each), expected(each, **options), 4)
    over_priors = jax.vmap(lambda u: smoothed_cross_entropy(LOGITS, LABELS, 0.3, prior=u))
    cases.assert_close(jax.jit(over_priors)(TABLE), np.array([expected(0.3, prior=u) for u in TABLE]), 4)


@pytest.mark.parametrize("name", cases.KINDS)
def test_vmap_over_a_target(name):
    """Targets of single examples, stacked, are mapped over with the logits."""
    floats, fixed = cases.ingredients((N,), K)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), floats) | jax.tree.map(jnp.asarray, fixed)
    shared = {"epsilon", "prior", "table", "class_weights", "exists"}
    axes = {key: None if key in shared else 0 for key in ours}
    stacked = jax.vmap(cases.KINDS[name].target, in_axes=(axes,), axis_size=N)(ours)
    losses = jax.jit(jax.vmap(cross_entropy))(LOGITS, stacked)
    q = cases.written_out(cases.KINDS[name], floats | fixed, (N,), K)
    rows = [reference.cross_entropy(z, row) for z, row in zip(LOGITS.astype(float), q, strict=True)]
    cases.assert_close(losses, np.array(rows), 8)


def loss_of_everything(z, epsilon, prior):
    options = {"prior": prior, "spread": "others", "class_weights": 1 + prior, "z_loss": 0.1}
    losses = smoothed_cross_entropy(z, LABELS, epsilon, **options)
    target = epsilon * Rows(jnp.asarray(TABLE, z.dtype), LABELS) + Sparse(LABELS[:, None], jnp.full((N, 1), epsilon))
    return mean(losses) + mean(kl_divergence(z, target, where=np.arange(N) != 1))


def test_forward_and_reverse_mode_agree_with_each_other_and_with_differences():
    primals = (jnp.asarray(LOGITS), jnp.float32(0.3), jnp.asarray(PRIOR))
    tangents = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), primals)

    @jax.jit
    def both(primals, tangents):
        _, forward = jax.jvp(loss_of_everything, primals, tangents)
        reverse = jax.grad(loss_of_everything, argnums=(0, 1, 2))(*primals)
        return forward, sum(jnp.vdot(a, b) for a, b in zip(reverse, tangents, strict=True))

    forward, reverse = both(primals, tangents)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)
    with cases.precision("float64"):
        wide, steps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (primals, tangents))
        along = jax.jit(lambda h: loss_of_everything(*jax.tree.map(lambda x, t: x + h * t, wide, steps)))
        difference = (float(along(1e-5)) - float(along(-1e-5))) / 2e-5
    np.testing.assert_allclose(forward, difference, rtol=1e-5)


def reverse_over_reverse(f):
    return jax.jacrev(jax.jacrev(f))


def reverse_over_forward(f):
    return jax.jacrev(jax.jacfwd(f))


@pytest.mark.parametrize("mode", [jax.hessian, reverse_over_reverse, reverse_over_forward])
@pytest.mark.parametrize("loss", [cross_entropy, kl_divergence])
def test_the_hessian_is_m_times_diag_p_less_pp(mode, loss):
    """For any q of mass M: smoothing moves the loss by a linear function of z, and bends it nowhere else."""
    mass = 1.7
    for target in (mass * smooth(LABELS[0], 0.3), Dense(jnp.asarray(mass * PRIOR))):
        hessian = jax.jit(mode(lambda z, q=target: loss(z, q)))(LOGITS[0])
        p = np.exp(reference.log_softmax(LOGITS[0].astype(np.float64)))
        np.testing.assert_allclose(hessian, mass * (np.diag(p) - np.outer(p, p)), atol=1e-6)


def test_hessian_vector_products_and_second_derivatives_in_epsilon():
    def loss(z, epsilon):
        return smoothed_cross_entropy(z, LABELS, epsilon).sum()

    _, product = jax.jit(lambda z: jax.jvp(jax.grad(loss), (z, jnp.float32(0.1)), (z, jnp.float32(0))))(LOGITS)
    p = np.exp([reference.log_softmax(z) for z in LOGITS.astype(np.float64)])
    np.testing.assert_allclose(product, p * (LOGITS - np.sum(p * LOGITS, -1, keepdims=True)), rtol=1e-4, atol=1e-6)
    assert jax.grad(jax.grad(loss, argnums=1), argnums=1)(jnp.asarray(LOGITS), 0.1) == 0
    # ∂²/∂z∂ε is δ_y − 1/K, whatever the logits.
    cross = jax.jit(jax.jacfwd(jax.grad(loss), argnums=1))(LOGITS, jnp.float32(0.1))
    np.testing.assert_allclose(cross, np.eye(K)[LABELS] - 1 / K, atol=1e-6)


FORMULAS = {
    "cross-entropy": lambda z: smoothed_cross_entropy(
        z, LABELS, 0.1, prior=PRIOR, class_where=PRIOR > 0.01, z_loss=0.1
    ),
    "others": lambda z: smoothed_cross_entropy(z, LABELS, 0.1, spread="others"),
    "focal": lambda z: focal_loss(z, LABELS, 2.0, 0.1),
    "jensen": lambda z: penalties.jensen(z, 0.3, prior=PRIOR),
    "bi-tempered": lambda z: bi_tempered_loss(z, LABELS, 0.8, 1.2, 0.1),
    "forward": lambda z: noise.forward_correction(z, LABELS, 0.3),
    "margin": lambda z: penalties.margin(z, 0.1),
    "layer": lambda z: linear_cross_entropy(z, TABLE, LABELS, smoothing=0.1, plan="tokens", reduction="none"),
    "layer by classes": lambda z: linear_cross_entropy(
        z, TABLE, LABELS, smoothing=0.1, plan="classes", reduction="none"
    ),
}


@pytest.mark.parametrize("how", ["scan", "cond", "vmap of scan"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_gradient_inside_of_control_flow_is_differentiated_again(name, how):
    """In a scan JAX takes a custom_jvp apart: its rule is lost for the second derivative."""
    scales = jnp.array([0.5, 1.0])

    def total(z):
        return jnp.sum(jnp.stack([jnp.sum(FORMULAS[name](x * z) ** 2) for x in scales]))

    def within(z):
        def step(carry, x):
            return carry + jnp.sum(FORMULAS[name](x * z) ** 2), None

        if how == "cond":
            return sum(jax.lax.cond(x > 0, lambda x: step(0.0, x)[0], lambda x: 0.0, x) for x in scales)
        return jax.lax.scan(step, 0.0, scales)[0]

    tangents = jnp.stack([LOGITS**2, jnp.ones_like(LOGITS)])

    def product(f):
        return jax.jit(lambda v: jax.jvp(jax.grad(f), (jnp.asarray(LOGITS),), (v,))[1])

    map_over = jax.vmap if how.startswith("vmap") else lambda f: lambda vs: jnp.stack([f(v) for v in vs])
    expected, actual = (map_over(product(f))(tangents) for f in (total, within))
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.dots_saveable]
)
def test_checkpointing_around_the_loss_changes_nothing(policy):
    plain = jax.jit(jax.value_and_grad(loss_of_everything))(LOGITS, 0.3, PRIOR)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(loss_of_everything, policy=policy)))(LOGITS, 0.3, PRIOR)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), again, plain)


def test_scan_carries_and_stacks_targets():
    start = Dense(jnp.full((N, K), 1 / K))

    def step(target, z):
        """Labels that drift to what the model believes: the carry is a target, and so is the output."""
        drifted = Dense(0.5 * target.probabilities + 0.5 * jax.nn.softmax(z))
        return drifted, smooth(drifted, 0.1)

    logits = jnp.stack([jnp.asarray(LOGITS), 2 * jnp.asarray(LOGITS)])
    final, stacked = jax.jit(lambda z: jax.lax.scan(step, start, z))(logits)
    p = [np.exp([reference.log_softmax(z) for z in row]) for row in np.asarray(logits, np.float64)]
    first = 0.5 / K + 0.5 * p[0]
    second = 0.5 * first + 0.5 * p[1]
    cases.assert_close(final.probs(K), second)
    losses = jax.jit(jax.vmap(cross_entropy))(logits, stacked)
    for loss, z, q in zip(losses, np.asarray(logits, np.float64), (first, second), strict=True):
        rows = [reference.cross_entropy(a, 0.9 * b + 0.1 / K) for a, b in zip(z, q, strict=True)]
        cases.assert_close(loss, np.array(rows), 4)


def test_cond_and_while_take_targets():
    q = smooth(LABELS, 0.1, prior=PRIOR)
    doubled = jax.jit(lambda q, n: jax.lax.fori_loop(0, n, lambda _, q: jax.tree.map(lambda x: x, q), q))(q, 3)
    chosen = jax.jit(lambda flag: jax.lax.cond(flag, lambda: q, lambda: doubled))(True)
    cases.assert_close(jax.jit(cross_entropy)(LOGITS, chosen), expected(0.1, prior=PRIOR.astype(float)), 4)


def test_targets_cross_the_boundary_of_jit_as_arguments_and_results():
    build = jax.jit(lambda y, e: (1 - e) * OneHot(y) + e * Uniform())
    spend = jax.jit(cross_entropy)
    cases.assert_close(spend(LOGITS, build(LABELS, 0.25)), expected(0.25), 4)


@pytest.mark.parametrize("spread", ["all", "others"])
def test_new_values_never_compile_again(spread):
    """Of ε, a prior, labels, masks, class weights, the weight of the z-loss and, in a schedule, of the step."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(epsilon, prior, labels, where, weights, z_loss):
        options = {"prior": prior, "where": where, "class_weights": weights, "z_loss": z_loss, "spread": spread}
        return mean(smoothed_cross_entropy(LOGITS, labels, epsilon, **options), where)

    chex.clear_trace_counter()
    results = {
        float(step(e, jnp.roll(PRIOR, i), jnp.roll(LABELS, i), jnp.arange(N) != i, jnp.linspace(1, 2 + i, K), 0.1 * i))
        for i, e in enumerate((-0.5, 0.0, 0.1, 1.0))
    }
    assert len(results) == 4
    assert step._cache_size() == 1


def test_a_schedule_of_epsilon_never_compiles_again():
    loss = with_label_smoothing(optax.softmax_cross_entropy, optax.cosine_decay_schedule(0.2, 100))
    step = jax.jit(lambda labels, step: loss(LOGITS, labels, step=step))
    for i in (0, 50, 100):
        epsilon = 0.1 * (1 + np.cos(np.pi * i / 100))
        cases.assert_close(step(LABELS, i), expected(epsilon), 4)
    assert step._cache_size() == 1


def test_a_train_step_learns_epsilon_and_prior_as_parameters():
    """All of q is differentiable: descent on ε and on the logits of u lowers the loss."""

    def loss(params):
        return mean(smoothed_cross_entropy(LOGITS, LABELS, params["epsilon"], prior=jax.nn.softmax(params["u"])))

    params = {"epsilon": jnp.float32(0.5), "u": jnp.zeros(K)}
    optimiser = optax.sgd(0.1)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimiser.init(params), []
    for _ in range(5):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 1e-3
