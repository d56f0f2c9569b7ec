"""Argument checks. A message says the argument's name, what was expected and what came: `docs/errors.md` has the list.

chex checks shapes, ranks and dtypes and raises `AssertionError`. Options and values raise `ValueError` or `TypeError`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

Shape = tuple[int, ...]
Shaped = Array | jax.ShapeDtypeStruct
P = ParamSpec("P")
R = TypeVar("R")

BY_EXAMPLE = "jax_ls.mean(losses, weights) for weights of examples"

# Names of options in other libraries: those of ours that may be meant, the first that a function has, or else a remedy.
ELSEWHERE: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(
        ["label_smoothing", "eps", "epsilon", "alpha"], (("smoothing",), "smooth(labels, ε) as the target")
    ),
    "smoothing": ((), "smoothed_cross_entropy, or smooth(labels, ε) as the target"),
    "weight": (("class_weights",), BY_EXAMPLE),
    **dict.fromkeys(["weights", "sample_weight", "sample_weights"], (("weights",), BY_EXAMPLE)),
    "reduction": ((), "one loss for each example, and then jax_ls.reduce(losses, reduction=...)"),
    **dict.fromkeys(["mask", "masks", "padding_mask"], (("where",), "jax_ls.mean(losses, mask)")),
    **dict.fromkeys(["ignore_label", "padding_idx", "ignore_class"], (("ignore_index",), "where=labels != index")),
    **dict.fromkeys(["dim", "class_dim"], (("axis",), "classes last")),
    **dict.fromkeys(["input", "inputs", "predictions", "y_pred"], (("logits",), "logits")),
    **dict.fromkeys(["labels", "target", "targets", "y_true"], (("labels", "target"), "labels")),
    **dict.fromkeys(["z_loss_weight", "z_loss_multiplier", "lse_square_scale"], (("z_loss",), "penalties.z_loss")),
    **dict.fromkeys(["logit_softcap", "final_logit_softcap"], (("softcap",), "softcap * jnp.tanh(logits / softcap)")),
    **dict.fromkeys(["embedding", "lm_head"], (("kernel",), "logits")),
    "num_classes": ((), "no number of classes, which the logits say"),
}


def named_options(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function, which then answers a name that it does not know with the name to write."""
    parameters = inspect.signature(function).parameters
    positional = [x.name for x in parameters.values() if x.kind is not inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                expected = _written_here(name, parameters)
                raise TypeError(f"{name}: expected {expected}, got {name}={describe(kwargs[name])}")
        if len(args) > len(positional):
            names = ", ".join(positional)
            raise TypeError(f"{function.__name__}: expected options by name after ({names}), got {len(args)} arguments")
        return function(*args, **kwargs)

    return checked


def _written_here(name: str, parameters: Collection[str]) -> str:
    """Returns what to write in place of an option of another library."""
    if name not in ELSEWHERE:
        return f"one of {' | '.join(parameters)}"
    ours, otherwise = ELSEWHERE[name]
    found = next((word for word in ours if word in parameters), None)
    if found is None:
        return otherwise
    # A weight may be one of classes or one of examples.
    return f"{found}= for weights of classes, or {otherwise}" if found == "class_weights" else f"the name {found}="


def describe(x: Any) -> str:
    """`float32 (8, 3)` for arrays, the value itself for anything else."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        return f"{x.dtype} {tuple(x.shape)}"
    return repr(x)


def _through_chex(message: Callable[[], str], check: Callable[..., None], *arguments: Any) -> None:
    """Runs a check of chex; where it fails, our words come first. They are built only then."""
    try:
        check(*arguments)
    except AssertionError as error:
        raise AssertionError(f"{message()}\n{error}") from None


def _got(name: str, expected: str, x: Any, remedy: str = "") -> Callable[[], str]:
    return lambda: f"{name}: expected {expected}, got {describe(x)}{remedy}"


def assert_kind(name: str, x: Array, kind: type, expected: str, remedy: str = "") -> None:
    """`x` is of the dtype kind `int`, `float` or `bool`; `remedy` ends the message."""
    _through_chex(_got(name, expected, x, remedy), chex.assert_type, x, kind)


def assert_shape(name: str, x: Array, shapes: Sequence[Shape], expected: str) -> None:
    """`x` has one of `shapes`; in `expected`, {shapes} stands for them."""
    if x.shape not in shapes:
        words = expected.replace("{shapes}", " or ".join(map(str, shapes)))
        _through_chex(_got(name, words, x), chex.assert_shape, x, shapes[-1])


def assert_rank(name: str, x: Array, rank: int, expected: str) -> None:
    """`x` has `rank` axes."""
    _through_chex(_got(name, expected, x), chex.assert_rank, x, rank)


def assert_min_rank(name: str, x: Array, rank: int, expected: str) -> None:
    """`x` has at least `rank` axes."""
    _through_chex(_got(name, expected, x), chex.assert_rank, x, {max(x.ndim, rank)})


def assert_batch(name: str, x: Array, values: Array | None) -> None:
    """Raises unless `x` has the batch axes (*batch,) of values (*batch, K)."""
    if values is not None:
        assert_shape(name, x, [values.shape[:-1]], "batch axes {shapes}, as the values have")


def assert_num_classes(name: str, x: Array, num_classes: int | None) -> None:
    """Raises unless the last axis of `x` has length `num_classes`."""
    if num_classes is not None:
        message = lambda: f"{name}: expected {num_classes} classes, got {describe(x)}"  # noqa: E731
        _through_chex(message, chex.assert_axis_dimension, x, -1, num_classes)


def assert_total(name: str, num_classes: int, total: int) -> None:
    """A target over `num_classes` meets a loss over as many."""
    message = lambda: f"{name}: expected {total} classes, as the values have, got {num_classes}"  # noqa: E731
    _through_chex(message, chex.assert_equal, num_classes, total)


def assert_class_values(name: str, x: Array, values: Shaped | None) -> None:
    """Raises unless `x` is (K,) or (*batch, K), for values (*batch, K)."""
    if values is not None:
        assert_shape(name, x, [values.shape[-1:], values.shape], "{shapes}, as the values have")


def check_option(name: str, value: Any, options: Collection[str]) -> None:
    """Raises unless `value` is one of the words `options`."""
    if not isinstance(value, str) or value not in options:
        words = " | ".join(f'"{option}"' for option in options)
        raise ValueError(f"{name}: expected {words}, got {value!r}")


def check_axis(name: str, axis: Any, ndim: int) -> int:
    """Returns `axis` as a number in [0, ndim)."""
    if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
        raise TypeError(f"{name}: expected an integer, got {axis!r}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"{name}: expected one of {ndim} axes, -{ndim} to {ndim - 1}, got {axis}")
    return int(axis) % ndim


def as_batch_labels(name: str, x: Any, batch: Shape) -> Array:
    """Returns labels, integers (*batch,)."""
    labels = as_labels(name, x)
    assert_shape(name, labels, [batch], "integers {shapes}")
    return labels


def as_batch_numbers(name: str, x: Any, batch: Shape) -> Array:
    """Returns real numbers () or (*batch,), in float32 or wider."""
    values = as_weight(name, x)
    assert_shape(name, values, [(), batch], "{shapes}, the shape of the batch")
    return values


def check_mesh_axes(name: str, axes: Any) -> None:
    """Raises unless each name in `axes` is an axis of the surrounding `jax.shard_map` or `jax.vmap`."""
    for axis in axes if isinstance(axes, tuple) else (axes,):
        try:
            jax.lax.axis_size(axis)
        except (NameError, TypeError, ValueError) as error:
            known = jax.sharding.get_abstract_mesh().manual_axes
            which = f"one of {' | '.join(map(repr, known))}" if known else "and there is none around this call"
            message = f"{name}: expected a mesh axis of the surrounding jax.shard_map, {which}, got {axis!r}"
            raise ValueError(message) from error


def check_integer(name: str, x: object) -> None:
    """Raises unless `x` is a static integer."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {x!r}")


