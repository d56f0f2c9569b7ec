"""Static mistakes raise at once, in jit too, and say which argument, what was expected and what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ls
from jax_ls import Dense, OneHot, Rows, Sparse, Uniform

N, K = 2, 4
Z, Y, Q = jnp.zeros((N, K)), jnp.array([1, 2]), jnp.full((N, K), 0.25)
FLOATS, INTS = jnp.zeros(N), jnp.zeros((N, K), jnp.int32)
F5, B5, U5 = jnp.zeros(5), jnp.ones(5, bool), jnp.full(5, 0.2)

# Arguments that both losses of logits take, each with what came instead.
OF_LOGITS = [
    ("logits", {"logits": INTS}, r"int32 \(2, 4\)"),
    ("logits", {"logits": Z.astype(jnp.complex64)}, r"complex64 \(2, 4\)"),
    ("logits", {"logits": jnp.zeros(())}, r"float32 \(\)"),
    ("where", {"where": FLOATS}, r"float32 \(2,\)"),
    ("where", {"where": jnp.ones((N, K), bool)}, r"bool \(2, 4\)"),
    ("where", {"where": B5}, r"bool \(5,\)"),
    ("class_where", {"class_where": jnp.ones(K)}, r"float32 \(4,\)"),
    ("class_where", {"class_where": B5}, r"bool \(5,\)"),
    ("class_where", {"class_where": jnp.ones((3, K), bool)}, r"bool \(3, 4\)"),
    ("class_where", {"class_where": jnp.array(True)}, r"bool \(\)"),
    ("class_weights", {"class_weights": F5}, r"float32 \(5,\)"),
    ("class_weights", {"class_weights": Z}, r"float32 \(2, 4\)"),
    ("class_weights", {"class_weights": jnp.ones(K, jnp.int32)}, r"int32 \(4,\)"),
    ("z_loss", {"z_loss": "much"}, "'much'"),
    ("z_loss", {"z_loss": F5}, r"float32 \(5,\)"),
    ("axis", {"axis": 2}, "2"),
    ("axis", {"axis": -3}, "-3"),
    ("axis", {"axis": 1.0}, "1.0"),
    ("axis", {"axis": None}, "None"),
]

TARGETS = [
    ("target", {"target": FLOATS}, r"float32 \(2,\)"),
    ("target", {"target": jnp.zeros(3, jnp.int32)}, r"int32 \(3,\)"),
    ("target", {"target": INTS}, r"int32 \(2, 4\)"),
    ("target", {"target": jnp.zeros((N, 5))}, r"float32 \(2, 5\)"),
    ("target", {"target": jnp.zeros((N, K, 1))}, r"float32 \(2, 4, 1\)"),
    ("labels", {"target": OneHot(jnp.zeros(3, jnp.int32))}, r"int32 \(3,\)"),
    ("probabilities", {"target": Dense(U5)}, r"float32 \(5,\)"),
    ("probabilities", {"target": Dense(jnp.zeros((3, K)))}, r"float32 \(3, 4\)"),
    ("table", {"target": Rows(jnp.eye(5), Y)}, r"float32 \(5, 5\)"),
    ("labels", {"target": Rows(jnp.eye(K), jnp.zeros(3, jnp.int32))}, r"int32 \(3,\)"),
    ("indices", {"target": Sparse(jnp.zeros((3, 2), jnp.int32), jnp.zeros((3, 2)))}, r"int32 \(3"),
    ("class_where", {"target": Uniform(B5)}, r"bool \(5,\)"),
    ("weight", {"target": jnp.ones(3) * OneHot(Y)}, r"float32 \(3,\)"),
    ("weight", {"target": jnp.ones(3) * Uniform()}, r"float32 \(3,\)"),
    ("class_weights", {"target": OneHot(Y).weighted(F5)}, r"float32 \(5,\)"),
]

SMOOTHING = [
    ("smoothing", {"smoothing": F5}, r"float32 \(5,\)"),
    ("smoothing", {"smoothing": Z}, r"float32 \(2, 4\)"),
    ("smoothing", {"smoothing": "a lot"}, "'a lot'"),
    ("smoothing", {"smoothing": 1j}, "complex64"),
    ("smoothing", {"smoothing": None}, "None"),
    ("spread", {"spread": "most"}, "'most'"),
    ("spread", {"spread": None}, "None"),
    ("prior", {"prior": jnp.ones(K, jnp.int32)}, r"int32 \(4,\)"),
    ("prior", {"prior": jnp.zeros(())}, r"float32 \(\)"),
    ("class_where", {"class_where": jnp.ones(K)}, r"float32 \(4,\)"),
]

LABELS = [
    ("labels", {"labels": FLOATS}, r"float32 \(2,\)"),
    ("labels", {"labels": jnp.zeros(3, jnp.int32)}, r"int32 \(3,\)"),
    ("labels", {"labels": INTS}, r"int32 \(2, 4\)"),
    ("labels", {"labels": jnp.zeros((N, 5))}, r"float32 \(2, 5\)"),
    ("labels", {"labels": jnp.ones(N, bool)}, r"bool \(2,\)"),
    ("labels", {"labels": Q, "ignore_index": 0}, r"float32 \(2, 4\)"),
    ("ignore_index", {"ignore_index": 1.5}, "1.5"),
    ("prior", {"prior": U5}, r"float32 \(5,\)"),
    ("prior", {"prior": jnp.zeros((3, K))}, r"float32 \(3, 4\)"),
]

WRITTEN_OUT = [
    ("num_classes", {"num_classes": None}, "None"),
    ("num_classes", {"num_classes": 0}, "0"),
    ("num_classes", {"num_classes": 4.0}, "4.0"),
    ("num_classes", {"num_classes": True}, "True"),
    ("labels", {"labels": Q, "num_classes": 5}, r"float32 \(2, 4\)"),
    ("labels", {"labels": jnp.zeros(())}, r"float32 \(\)"),
    ("labels", {"labels": jnp.ones(N, bool)}, r"bool \(2,\)"),
    ("prior", {"prior": U5}, r"float32 \(5,\)"),
    ("class_where", {"class_where": B5}, r"bool \(5,\)"),
    ("class_where", {"class_where": jnp.ones((3, K), bool)}, r"bool \(3, 4\)"),
    ("axis", {"axis": 2}, "2"),
    ("axis", {"axis": "last"}, "'last'"),
]

BINARY = [
    ("smoothing", {"smoothing": F5}, r"float32 \(5,\)"),
    ("smoothing", {"smoothing": "some"}, "'some'"),
    ("prior", {"prior": F5}, r"float32 \(5,\)"),
    ("prior", {"prior": None}, "None"),
]

SIGMOID = [
    ("logits", {"logits": INTS}, r"int32 \(2, 4\)"),
    ("labels", {"labels": Y}, r"int32 \(2,\)"),
    ("where", {"where": Z}, r"float32 \(2, 4\)"),
    ("where", {"where": jnp.ones(N, bool)}, r"bool \(2,\)"),
]

REDUCTIONS = [
    ("losses", {"losses": "none"}, "'none'"),
    ("losses", {"losses": jnp.zeros(N, jnp.complex64)}, r"complex64 \(2,\)"),
    ("weights", {"weights": jnp.ones(3)}, r"float32 \(3,\)"),
    ("weights", {"weights": jnp.ones((N, N))}, r"float32 \(2, 2\)"),
    ("denominator", {"denominator": jnp.ones(3)}, r"float32 \(3,\)"),
]

KINDS = [
    (OneHot, "labels", {"labels": FLOATS}, r"float32 \(2,\)"),
    (Uniform, "class_where", {"class_where": jnp.ones(K)}, r"float32 \(4,\)"),
    (Uniform, "class_where", {"class_where": jnp.array(True)}, r"bool \(\)"),
    (Dense, "probabilities", {"probabilities": Y}, r"int32 \(2,\)"),
    (Dense, "probabilities", {"probabilities": jnp.zeros(())}, r"float32 \(\)"),
    (Rows, "table", {"table": U5, "labels": Y}, r"float32 \(5,\)"),
    (Rows, "labels", {"table": jnp.eye(K), "labels": FLOATS}, r"float32 \(2,\)"),
    (Sparse, "indices", {"indices": Z, "weights": Z}, r"float32 \(2, 4\)"),
    (Sparse, "weights", {"indices": INTS, "weights": F5}, r"float32 \(5,\)"),
    (Sparse, "weights", {"indices": INTS, "weights": INTS}, r"int32 \(2, 4\)"),
    (Sparse, "weights", {"indices": jnp.array(1), "weights": jnp.array(1.0)}, r"float32 \(\)"),
    (OneHot(Y).probs, "num_classes", {"num_classes": 0}, "0"),
    (OneHot(Y).probs, "num_classes", {"num_classes": 2.5}, "2.5"),
    (OneHot(Y).dot, "values", {"values": jnp.zeros(())}, r"float32 \(\)"),
    (OneHot(Y).dot, "labels", {"values": jnp.zeros((3, K))}, r"int32 \(2,\)"),
    (OneHot(Y).weighted, "class_weights", {"class_weights": jnp.ones(K, jnp.int32)}, r"int32 \(4,\)"),
    (lambda weight: weight * OneHot(Y), "weight", {"weight": jnp.zeros(N, jnp.complex64)}, r"complex64 \(2,\)"),
]

RIGHT = {
    jax_ls.cross_entropy: {"logits": Z, "target": Y},
    jax_ls.kl_divergence: {"logits": Z, "target": Y},
    jax_ls.smoothed_cross_entropy: {"logits": Z, "labels": Y},
    jax_ls.sigmoid_cross_entropy: {"logits": Z, "labels": INTS},
    jax_ls.smooth: {"labels": Y, "smoothing": 0.1},
    jax_ls.smooth_labels: {"labels": Y, "smoothing": 0.1, "num_classes": K},
    jax_ls.smooth_binary_labels: {"labels": INTS, "smoothing": 0.1},
    jax_ls.mean: {"losses": FLOATS},
    jax_ls.reduce: {"losses": FLOATS, "reduction": "mean"},
    jax_ls.with_label_smoothing(optax.softmax_cross_entropy, 0.1): {"logits": Z, "labels": Y},
}
WRAPPED = list(RIGHT)[-1]
WRONG = {
    jax_ls.cross_entropy: OF_LOGITS + TARGETS,
    jax_ls.kl_divergence: OF_LOGITS + TARGETS,
    jax_ls.smoothed_cross_entropy: OF_LOGITS + SMOOTHING + LABELS,
    jax_ls.sigmoid_cross_entropy: SIGMOID + BINARY,
    jax_ls.smooth: SMOOTHING,
    jax_ls.smooth_labels: SMOOTHING + WRITTEN_OUT,
    jax_ls.smooth_binary_labels: BINARY,
    jax_ls.mean: REDUCTIONS,
    jax_ls.reduce: REDUCTIONS + [("reduction", {"reduction": word}, repr(word)) for word in ("average", None, "Mean")],
    WRAPPED: [("labels", {"labels": FLOATS}, r"float32 \(2,\)"), ("axis", {"axis": 5}, "5")],
}
CASES = [
    *[(f, name, RIGHT[f] | wrong, got) for f, mistakes in WRONG.items() for name, wrong, got in mistakes],
    *KINDS,
]


def identify(case):
    function, name, arguments, got = case
    kinds = [type(x).__name__ for key, x in arguments.items() if isinstance(x, jax_ls.Target)]
    return "-".join([getattr(function, "__name__", "call"), name, *kinds, got.replace("\\", "")])


@pytest.mark.parametrize(("function", "name", "arguments", "got"), CASES, ids=map(identify, CASES))
def test_a_mistake_is_named_with_what_was_expected_and_what_came(function, name, arguments, got):
    message = rf"(?s)(?<!\w){name}: expected .*got .*{got}"
    with pytest.raises((AssertionError, ValueError, TypeError), match=message):
        function(**arguments)
    arrays = {key: x for key, x in arguments.items() if isinstance(x, jax.Array | np.ndarray | jax_ls.Target)}
    static = {key: x for key, x in arguments.items() if key not in arrays}
    with pytest.raises((AssertionError, ValueError, TypeError), match=message):
        jax.eval_shape(functools.partial(function, **static), **arrays)


@pytest.mark.parametrize("function", RIGHT, ids=lambda f: f.__name__)
def test_the_arguments_that_mistakes_were_made_in_are_right(function):
    function(**RIGHT[function])


@pytest.mark.parametrize("reduction", ["none", "sum", "sum_by_nonzero_weights"])
def test_a_denominator_where_none_divides_raises(reduction):
    with pytest.raises(ValueError, match=r"denominator: expected None .*got 3"):
        jax_ls.reduce(FLOATS, reduction=reduction, denominator=3)


def test_an_option_that_smoothing_does_not_have_raises():
    with pytest.raises(TypeError, match="softness"):
        jax_ls.with_label_smoothing(optax.softmax_cross_entropy, 0.1, softness=1)(Z, Y)
