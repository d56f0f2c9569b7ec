"""What every loss takes on TPUs and GPUs, as their compilers see it: temporaries, passes over the logits, cycles.

    python benchmarks/accelerators.py                     # the tables of benchmarks/README.md
    python benchmarks/accelerators.py --quick             # a few minutes: one TPU, one GPU, one shape
    python benchmarks/accelerators.py --device h100 --shape 8192x32000 --dtype float16 --table losses

No device is needed, but its compiler is: `compile_for.missing` says how to install it. Passes are those of the value
and, behind the stroke, of value and gradient, in multiples of the logits; no loss can do with less than 1 and 3. They
and the temporaries do not depend on the machine. Cycles are the TPU compiler's estimate of value and gradient, their
ratios are to optax's one-hot route, which smooths, and to its loss of integer labels, which does not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import compile_for
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_losses as plain
from cross_entropy import parse_shape
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import table
from plain_losses import Batch, Loss

import jax_ls
from jax_ls import Dense, Rows, Sparse, adaptive, noise, penalties, smoothed_cross_entropy

DEVICES = ("v5e", "v5p", "v6e", "h100")
SHAPES = ((8192, 32000), (8192, 128256), (65536, 1000), (128, 10))
DTYPES = ("float32", "bfloat16", "float16")
MESHES = ("v5e:2x4", "h100:8")
MODES = ("Auto", "Explicit", "shard_map")
TABLES = ("losses", "methods", "options", "meshes")


ONE_HOT, INTEGER = "optax one-hot, smoothed", "optax integer, not smoothed"

# In the logits' own dtype but for `custom_vjp`: that costs least, and is what people run.
PEERS: dict[str, Loss] = {
    ONE_HOT: plain.one_hot_smoothed,
    INTEGER: plain.integer,
    "closed form": plain.smoothed,
    "jax.nn": plain.jax_nn,
    "custom_vjp by hand": plain.custom_vjp,
}

OURS: dict[str, Loss] = {
    "jax_ls": lambda z, b: smoothed_cross_entropy(z, b.labels, b.smoothing),
    "jax_ls, prior (K,)": lambda z, b: smoothed_cross_entropy(z, b.labels, b.smoothing, prior=b.prior),
    "jax_ls, where and z_loss": lambda z, b: smoothed_cross_entropy(
        z, b.labels, b.smoothing, where=b.where, z_loss=1e-4
    ),
}


@dataclass(frozen=True)
class Method:
    """A loss of the library beside its plain formula."""

    name: str
    loss: Loss
    plain: Loss


def _with_rule(rule: Callable[[Array, Batch], Array]) -> Loss:
    return lambda z, b: smoothed_cross_entropy(z, b.labels, rule(z, b))


def _by_rank(z: Array, b: Batch) -> Array:
    epsilon = adaptive.beta(jax.random.key(0), b.averaged, b.smoothing)
    return smoothed_cross_entropy(z, b.labels, epsilon, spread="others")


def _by_focal_gamma(z: Array, b: Batch) -> Array:
    return jax_ls.focal_loss(z, b.labels, adaptive.focal_gamma(z, b.labels))


def _ctc(z: Array, b: Batch) -> Array:
    frames, labels = plain.sequences(z, b)
    return jax_ls.smoothed_ctc_loss(frames, jnp.zeros(frames.shape[:2]), labels, jnp.zeros(labels.shape), b.smoothing)


METHODS = (
    Method("cross_entropy, labels", lambda z, b: jax_ls.cross_entropy(z, b.labels), plain.integer),
    Method("cross_entropy, q (batch, K)", lambda z, b: jax_ls.cross_entropy(z, b.each_prior), plain.dense),
    Method(
        "kl_divergence",
        lambda z, b: jax_ls.kl_divergence(z, jax_ls.smooth(b.labels, b.smoothing)),
        plain.kl_divergence,
    ),
    Method("smoothed_cross_entropy", OURS["jax_ls"], plain.smoothed),
    Method(
        "sigmoid_cross_entropy",
        lambda z, b: jax_ls.sigmoid_cross_entropy(z, b.many_labels, b.smoothing).sum(axis=-1),
        plain.sigmoid,
    ),
    Method("confidence_penalty", lambda z, b: penalties.confidence_penalty(z, 0.1), plain.confidence_penalty),
    Method("jensen", lambda z, b: penalties.jensen(z, 0.3), plain.jensen),
    Method("max_suppression", lambda z, b: penalties.max_suppression(z), plain.max_suppression),
    Method("margin", lambda z, b: penalties.margin(z), plain.margin),
    Method("conditional", lambda z, b: penalties.conditional(z), plain.conditional),
    Method("squared_logits", lambda z, b: penalties.squared_logits(z), plain.squared_logits),
    Method("z_loss", lambda z, b: penalties.z_loss(z), plain.z_loss),
    Method("forward_correction", lambda z, b: noise.forward_correction(z, b.labels, 0.2), plain.forward_correction),
    Method(
        "forward_correction, T (K, K)",
        lambda z, b: noise.forward_correction(z, b.labels, matrix=b.table),
        plain.forward_correction_by_matrix,
    ),
    Method("backward_correction", lambda z, b: noise.backward_correction(z, b.labels, 0.2), plain.backward_correction),
    Method("label_relaxation", lambda z, b: noise.label_relaxation(z, b.labels, 0.1), plain.label_relaxation),
    Method("focal_loss", lambda z, b: jax_ls.focal_loss(z, b.labels), plain.focal),
    Method("focal_loss, smoothed", lambda z, b: jax_ls.focal_loss(z, b.labels, 2.0, b.smoothing), plain.smoothed_focal),
    Method("poly_loss", lambda z, b: jax_ls.poly_loss(z, b.labels, 2.0, b.smoothing), plain.poly_1),
    Method(
        "poly_loss, prior (K,)",
        lambda z, b: jax_ls.poly_loss(z, b.labels, 2.0, b.smoothing, prior=b.prior),
        plain.poly_1_by_prior,
    ),
    Method("bi_tempered_loss", lambda z, b: jax_ls.bi_tempered_loss(z, b.labels), plain.bi_tempered),
    Method("asymmetric_loss", lambda z, b: jax_ls.asymmetric_loss(z, b.many_labels).sum(axis=-1), plain.asymmetric),
    Method("logit_norm_loss", lambda z, b: jax_ls.logit_norm_loss(z, b.labels), plain.logit_norm),
    Method("generalized_cross_entropy", lambda z, b: noise.generalized_cross_entropy(z, b.labels), plain.generalized),
    Method("symmetric_cross_entropy", lambda z, b: noise.symmetric_cross_entropy(z, b.labels), plain.symmetric),
    Method(
        "early_learning, t (batch, K)",
        lambda z, b: noise.early_learning(z, b.labels, b.each_prior),
        plain.early_learning,
    ),
    Method("bootstrap, soft", lambda z, b: noise.bootstrap(z, b.labels, 0.95), plain.soft_bootstrap),
    Method("bootstrap, hard", lambda z, b: noise.bootstrap(z, b.labels, 0.8, kind="hard"), plain.hard_bootstrap),
    Method(
        "adaptive.confidence",
        _with_rule(lambda z, b: adaptive.confidence(z, b.labels, b.smoothing)),
        plain.by_confidence,
    ),
    Method(
        "adaptive.uncertainty",
        _with_rule(lambda z, b: adaptive.uncertainty(z, b.labels, b.smoothing)),
        plain.by_uncertainty,
    ),
    Method("adaptive.margin", _with_rule(lambda z, b: adaptive.margin(z, b.labels, b.smoothing)), plain.by_margin),
    Method("adaptive.entropy", _with_rule(lambda z, b: adaptive.entropy(z, b.smoothing)), plain.by_entropy),
    Method("adaptive.beta", _by_rank, plain.by_rank),
    Method("adaptive.focal_gamma", _by_focal_gamma, plain.focal),
    Method("smoothed_ctc_loss", _ctc, plain.ctc),
)


@dataclass(frozen=True)
class Option:
    """An option of `smoothed_cross_entropy`; `reads` names the arrays of the batch that are as large as the logits."""

    name: str
    loss: Loss
    reads: tuple[str, ...] = ()
    axis: int = -1


def _smoothed(**options: Any) -> Loss:
    """`smoothed_cross_entropy`; an option that is a string is the array of the batch of that name."""

    def loss(z: Array, b: Batch) -> Array:
        given = {name: getattr(b, x) if x in Batch._fields else x for name, x in options.items()}
        return smoothed_cross_entropy(z, b.labels, b.smoothing, **given)

    return loss


def _with_prior(prior: Callable[[Batch], jax_ls.Target], **options: Any) -> Loss:
    return lambda z, b: smoothed_cross_entropy(z, b.labels, b.smoothing, prior=prior(b), **options)


OPTIONS = (
    Option("none", _smoothed()),
    Option("where", _smoothed(where="where")),
    Option("ignore_index", _smoothed(ignore_index=-100)),
    Option("class_where (K,)", _smoothed(class_where="class_where")),
    Option("class_where (batch, K)", _smoothed(class_where="each_class_where"), ("each_class_where",)),
    Option("class_weights", _smoothed(class_weights="class_weights")),
    Option("z_loss", _smoothed(z_loss=1e-4)),
    Option("relative", _smoothed(relative=True)),
    Option('reduction="mean"', _smoothed(reduction="mean", where="where", class_weights="class_weights")),
    Option("prior (K,)", _smoothed(prior="prior")),
    Option("prior Rows", _with_prior(lambda b: Rows(b.table, b.labels)), ("table",)),
    Option("prior Dense (K,)", _with_prior(lambda b: Dense(b.prior))),
    Option("prior Dense (batch, K)", _with_prior(lambda b: Dense(b.each_prior)), ("each_prior",)),
    Option("prior Sparse", _with_prior(lambda b: Sparse(b.indices, b.weights))),
    Option("mixed labels", lambda z, b: jax_ls.cross_entropy(z, Sparse(b.indices, b.weights))),
    Option('spread="others"', _smoothed(spread="others")),
    Option('prior (K,), spread="others"', _smoothed(prior="prior", spread="others")),
    Option("axis=1", _smoothed(axis=1), axis=1),
    Option(
        "where, class_where (K,), class_weights, z_loss, prior (K,)",
        _smoothed(where="where", class_where="class_where", class_weights="class_weights", z_loss=1e-4, prior="prior"),
    ),
)


def arguments(shape: tuple[int, int], dtype: str, place: Any, axis: int = -1) -> tuple[jax.ShapeDtypeStruct, Batch]:
    """Logits in `dtype` and what belongs to them; with axis=1 the rows are laid out as (rows / 128, K, 128)."""
    (rows, classes), array = shape, functools.partial(compile_for.array, place=place)
    batch = Batch(
        labels=array((rows,), "int32"),
        smoothing=array((), "float32"),
        where=array((rows,), "bool"),
        class_where=array((classes,), "bool"),
        each_class_where=array(shape, "bool"),
        class_weights=array((classes,), "float32"),
        prior=array((classes,), "float32"),
        each_prior=array(shape, dtype),
        table=array((classes, classes), "float32"),
        indices=array((rows, 2), "int32"),
        weights=array((rows, 2), "float32"),
        averaged=array((rows,), "float32"),
        many_labels=array(shape, dtype),
    )
    if axis == 1:
        return array((rows // 128, classes, 128), dtype), batch._replace(labels=array((rows // 128, 128), "int32"))
    return array(shape, dtype), batch


@dataclass(frozen=True)
class Cost:
    """What the mean of a loss takes, compiled when it is asked for."""

    loss: Callable[..., Array]
    logits: jax.ShapeDtypeStruct
    given: tuple[Any, ...]
    mesh: Mesh | None = None

    @functools.cached_property
    def value(self) -> compile_for.Figures:
        """The figures of the value alone."""
        return self._figures(self._mean)

    @functools.cached_property
    def both(self) -> compile_for.Figures:
        """The figures of value and gradient."""
        return self._figures(jax.value_and_grad(self._mean))

    @property
    def temporaries(self) -> float:
        """Temporaries of value and gradient, in multiples of a device's logits."""
        sharding = self.logits.sharding
        shape = self.logits.shape if sharding is None else sharding.shard_shape(self.logits.shape)
        return self.both.temporaries / (math.prod(shape) * self.logits.dtype.itemsize)

    @property
    def passes(self) -> str:
        """Passes of the value, and of value and gradient."""
        return f"{self.value.passes:.2f} / {self.both.passes:.2f}"

    def _mean(self, z: Array, *given: Any) -> Array:
        return self.loss(z, *given).mean()

    def _figures(self, function: Callable[..., Any]) -> compile_for.Figures:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return compile_for.figures(function, self.logits, *self.given, unit=self.logits)