def wide(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which sums over classes accumulate: float32, or `dtype` if it is wider."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def same_dtype(*arrays: Array) -> list[Array]:
    """Returns all arrays in the widest of their dtypes, because strict promotion refuses to mix dtypes."""
    dtype = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    return [x.astype(dtype) for x in arrays]


def as_array(name: str, x: Any, expected: str = "an array of numbers") -> Array:
    """Returns `x` as a JAX array; a parameter that Flax Linen has boxed with the names of its axes is unboxed.

    Integers of NumPy that JAX cannot hold become the nearest that it can.
    """
    unbox = getattr(x, "unbox", None)
    widest = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "iu" and x.dtype.itemsize >= widest.dtype.itemsize:
        # JAX would wrap 2³² + 1 to 1, which names a class.
        x = np.minimum(x, widest.max)
        x = np.maximum(x, widest.min) if x.dtype.kind == "i" else x
    try:
        x = unbox() if callable(unbox) else x
        return jnp.asarray(x)
    except (OverflowError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected {expected}, got {x!r}") from error


def as_weight(name: str, x: object) -> Array:
    """Returns real numbers in float32 or wider, because 1 − ε loses digits in a narrower dtype."""
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "iu":
        x = x.astype(np.float32)
    x = as_array(name, x, "a number or an array of numbers")
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(wide(x.dtype))
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    raise TypeError(f"{name}: expected real numbers, got {describe(x)}")


def check_size(name: str, size: object) -> int:
    """Returns `size`, which must be a positive static integer."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name}: expected a positive integer, got {size!r}")
    if size < 1:
        raise ValueError(f"{name}: expected a positive integer, got {size}")
    return int(size)


def as_labels(name: str, x: ArrayLike) -> Array:
    """Returns labels, integers of 32 bits or more. Integers that do not fit become the largest of the dtype."""
    labels = as_array(name, x, "integers (*batch,)")
    as_floats = jnp.issubdtype(labels.dtype, jnp.floating)
    assert_kind(name, labels, int, "integers (*batch,)", f": {name}.astype(int)?" if as_floats else "")
    dtype = jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32
    if jnp.iinfo(labels.dtype).max > jnp.iinfo(dtype).max:
        labels = jnp.minimum(labels, jnp.asarray(jnp.iinfo(dtype).max, labels.dtype))
    return labels.astype(dtype)


def not_ignored(labels: Array, ignore_index: int) -> Array:
    """Returns which labels are not `ignore_index`, a static integer."""
    check_integer("ignore_index", ignore_index)
    labels = as_labels("labels", labels)
    held = jnp.iinfo(labels.dtype)
    if not held.min <= ignore_index <= held.max:
        raise ValueError(f"ignore_index: expected an integer of {held.bits} bits, got {ignore_index}")
    return labels != ignore_index


def as_kept(labels: Array, where: ArrayLike | None, ignore_index: int | None) -> Array | None:
    """Returns which elements `where` and `ignore_index` leave of integer labels; None for all."""
    if where is not None:
        where = as_where("where", where, labels.shape)
    if ignore_index is None:
        return where
    assert_kind("labels", labels, int, "integers, for ignore_index to name one")
    kept = not_ignored(labels, ignore_index)
    return kept if where is None else where & kept


def as_where(name: str, x: ArrayLike, shape: Shape) -> Array:
    """Booleans of `shape`."""
    where = as_array(name, x, "booleans, one an example")
    if where.dtype != jnp.bool_ or where.shape != shape:
        assert_kind(name, where, bool, f"booleans {shape}", f": {name}.astype(bool)?" if where.shape == shape else "")
        assert_shape(name, where, [shape], "booleans {shapes}")
    return where


def as_class_where(name: str, x: ArrayLike) -> Array:
    """Returns booleans (K,) or (*batch, K)."""
    where = as_array(name, x, "booleans (K,) or (*batch, K)")
    assert_kind(name, where, bool, "booleans (K,) or (*batch, K)")
    assert_min_rank(name, where, 1, "booleans (K,) or (*batch, K)")
    return where


def as_class_values(name: str, x: ArrayLike, *, widened: bool = True) -> Array:
    """Returns real numbers (K,) or (*batch, K), in float32 or wider; in their own dtype if not `widened`.

    What is widened before a loss is written out wide: a (*batch, K) operand that becomes a target had better not be.
    """
    values = as_array(name, x, "real numbers (K,) or (*batch, K)")
    assert_kind(name, values, float, "real numbers (K,) or (*batch, K)")
    assert_min_rank(name, values, 1, "real numbers (K,) or (*batch, K)")
    return values.astype(wide(values.dtype)) if widened else values


def as_broadcast(name: str, x: object, like: Shaped) -> Array:
    """Returns real numbers, broadcast to the shape and cast to the dtype of `like`."""
    values = as_weight(name, x)
    message = lambda: f"{name}: expected a shape that broadcasts to {like.shape}, got {describe(values)}"  # noqa: E731
    _through_chex(message, chex.assert_is_broadcastable, values.shape, like.shape)
    return jnp.broadcast_to(values, like.shape).astype(like.dtype)


def as_logits(name: str, x: ArrayLike) -> Array:
    """Returns logits (*batch, K) in their own dtype."""
    logits = as_array(name, x, "real numbers (*batch, K)")
    swapped = ": are these the labels? Logits come first" if jnp.issubdtype(logits.dtype, jnp.integer) else ""
    assert_kind(name, logits, float, "real numbers (*batch, K)", swapped)
    assert_min_rank(name, logits, 1, "real numbers (*batch, K)")
    return logits


def check_no_probabilities(name: str, x: Array) -> None:
    """Raises where the first rows of concrete logits (*batch, K) are probabilities: none negative, each sum 1."""
    if isinstance(x, Tracer) or x.ndim < 2 or x.shape[-1] < 2 or not x.addressable_shards:
        return
    here = x.addressable_shards[0].data
    if here.shape[-1] < x.shape[-1] or not here.size:
        return
    with jax.ensure_compile_time_eval():
        rows = np.asarray(here[(0,) * (x.ndim - 2)][:16]).astype(np.float64)
    tolerance = 4 * float(jnp.finfo(x.dtype).eps) ** 0.5
    if len(rows) > 1 and (rows >= 0).all() and (np.abs(rows.sum(axis=-1) - 1) < tolerance).all():
        raise ValueError(f"{name}: expected logits, got probabilities, {describe(x)} whose rows sum to 1: jnp.log(p)?")


def assert_target(name: str, x: Array, logits: Shaped) -> None:
    """`x` is integers (*batch,) or real numbers (*batch, K), for logits (*batch, K)."""
    shape, kind = (logits.shape, float) if x.ndim == logits.ndim else (logits.shape[:-1], int)

    def message() -> str:
        return (
            f"{name}: expected integers {logits.shape[:-1]} or probabilities {logits.shape}, got {describe(x)}"
            f"{_remedy(x, logits)}"
        )

    _through_chex(message, chex.assert_type, x, kind)
    _through_chex(message, chex.assert_shape, x, shape)


def _remedy(x: Array, logits: Shaped) -> str:
    """What the caller probably meant."""
    batch = logits.shape[:-1]
    if x.shape == batch and jnp.issubdtype(x.dtype, jnp.floating):
        return ": labels.astype(int)?"
    if x.shape == (*batch, 1):
        return ": labels[..., 0].astype(int)?" if jnp.issubdtype(x.dtype, jnp.floating) else ": labels[..., 0]?"
    if x.shape == logits.shape and not jnp.issubdtype(x.dtype, jnp.floating):
        return ": one-hot labels? labels.astype(float)"
    axes = [i for i in range(len(logits.shape)) if x.shape == logits.shape[:i] + logits.shape[i + 1 :]]
    if axes and x.ndim:
        return f": classes on axis {axes[0]}? axis={axes[0]}"
    return ""


def as_bias(name: str, x: ArrayLike, num_classes: int) -> Array:
    """Returns real numbers (K,), in float32 or wider."""
    bias = as_class_values(name, x)
    assert_shape(name, bias, [(num_classes,)], f"({num_classes},), one number a class")
    return bias


def as_parameter(name: str, x: Any, holds: Callable[[Any], Any], expected: str) -> Array:
    """Returns real numbers for which `holds` is true. Others raise if they are concrete, and become NaN if traced."""
    values = as_weight(name, x)
    if isinstance(x, Tracer):
        return jnp.where(holds(values), values, jnp.nan)
    with np.errstate(over="ignore"):
        rounded = np.asarray(x).astype(values.dtype)
    if not (held := np.asarray(holds(rounded))).all():
        raise ValueError(f"{name}: expected {expected}, got {np.asarray(x)[~held].flat[0]} in {values.dtype}")
    return values


def check_smoothing(x: Any) -> None:
    """Raises for an integer other than 0, which is likelier the third argument of another library: an axis."""
    if isinstance(x, int | np.integer) and not isinstance(x, bool) and x != 0:
        raise TypeError(f"smoothing: expected a real number, got the integer {x}: axis={x}, or {x}.0?")


def as_positive(name: str, x: Any) -> Array:
    """Returns finite numbers > 0; subnormal ones are refused, because XLA flushes them to 0."""
    return as_parameter(name, x, lambda x: (x >= jnp.finfo(x.dtype).tiny) & (x < np.inf), "finite numbers > 0")


def as_amount(name: str, x: Any) -> Array:
    """Returns finite numbers ≥ 0."""
    return as_parameter(name, x, lambda x: (x >= 0) & (x < np.inf), "finite numbers ≥ 0")


def as_skew(name: str, x: Any) -> Array:
    """Returns numbers in [0, 1]."""
    return as_parameter(name, x, lambda x: (x >= 0) & (x <= 1), "numbers in [0, 1]")


def as_scalar(name: str, x: Array) -> Array:
    """Returns `x`, which must have shape ()."""
    assert_shape(name, x, [()], "a number")
    return x


def check_values(name: str, x: Any, holds: Callable[[Any], Any], expected: str) -> None:
    """Raises unless `holds` is true of all concrete numbers. Traced numbers pass."""
    if not isinstance(x, Tracer) and not np.all(holds(np.asarray(x))):
        raise ValueError(f"{name}: expected {expected}, got {x!r}")
