"""A row for every public name: how to call it, on which arrays, and which cells of the table it leaves out and why.

An argument has one meaning in the whole library, so its name alone says which array to make: `WORDS`. A row lists the
names, and overrides those that mean something else in its function. `test_every_function.py` has the cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_package import named

import jax_ls
from jax_ls import (
    Dense,
    OneHot,
    Rows,
    Sparse,
    Uniform,
    adaptive,
    calibration,
    compat,
    mixing,
    nnx,
    on_logits,
    online,
    plotting,
    priors,
    schedules,
    smooth,
    sweeps,
    values,
)

Maker = Callable[[np.random.Generator], Any]

# Examples, classes, features, steps, entries, bins. All differ, so that a size says which axis it is.
N, K, D, T, S, B = 4, 6, 3, 5, 2, 8

WHERE = np.array([True, False, True, True])
EXISTS = np.arange(K) != 2


def normal(*shape: int) -> Maker:
    return lambda rng: rng.normal(size=shape)


def between(low: float, high: float, *shape: int) -> Maker:
    return lambda rng: rng.uniform(low, high, shape)


def simplex(*shape: int) -> Maker:
    return lambda rng: rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def classes(*shape: int) -> Maker:
    """Labels that exist."""
    return lambda rng: rng.choice(np.flatnonzero(EXISTS), shape)


def integers(high: int, *shape: int) -> Maker:
    return lambda rng: rng.integers(0, high, shape)


def fixed(x: Any) -> Maker:
    return lambda rng: np.asarray(x)


def key(rng: np.random.Generator) -> Any:
    return jax.random.key(int(rng.integers(1000)))


WORDS: dict[str, Maker] = {
    "logits": normal(N, K),
    "labels": classes(N),
    "target": classes(N),
    "smoothing": between(0.1, 0.3),
    "prior": simplex(K),
    "where": fixed(WHERE),
    "class_where": fixed(EXISTS),
    "class_weights": between(0.5, 2, K),
    "z_loss": between(0.01, 0.1),
    "weights": between(0.5, 2, N),
    "hidden": normal(N, D),
    "kernel": normal(D, K),
    "bias": normal(K),
    "denominator": between(3, 5),
    "losses": normal(N),
    "values": normal(N, K),
    "table": simplex(K, K),
    "matrix": simplex(K, K),
    "probabilities": simplex(N, K),
    "averages": simplex(N, K),
    "returns": between(-2, 2, N),
    "counts": between(1, 9, K),
    "flip_rate": between(0.1, 0.3),
    "resample_rate": between(0.1, 0.3),
    "beta": between(0.2, 0.8),
    "alpha": between(0.2, 0.4),
    "margin": between(0.2, 0.4),
    "gamma": between(1, 3),
    "temperature": between(0.5, 2),
    "key": key,
    "x": normal(N),
    "edges": fixed(np.linspace(0, 1, B + 1)),
}
PAIRS = dict.fromkeys(("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"), normal(N))
WORDS |= PAIRS | dict.fromkeys(("chosen_reward", "rejected_reward"), normal(N))

# Parameters that no row has to give, and where they are tested.
ELSEWHERE = {
    "axis": "test_losses.py, test_penalties.py, test_adaptive.py: every axis",
    "class_axis_name": "test_sharding.py, test_linear_sharding.py: inside shard_map",
    "batch_axis_name": "test_reductions.py, test_linear_sharding.py, test_calibration.py: inside shard_map",
    "hidden_spec": "test_linear_meshes.py: Auto meshes",
    "kernel_spec": "test_linear_meshes.py: Auto meshes",
}


@dataclass(frozen=True, eq=False)
class Row:
    """A public name, a call of it, and the arrays of that call.

    `holes` says for a cell, or for an argument in a cell, "grad:counts", why it is left out. `constant` are the
    arguments that have no derivative, by the docstring. `digits` are those that bfloat16 costs.
    """

    name: str
    call: Callable[..., Any]
    make: Mapping[str, Maker]
    options: Mapping[str, Any] = field(default_factory=dict)
    holes: Mapping[str, str] = field(default_factory=dict)
    constant: frozenset[str] = frozenset()
    digits: float = 1e-5

    def __call__(self, arrays: Mapping[str, Any]) -> Any:
        return self.call(**arrays, **self.options)

    @property
    def public(self) -> str:
        """The public name, without the words that tell its rows apart."""
        return self.name.split(",")[0]


ROWS: dict[str, Row] = {}
ALIASES: dict[str, str] = {}


def row(
    name: str,
    words: str = "",
    call: Callable[..., Any] | None = None,
    *,
    holes: Mapping[str, str] | None = None,
    constant: str = "",
    free: str = "",
    digits: float = 1e-5,
    **given: Any,
) -> None:
    """Adds a row. What is `given` is how to make an argument that `words` names, or else a static option.

    `free` are the arguments that may have any shape, or that the others are checked against, which are then named.
    """
    make = {word: given.pop(word) if word in given else WORDS[word] for word in words.split()}
    left_out = dict(holes or {}) | {f"wrong:{word}": "fits, or the others do not fit it" for word in free.split()}
    call = call or named(name.split(",")[0])
    row = Row(name, call, make, given, left_out, frozenset(constant.split()), digits)
    assert name not in ROWS
    ROWS[name] = row


def on_host(name: str, call: Callable[..., Any], reason: str) -> None:
    """Adds a row of a function that no array goes through; only its compilations are counted."""
    ROWS[name] = Row(name, call, {}, {}, {"": reason})


def returned_by(name: str, function: str) -> None:
    """A public type that is only returned: the row of `function` is its row."""
    ALIASES[name] = function


EACH = between(0.1, 0.3, N)
LOSS = "where class_where class_weights z_loss"

# Targets.


def weighted_target(labels, smoothing, values):
    q = (1 - smoothing) * OneHot(labels) + smoothing * Uniform()
    return q.dot(values), q.probs(K)


def both(q, values):
    return q.dot(values), q.mass(), q.probs(K)


row(
    "Target",
    "labels smoothing values",
    weighted_target,
    smoothing=EACH,
    free="values",
    holes={"wrong:smoothing": "named weight, as in q * weight"},
)
row("OneHot", "labels values", lambda labels, values: both(OneHot(labels), values), free="values")
row("Uniform", "class_where values", lambda class_where, values: both(Uniform(class_where), values), free="values")
row("Dense", "probabilities values", lambda probabilities, values: both(Dense(probabilities), values), free="values")
row(
    "Dense, one for all",
    "probabilities values",
    lambda **a: both(Dense(a["probabilities"]), a["values"]),
    probabilities=simplex(K),
    free="values",
)
row("Rows", "table labels values", lambda table, labels, values: both(Rows(table, labels), values), free="values")
row(
    "Sparse",
    "indices weights values",
    lambda indices, weights, values: both(Sparse(indices, weights), values),
    indices=classes(N, S),
    weights=simplex(N, S),
    free="indices values",
)

SMOOTH = "labels smoothing prior class_where"
LATE = {"wrong:prior": "K is not known before the loss, which names the target's field"}
row("smooth", SMOOTH, lambda **a: smooth(**a, spread="others").probs(K), free="labels", holes=LATE)
row(
    "smooth, each",
    SMOOTH,
    lambda **a: smooth(**a, spread="all").probs(K),
    smoothing=EACH,
    prior=simplex(N, K),
    free="labels",
    holes=LATE,
)
row("smooth_labels", SMOOTH, num_classes=K, spread="others", free="labels")
row(
    "smooth_labels, dense",
    SMOOTH,
    labels=simplex(N, K),
    num_classes=K,
    spread="all",
    holes={"bfloat16": "the result has the dtype of dense labels"},
)
row(
    "smooth_binary_labels",
    "labels smoothing prior",
    labels=between(0, 1, N, K),
    prior=between(0, 1),
    holes={"bfloat16": "the result has the dtype of real labels"},
    free="labels",
)

# Losses of logits.


def every_sum(z, y, q):
    sums = z.top, z.lse, z.mass(q), z.dot(q), z.pick(y), z.mean(), z.entropy(), z.log_prob(y), z.cross_entropy(q)
    return *sums, z.top_prob, z.num_classes, jnp.exp(z.log_rival(y)), z.sum(jnp.square, shifted=False)


def sums_of_logits(logits, labels, smoothing, **options):
    operands = {"y": labels, "q": smooth(labels, smoothing)}
    return on_logits(every_sum, logits, operands, **options)


def poly1(z, y, epsilon):
    return -z.log_prob(y) + epsilon * (1 - jnp.exp(z.log_prob(y)))


RIVAL = {"grad:logits": "log_rival is a constant"}
row(
    "Logits",
    "logits labels smoothing where class_where class_weights",
    sums_of_logits,
    holes=RIVAL | {"wrong:labels": "the formula's name of it, y"},
)
row(
    "on_logits",
    f"logits labels epsilon {LOSS}",
    lambda logits, labels, epsilon, **options: on_logits(poly1, logits, {"y": labels, "epsilon": epsilon}, **options),
    epsilon=EACH,
    holes={"wrong:labels": "the formula's name of it, y"},
)
row("cross_entropy", f"logits target {LOSS}", ignore_index=5)
row("cross_entropy, dense", f"logits target {LOSS}", target=simplex(N, K), class_where=fixed(np.ones((N, K), bool)))
row("kl_divergence", f"logits target {LOSS}", target=simplex(N, K))
row("kl_divergence, labels", f"logits target {LOSS}", ignore_index=5)
SMOOTHED = f"labels smoothing prior {LOSS}"
row("smoothed_cross_entropy", f"logits {SMOOTHED}", spread="others", ignore_index=5)
PARTS = {"relative": True, "return_parts": True}
row("smoothed_cross_entropy, parts", f"logits {SMOOTHED}", **PARTS, reduction="mean", smoothing=EACH)
row("smoothed_cross_entropy, each", f"logits {SMOOTHED}", spread="all", smoothing=EACH, prior=simplex(N, K))
row("focal_loss", f"logits gamma {SMOOTHED}", spread="others", ignore_index=5, gamma=between(1, 3, N))
row(
    "poly_loss",
    f"logits coefficients {SMOOTHED}",
    coefficients=normal(2),
    spread="all",
    ignore_index=5,
    free="coefficients",
)
row("poly_loss, Poly-1", "logits labels coefficients smoothing where", coefficients=normal(), free="coefficients")
row("logit_norm_loss", f"logits temperature {SMOOTHED}", temperature=between(0.5, 2, N), spread="all", ignore_index=5)
row(
    "bi_tempered_loss",
    "logits t1 t2 labels smoothing prior where class_where z_loss",
    t1=between(0.7, 0.9, N),
    t2=between(1.1, 1.3, N),
    spread="others",
    ignore_index=5,
)
BINARY = "logits labels smoothing prior where class_weights"
BINARIES = {"labels": between(0, 1, N, K), "where": fixed(WHERE[:, None] & EXISTS), "prior": between(0, 1)}
row("sigmoid_cross_entropy", f"{BINARY} pos_weight", **BINARIES, pos_weight=between(1, 2, K), free="logits")
row("sigmoid_cross_entropy, integers", "logits labels", labels=integers(2, N, K), ignore_index=-1, free="logits")
row(
    "asymmetric_loss",
    f"{BINARY} gamma_positive gamma_negative margin",
    **BINARIES,
    gamma_positive=between(1, 2),
    gamma_negative=between(3, 4),
    free="logits",
)
row("asymmetric_loss, integers", "logits labels", labels=integers(2, N, K), ignore_index=-1, free="logits")
SMOOTHED_OPTAX = jax_ls.with_label_smoothing(
    optax.losses.softmax_cross_entropy, 0.1, prior=np.full(K, 1 / K, np.float32)
)
row(
    "with_label_smoothing",
    "logits labels",
    SMOOTHED_OPTAX,
    free="logits",
    holes={"bfloat16": "the wrapped loss computes in it"},
)
row(
    "smoothed_ctc_loss",
    "logits logit_paddings labels label_paddings smoothing prior where",
    logits=normal(N, T, K),
    labels=lambda rng: 1 + rng.integers(0, K - 1, (N, S)),
    smoothing=EACH,
    blank_id=0,
    logit_paddings=fixed(np.arange(T) >= T - np.arange(N)[:, None] % 2),
    label_paddings=fixed(np.zeros((N, S))),
    constant="logit_paddings label_paddings",
    free="labels",
)
row("mean", "losses weights denominator", free="losses")
row("reduce", "losses weights denominator", reduction="mean", free="losses")
row("reduce, nonzero", "losses weights", reduction="sum_by_nonzero_weights", free="losses")
row("reduce, none", "losses weights", reduction="none", free="losses")

returned_by("LossParts", "smoothed_cross_entropy, parts")

# Losses of an output layer.

LAYER = "hidden kernel target smoothing prior bias weights where class_where class_weights z_loss"
row(
    "linear_cross_entropy, tokens",
    f"{LAYER} denominator",
    plan="tokens",
    spread="others",
    chunk_size=2,
    softcap=9.0,
    ignore_index=5,
    reduction="mean",
    transposed=False,
    digits=2e-2,
    free="kernel",
    holes={"grad:forward": "gradients are taken in the forward pass: reverse mode alone"},
)
row(
    "linear_cross_entropy, parts",
    LAYER,
    plan="tokens",
    chunk_size=2,
    smoothing=EACH,
    **PARTS,
    digits=2e-2,
    free="kernel",
    holes={"grad": "of the parts, only the loss has a derivative: the other rows have it"},
)
row(
    "linear_cross_entropy, classes",
    LAYER,
    plan="classes",
    spread="all",
    block_size=2,
    reduction="none",
    smoothing=EACH,
    accumulate=None,
    digits=2e-2,
    free="kernel",
)


def losses_and_hits(logits, labels):
    return jax_ls.smoothed_cross_entropy(logits, labels, 0.1), logits.argmax(-1).astype(labels.dtype) == labels


CHUNKED = jax_ls.chunked_loss(losses_and_hits, has_aux=True, chunk_size=2)


def chunked(hidden, kernel, labels, **options):
    return CHUNKED(hidden, kernel, labels, softcap=9.0, **options)


NO_CLASSES = "the loss needs to see all classes: kernels split over classes are refused, with the remedy"
row(
    "chunked_loss",
    "hidden kernel labels bias weights denominator",
    chunked,
    digits=2e-2,
    free="kernel",
    holes={
        "wrong:labels": "any number of arguments may follow, without a name",
        "grad:forward": "gradients are taken in the forward pass: reverse mode alone",
    },
    kernel=normal(D, 9),
    bias=normal(9),
)

# ε from predictions.

RULE = "where class_where"
PREDICTED = {"constant": "logits"}
row("adaptive.confidence", f"logits labels smoothing gamma {RULE}", smoothing=EACH, **PREDICTED)
row("adaptive.uncertainty", f"logits labels smoothing {RULE}", **PREDICTED)
row("adaptive.margin", f"logits labels smoothing {RULE}", **PREDICTED)
row("adaptive.entropy", f"logits smoothing {RULE}", **PREDICTED)
row(
    "adaptive.focal_gamma",
    f"logits labels threshold below above {RULE}",
    threshold=between(0.2, 0.3),
    below=between(4, 5),
    above=between(2, 3),
    constant="logits threshold",
)
row(
    "adaptive.beta",
    "averaged key smoothing concentration where",
    averaged=between(0, 1, N),
    smoothing=EACH,
    concentration=between(2, 3),
    constant="averaged",
    free="averaged",
    holes={"x64": "random bits of another width"},
)
row(
    "adaptive.label_aware",
    "counts labels head tail",
    head=between(0.3, 0.4),
    tail=between(0, 0.1),
    shape="sine",
    free="labels",
)


def controlled(initial, rate, decay, logits, labels, **options):
    controller = adaptive.CalibrationController(initial=initial, low=0.0, high=0.3, rate=rate, decay=decay)
    state = controller.update(controller.init(), logits, labels, **options)
    return state.smoothing, state.gap


row(
    "adaptive.CalibrationController",
    f"logits labels initial rate decay {RULE}",
    controlled,
    **PREDICTED,
    initial=between(0.1, 0.2),
    rate=between(0.1, 0.2),
    decay=between(0.3, 0.5),
)
returned_by("adaptive.CalibrationState", "adaptive.CalibrationController")

# Calibration.

MEASURED = "logits labels where"
STEPS = {"grad": "a count of hits has no derivative in the logits"}
for score in ("negative_log_likelihood", "brier_score", "squared_error"):
    row(f"calibration.{score}", MEASURED)
row("calibration.overconfidence", MEASURED)
row("calibration.expected_calibration_error", MEASURED, num_bins=B, binning="width", norm=1)
row("calibration.expected_calibration_error, mass", MEASURED, num_bins=3, binning="mass", norm=2)
row("calibration.classwise_calibration_error", MEASURED, num_bins=B, binning="width", norm=1)
row("calibration.classwise_calibration_error, mass", MEASURED, num_bins=3, binning="mass", norm=2)
row("calibration.area_under_risk_coverage", MEASURED)
row("calibration.fit_temperature", MEASURED, bounds=(0.1, 10.0), constant="logits")


def bins_of(bins):
    both = bins + bins
    return both.count, both.correct, both.confidence_sum, both.error(2), both.overconfidence


row(
    "calibration.reliability",
    f"{MEASURED} edges",
    lambda **a: bins_of(calibration.reliability(**a)),
    constant="edges",
    free="edges",
)
row(
    "calibration.classwise_reliability",
    f"{MEASURED} edges",
    lambda **a: bins_of(calibration.classwise_reliability(**a)),
    constant="edges",
    free="edges",
)
returned_by("calibration.Reliability", "calibration.reliability")
row(
    "calibration.Mean",
    "losses where",
    lambda losses, where: (calibration.Mean.of(losses, where) + calibration.Mean.of(losses)).value,
    holes={"mask": "counted twice, once without the mask"},
    free="losses",
)

# Mixing, noise, online smoothing.


def mixed(batch):
    return batch.inputs, batch.target.weights, batch.target.probs(K)


DRAWN = "the draw is by rejection, whose derivative is that of the distribution"
KEPT = {"mask:zero": "what does not count stays as it is"}
MIX = KEPT | {"bfloat16": "inputs stay in their own dtype", "grad:alpha": DRAWN, "x64": "random bits of another width"}
row(
    "mixing.mixup",
    "inputs key labels alpha where",
    lambda **a: mixed(mixing.mixup(**a)),
    inputs=normal(N, D),
    holes=MIX,
)
row(
    "mixing.cutmix",
    "images key labels alpha where",
    lambda **a: mixed(mixing.cutmix(**a, axes=(1, 2))),
    images=normal(N, T, 7, 1),
    holes=MIX,
)
returned_by("mixing.Mixed", "mixing.mixup")


NOISE = "logits labels {} where class_where z_loss"
for loss in ("forward_correction", "backward_correction"):
    row(f"noise.{loss}", NOISE.format("resample_rate"), resample_rate=EACH, ignore_index=5)
    row(f"noise.{loss}, matrix", NOISE.format("matrix"))
row("noise.bootstrap", NOISE.format("beta"), beta=between(0.2, 0.8, N), kind="soft", ignore_index=5)
row("noise.bootstrap, hard", NOISE.format("beta"), kind="hard")
row("noise.label_relaxation", NOISE.format("relaxation"), relaxation=EACH, ignore_index=5)
row(
    "noise.generalized_cross_entropy",
    NOISE.format("exponent truncation"),
    exponent=between(0.5, 0.7, N),
    truncation=between(0.1, 0.2),
    ignore_index=5,
)
row(
    "noise.symmetric_cross_entropy",
    NOISE.format("alpha beta log_zero"),
    alpha=between(0.1, 0.5, N),
    log_zero=between(-5, -4),
    ignore_index=5,
)
row(
    "noise.early_learning",
    NOISE.format("averages weight"),
    weight=between(1, 3, N),
    ignore_index=5,
    constant="averages",
)
WIDER = {"x64": "random bits of another width"}
row("noise.disturb_labels", "labels key resample_rate", num_classes=K, resample_rate=EACH, holes=WIDER, free="labels")
row("noise.flip_labels", "labels key flip_rate", num_classes=K, flip_rate=EACH, holes=WIDER, free="labels")
row("noise.flip_labels, matrix", "labels key matrix", num_classes=K, holes=WIDER, free="labels")
row(
    "noise.optimal_smoothing", "flip_rate clean", num_classes=K, flip_rate=EACH, clean=between(0, 0.3), free="flip_rate"
)


def an_epoch(logits, labels, where):
    state = online.next_epoch(online.update(online.init(K), logits, labels, where=where))
    return state.matrix, online.update(state, logits, labels, where=where).sums


def a_step(decay, logits, labels, where):
    state = online.update(online.init(K, first="uniform", decay=decay), logits, labels, where=where)
    return online.target(state, labels).probs(K)


SUMS = "running sums are float32, with their rounding errors beside them"
BY_LABEL = {"mask:zero": "what the labels index is of every class", "x64:dtype": SUMS}
row(
    "online.update",
    "logits labels where",
    an_epoch,
    logits=fixed(3 * np.eye(K)[np.array([0, 1, 3, 3])]),
    labels=fixed([0, 1, 3, 5]),
    constant="logits",
    holes={"x64:dtype": SUMS},
)
row(
    "online.target",
    "decay logits labels where",
    a_step,
    decay=between(0.3, 0.7),
    constant="logits decay",
    labels=fixed([0, 1, 3, 5]),
    holes=BY_LABEL,
)
for name in ("OnlineState", "init", "next_epoch"):
    returned_by(f"online.{name}", "online.update")
row(
    "online.average_predictions",
    "averages logits indices decay where class_where",
    averages=simplex(7, K),
    indices=fixed([0, 6, 3, 2]),
    decay=between(0.3, 0.7),
    constant="logits",
    holes={"bfloat16": "the result has the dtype of the averages"},
)

# Penalties.

row(
    "penalties.confidence_penalty",
    f"logits beta threshold {RULE}",
    beta=between(0.2, 0.8, N),
    threshold=between(1.6, 1.8, N),
)
row("penalties.jensen", f"logits alpha prior {RULE}", alpha=between(0.2, 0.8, N))
row(
    "penalties.jensen, each",
    f"logits alpha prior {RULE}",
    alpha=between(0, 0, N),
    prior=simplex(N, K),
    holes={"grad:alpha": "exact for 0 < α < 1 alone"},
)
row("penalties.max_suppression", f"logits {RULE}")
row("penalties.margin", f"logits margin {RULE}", margin=between(0.2, 0.4, N))
row(
    "penalties.conditional",
    f"logits margin over under {RULE}",
    over=between(1, 2, N),
    under=between(1, 2),
    holes={"grad:logits": "the maximum in the second term is a constant"},
)
row("penalties.squared_logits", f"logits {RULE}")
row("penalties.z_loss", f"logits {RULE}")

# Preferences and policies.

row("preferences.bradley_terry", "chosen_reward rejected_reward smoothing where", smoothing=EACH, free="chosen_reward")
PAIR = f"{' '.join(PAIRS)} beta {{}} where"
for name in ("dpo", "ipo", "exo_pair"):
    row(
        f"preferences.{name}", PAIR.format("smoothing"), smoothing=EACH, beta=between(0.2, 0.8, N), free="policy_chosen"
    )
row("preferences.robust_dpo", PAIR.format("flip_rate"), flip_rate=EACH, free="policy_chosen")
returned_by("preferences.Preference", "preferences.dpo")
row("preferences.robust_smoothing", "flip_rate", free="flip_rate")
ACTIONS = {"legal_actions": fixed(EXISTS)}
row(
    "preferences.smooth_policy",
    "policy smoothing legal_actions prior",
    policy=simplex(N, K),
    smoothing=EACH,
    from_logits=False,
    **ACTIONS,
)
row(
    "preferences.epsilon_greedy",
    "action_values smoothing legal_actions",
    action_values=normal(N, K),
    **ACTIONS,
    constant="action_values",
)
row(
    "preferences.dirichlet_noise",
    "probs key fraction alpha legal_actions",
    probs=simplex(N, K),
    fraction=EACH,
    **ACTIONS,
    holes={"grad:alpha": DRAWN, "x64": "random bits of another width"},
)
SEQUENCES = {"labels": classes(N, T), "where": fixed(WHERE[:, None] & np.ones(T, bool))}
row("preferences.sequence_log_probability", "outputs labels where class_where", outputs=normal(N, T, K), **SEQUENCES)
row(
    "preferences.sequence_log_probability, hidden",
    "outputs labels kernel bias where class_where",
    outputs=normal(N, T, D),
    **SEQUENCES,
    softcap=9.0,
    chunk_size=3,
    transposed=False,
    digits=2e-2,
    free="kernel",
)

# Priors.

row("priors.unigram", "counts pseudo_count temperature class_where", pseudo_count=between(0.5, 1))
row("priors.logit_adjustment", "counts strength pseudo_count", strength=between(0.5, 1), pseudo_count=between(0.5, 1))
row("priors.similarity", "embeddings temperature", embeddings=normal(K, D), metric="cosine")
row("priors.similarity, confusion", "confusion temperature", confusion=between(0.1, 1, K, K), free="confusion")
row("priors.hierarchy", "distances beta", distances=between(1, 2, K, K))
on_host("priors.tree_distances", lambda: priors.tree_distances([3, 3, 4, 4, -1]), "static parents, NumPy on the host")
row("priors.teacher", "logits temperature", lambda **a: priors.teacher(**a).probs(K), constant="logits")
row(
    "priors.mix",
    "target_a target_b lam",
    lambda **a: priors.mix(**a).probs(K),
    target_a=classes(N),
    target_b=simplex(N, K),
    lam=EACH,
    free="target_a",
    holes={"wrong:target_b": "K is not known before the loss"},
)
row(
    "priors.neighbors",
    "labels weights where",
    lambda **a: priors.neighbors(**a, offsets=(-1, 1)).probs(K),
    labels=classes(N, T),
    weights=between(1, 2, 2),
    where=fixed(WHERE[:, None] & np.ones(T, bool)),
    holes={"mask:zero": "a step that does not count keeps its own label"},
)
row(
    "priors.spatial",
    "label_map sigma where",
    lambda **a: priors.spatial(**a, kernel_size=3, ndim=2).probs(K),
    label_map=classes(N, T, 7),
    sigma=between(0.5, 1),
    where=fixed(WHERE[:, None, None] & np.ones((T, 7), bool)),
    holes={"mask:zero": "a step that does not count keeps its own label"},
)
row("priors.sord", "ranks beta", ranks=normal(K), phi="absolute")
row("priors.gaussian", "ranks sigma", ranks=normal(K), sigma=between(0.5, 1))
row("priors.binomial", "margin", num_classes=K)
row(
    "priors.geometric", "alpha left", num_classes=K, alpha=between(0.2, 0.4, K), left=between(0.3, 0.6, K), free="alpha"
)
row("priors.triangular", "alpha", num_classes=K)
row(
    "priors.beta",
    "shapes",
    num_classes=K,
    shapes=between(1, 3, K, 2),
    holes={"grad": "JAX has no derivative of betainc in its shapes"},
)
row("priors.poisson", "rates", num_classes=K, rates=between(1, 5, K))

# Schedules: what is called is the schedule.

STEP = {"step": fixed(3), "smoothing": between(0.1, 0.3)}
NO_SHAPE = {"wrong:step": "optax's own argument"}
row(
    "schedules.to_zero",
    "smoothing step",
    lambda smoothing, step: schedules.to_zero(smoothing, 9, begin=2)(step),
    **STEP,
    holes=NO_SHAPE,
)
row(
    "schedules.to_zero, cosine",
    "smoothing step",
    lambda smoothing, step: schedules.to_zero(smoothing, 9, shape="cosine")(step),
    **STEP,
    holes=NO_SHAPE,
)
row(
    "schedules.warmup",
    "smoothing step",
    lambda smoothing, step: schedules.warmup(smoothing, 9)(step),
    **STEP,
    holes=NO_SHAPE,
)
row(
    "schedules.two_stage",
    "smoothing step",
    lambda smoothing, step: schedules.two_stage(smoothing, 5)(step),
    **STEP,
    holes=NO_SHAPE,
)
row(
    "schedules.plain_then_negative",
    "smoothing step",
    lambda smoothing, step: schedules.plain_then_negative(smoothing, 2)(step),
    step=fixed(3),
    smoothing=between(-0.3, -0.1),
    holes=NO_SHAPE,
)

# Values.


def support():
    return values.Support(-2, 2, B)


row(
    "values.hl_gauss",
    "returns sigma_ratio",
    lambda **a: values.hl_gauss(**a, support=support(), padding=1).probs(B),
    sigma_ratio=between(0.5, 1, N),
    free="returns",
)
row("values.two_hot", "returns", lambda returns: values.two_hot(returns, support()).probs(B), free="returns")
row(
    "values.categorical_projection",
    "probs returns",
    lambda probs, returns: values.categorical_projection(returns, probs, support()).probs(B),
    probs=simplex(N, B),
    returns=between(-2, 2, N, B),
)
row("values.expected_value", "logits", lambda logits: values.expected_value(logits, support()), logits=normal(N, B))
row(
    "values.Support",
    "low high logits",
    lambda low, high, logits: values.expected_value(logits, values.Support(low, high, B).pad(1)),
    low=between(-2, -1),
    high=between(1, 2),
    logits=normal(N, B + 2),
)
for name in ("symlog", "symexp"):
    row(f"values.{name}", "x", free="x")
for name in ("signed_hyperbolic", "signed_parabolic"):
    row(f"values.{name}", "x epsilon", epsilon=between(0.1, 0.3), free="x")

# Flax.


def metric(kind):
    def measured(**arrays):
        score = kind()
        score.update(**arrays)
        score.update(**arrays)
        return score.compute()

    return measured


for kind in (nnx.BrierScore, nnx.CalibrationError, nnx.NegativeLogLikelihood, nnx.Overconfidence):
    row(f"nnx.{kind.__name__}", MEASURED, metric(kind), holes={"x64:dtype": SUMS, "grad": SUMS})


def soft_labels(logits, labels, where):
    module = nnx.OnlineSmoothing(K)
    module.update(logits, labels, where=where)
    module.next_epoch()
    return module.target(labels).probs(K)


def controller_module(logits, labels, where, class_where):
    module = nnx.SmoothingController()
    module.update(logits, labels, where=where, class_where=class_where)
    return module.smoothing[...], module.gap[...]


row(
    "nnx.OnlineSmoothing",
    "logits labels where",
    soft_labels,
    labels=fixed([0, 1, 3, 5]),
    constant="logits",
    holes=BY_LABEL,
)
row("nnx.SmoothingController", f"logits labels {RULE}", controller_module, **PREDICTED)
returned_by("nnx.SmoothingState", "nnx.OnlineSmoothing")

# Sweeps and pictures.


def trained(key, epsilon):
    return {"a": epsilon + jax.random.uniform(key)}


def swept():
    return sweeps.sweep(trained, np.linspace(0, 1, 4), 2)


def bins():
    return calibration.reliability(3 * np.eye(4, K, dtype=np.float32), np.arange(4, dtype=np.int32))


NUMPY, PICTURE = "NumPy on the host", "draws with Matplotlib on the host"
HIDDEN, KERNEL = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((9, D), (D, K)))
on_host("sweeps.grid", lambda: sweeps.grid(smoothing=[0.0, 0.5], noise=[1.0, 2.0]), NUMPY)
on_host("sweeps.log_uniform", lambda: sweeps.log_uniform(0, 1e-3, 0.5, 9), NUMPY)
on_host("sweeps.sweep", swept, "runs programs of its own, over devices of its own: test_sweeps.py")
returned_by("sweeps.SweepResult", "sweeps.sweep")
on_host("plotting.plot_sweep", lambda: plotting.plot_sweep(swept()), PICTURE)
on_host("plotting.plot_reliability", lambda: plotting.plot_reliability(bins()), PICTURE)
on_host("plotting.plot_confidence", lambda: plotting.plot_confidence(bins()), PICTURE)
on_host("plotting.plot_targets", lambda: plotting.plot_targets(smooth(np.arange(3), 0.1), K), PICTURE)
on_host("plotting.penultimate_projection", lambda: plotting.penultimate_projection(HIDDEN, KERNEL), NUMPY)
on_host("plotting.plot_penultimate", lambda: plotting.plot_penultimate(HIDDEN, np.arange(9) % K, KERNEL), PICTURE)

# Calls of other libraries, by their own names.

FOREIGN = {"wrong": "the core checks the shapes, in the core's words"}
row(
    "compat.torch_cross_entropy",
    "input target weight",
    input=normal(N, K),
    weight=between(0.5, 2, K),
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.1,
    holes=FOREIGN,
)
row(
    "compat.LabelSmoothingCrossEntropy",
    "output target",
    lambda output, target: compat.LabelSmoothingCrossEntropy()(output, target),
    output=normal(N, K),
    holes=FOREIGN,
)
row(
    "compat.LabelSmoothing",
    "x target",
    lambda x, target: compat.LabelSmoothing(K, 2, 0.1)(x, target),
    x=lambda rng: np.log(rng.dirichlet(np.ones(K), N)),
    holes=FOREIGN,
)
row(
    "compat.tf_softmax_cross_entropy",
    "onehot_labels logits weights",
    onehot_labels=simplex(N, K),
    label_smoothing=0.1,
    reduction="weighted_mean",
    holes=FOREIGN,
)
for name in ("keras_categorical_crossentropy", "keras_binary_crossentropy"):
    row(
        f"compat.{name}",
        "y_true y_pred",
        y_true=simplex(N, K),
        y_pred=simplex(N, K),
        label_smoothing=0.1,
        from_logits=False,
        holes=FOREIGN,
    )
row(
    "compat.keras_sparse_categorical_crossentropy",
    "y_true y_pred",
    y_true=classes(N),
    y_pred=simplex(N, K),
    from_logits=False,
    ignore_class=5,
    holes=FOREIGN,
)
row("compat.timm_label_smoothing_cross_entropy", "x target", x=normal(N, K), smoothing=0.1, holes=FOREIGN)
row(
    "compat.timm_binary_cross_entropy",
    "x target weight pos_weight",
    x=normal(N, K),
    weight=between(0.5, 2, K),
    pos_weight=between(1, 2, K),
    smoothing=0.1,
    target_threshold=None,
    reduction="mean",
    sum_classes=True,
    holes=FOREIGN,
)
row(
    "compat.fairseq_label_smoothed_nll_loss",
    "lprobs target",
    lprobs=lambda rng: np.log(rng.dirichlet(np.ones(K), N)),
    epsilon=0.1,
    ignore_index=5,
    reduce=False,
    holes=FOREIGN,
)
row(
    "compat.t5x_compute_weighted_cross_entropy",
    "logits targets weights",
    targets=classes(N),
    label_smoothing=0.1,
    z_loss=0.01,
    loss_normalizing_factor=3.0,
    holes=FOREIGN,
)
row(
    "compat.flax_compute_weighted_cross_entropy",
    "logits targets weights",
    targets=classes(N),
    label_smoothing=0.1,
    holes=FOREIGN,
)
row("compat.maxtext_cross_entropy_with_logits", "logits targets", targets=simplex(N, K), z_loss=0.01, holes=FOREIGN)