def cost_on(device: str, loss: Loss, shape: tuple[int, int], dtype: str, axis: int = -1) -> Cost:
    """The cost of a loss of logits on one device."""
    logits, batch = arguments(shape, dtype, compile_for.devices(device)[0], axis)
    return Cost(loss, logits, (batch,))


def least_passes(option: Option, dtype: str) -> tuple[float, float]:
    """The passes that no program can do without: arrays as large as the logits are read once, and again to derive."""
    item = jnp.dtype(dtype).itemsize
    beside = sum({"each_class_where": 1, "each_prior": item, "table": 4}[name] for name in option.reads) / item
    return 1 + beside, 3 + 2 * beside


# What the batch and the classes are split over, on a mesh of 2 × 4 devices.
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "batch": (("data", "model"), None),
    "classes": (None, ("data", "model")),
    "batch and classes": ("data", "model"),
}


def cost_on_mesh(
    devices: str, mode: str, layout: str, shape: tuple[int, int], dtype: str, loss: Loss = OURS["jax_ls"]
) -> Cost:
    """The cost of the mean of a loss on eight devices, figures of each.

    `mode` is "Auto", "Explicit", or "shard_map", which takes `smoothed_cross_entropy` whatever the loss.
    """
    axis_type = AxisType.Explicit if mode == "Explicit" else AxisType.Auto
    mesh = Mesh(np.array(compile_for.devices(devices)).reshape(2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    rows, classes = LAYOUTS[layout]

    def array(shape: tuple[int, ...], dtype: str, *split: Any) -> jax.ShapeDtypeStruct:
        return compile_for.array(shape, dtype, NamedSharding(mesh, P(*split)))

    logits = array(shape, dtype, rows, classes)
    batch = Batch(array(shape[:1], "int32", rows), array((), "float32"))

    def local(z: Array, b: Batch) -> Array:
        losses = smoothed_cross_entropy(z, b.labels, b.smoothing, class_axis_name=classes)
        return jax_ls.mean(losses, batch_axis_name=rows)

    if mode == "shard_map":
        loss = jax.shard_map(local, mesh=mesh, in_specs=(P(rows, classes), Batch(P(rows), P())), out_specs=P())
    return Cost(loss, logits, (batch,), mesh)


def losses_table(devices: Sequence[str], shapes: Sequence[tuple[int, int]], dtypes: Sequence[str]) -> Iterator[list]:
    """A row for each shape, dtype and loss, the header first."""
    header = ["shape", "dtype", "loss"]
    for device in devices:
        header += [f"{device} passes", "temporaries"]
        header += [] if device == "h100" else ["cycles", "÷ one-hot", "÷ integer"]
    yield header
    for shape in shapes:
        for dtype in dtypes:
            first: dict[tuple[str, str], int | None] = {}
            for name, loss in (PEERS | OURS).items():
                row = [text(shape), dtype, name]
                for device in devices:
                    found = cost_on(device, loss, shape, dtype)
                    first[device, name] = found.both.cycles
                    row += [found.passes, f"{found.temporaries:.2f}×"]
                    if found.both.cycles:
                        peers = (first[device, peer] for peer in (ONE_HOT, INTEGER) if (device, peer) in first)
                        ratios = [f"{found.both.cycles / peer:.2f}×" for peer in peers if peer]
                        row += [f"{found.both.cycles / 1e6:.2f}M", *ratios, *[""] * (2 - len(ratios))]
                yield row


def methods_table(devices: Sequence[str], shape: tuple[int, int], dtype: str) -> Iterator[list]:
    """Every loss and penalty, a row each, beside its plain formula."""
    header = ["loss"]
    for device in devices:
        header += [f"{device} passes", "plainly", "temporaries", "plainly"]
        header += [] if device == "h100" else ["cycles ÷ plainly"]
    yield header
    for method in METHODS:
        row = [method.name]
        for device in devices:
            ours, plainly = (cost_on(device, loss, shape, dtype) for loss in (method.loss, method.plain))
            row += [
                ours.passes,
                f"{plainly.both.passes:.2f}",
                f"{ours.temporaries:.2f}×",
                f"{plainly.temporaries:.2f}×",
            ]
            if ours.both.cycles and plainly.both.cycles:
                row.append(f"{ours.both.cycles / plainly.both.cycles:.2f}×")
        yield row


def options_table(devices: Sequence[str], shape: tuple[int, int], dtype: str) -> Iterator[list]:
    """`smoothed_cross_entropy` with each option, and the passes that no program can do without."""
    header = ["option", "least passes"]
    for device in devices:
        header += [f"{device} passes", "temporaries"] + ([] if device == "h100" else ["cycles ÷ none"])
    yield header
    first: dict[str, int] = {}
    for option in OPTIONS:
        row = [option.name, " / ".join(f"{passes:.2f}" for passes in least_passes(option, dtype))]
        for device in devices:
            found = cost_on(device, option.loss, shape, dtype, option.axis)
            row += [found.passes, f"{found.temporaries:.2f}×"]
            if found.both.cycles:
                row.append(f"{found.both.cycles / first.setdefault(device, found.both.cycles):.2f}×")
        yield row


def meshes_table(meshes: Sequence[str], shape: tuple[int, int], dtype: str) -> Iterator[list]:
    """The plain loss on eight devices, value and gradient; temporaries in multiples of a device's logits."""
    yield ["mesh", "split", "mode", "loss", "passes", "temporaries", "sent by each device"]
    for mesh in meshes:
        for layout in LAYOUTS:
            runs = [("Auto", ONE_HOT), ("Auto", INTEGER)] + [(mode, "jax_ls") for mode in MODES]
            for mode, name in runs:
                found = cost_on_mesh(mesh, mode, layout, shape, dtype, (PEERS | OURS)[name])
                sent = ", ".join(
                    f"{kind} {total.count} × {total.bytes / total.count / 2**10:,.1f} KiB"
                    for kind, total in found.both.collectives.items()
                )
                yield [mesh, layout, mode, name, found.passes, f"{found.temporaries:.2f}×", sent or "nothing"]


def text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def show(title: str, lines: Iterator[list[str]], markdown: bool) -> None:
    """Prints a table line by line, or as Markdown when it is whole."""
    print(f"\n{title}\n", flush=True)
    if markdown:
        header, *rows = lines
        print(table(header, rows), flush=True)
        return
    for line in lines:
        print("  ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", nargs="+", choices=DEVICES, default=DEVICES, help="what to compile for (default: all)")
    add("--shape", nargs="+", type=parse_shape, default=SHAPES, metavar="ROWSxCLASSES", help="of the logits")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="of the logits")
    add("--table", nargs="+", choices=TABLES, default=TABLES, help="what to print (default: all)")
    add("--quick", action="store_true", help="one TPU, one GPU, one shape, one dtype")
    add("--markdown", action="store_true", help="print each table when it is whole, as Markdown")
    args = parser.parse_args()
    if args.quick:
        args.device, args.shape, args.dtype = ("v5e", "h100"), args.shape[:1], args.dtype[1:2] or args.dtype
    for device in args.device:
        if (absent := compile_for.missing(device)) is not None:
            parser.error(absent)

    shape, dtype = args.shape[0], "bfloat16" if "bfloat16" in args.dtype else args.dtype[0]
    meshes = [mesh for mesh in MESHES if any(mesh.startswith(device) for device in args.device)]
    at = f"{text(shape)}, {dtype}"
    print(f"jax {jax.__version__}, optax {optax.__version__}; compiled for {', '.join(args.device)}; nothing was run")
    lines = {
        "losses": ("The loss", lambda: losses_table(args.device, args.shape, args.dtype)),
        "methods": (
            f"Every loss and penalty beside its plain formula, {at}",
            lambda: methods_table(args.device, shape, dtype),
        ),
        "options": (f"Options of smoothed_cross_entropy, {at}", lambda: options_table(args.device, shape, dtype)),
        "meshes": (f"Eight devices, {at}", lambda: meshes_table(meshes, shape, dtype)),
    }
    for name in args.table:
        title, rows = lines[name]
        show(title, rows(), args.markdown)


if __name__ == "__main__":
    main()
