"""How a mesh splits an output layer: which axes split tokens, which classes, and which the kernel as FSDP does.

Each device then works on its own tokens and classes, inside `jax.shard_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, everywhere
from jax_ls.linear._gathering import Gathering, told

__all__ = ["Layout"]

ALONE = Gathering()
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """How hidden states and kernel are split. Static.

    Args:
      mesh: the mesh to run on; None where the caller is already inside `jax.shard_map`, or on one device.
      batch: spec of (*batch,).
      kernel: spec of the kernel.
      tokens: mesh axes that split the tokens.
      classes: mesh axes that split the classes.
      gathering: mesh axes of the tokens that split the kernel too.
    """

    mesh: AbstractMesh | None = None
    batch: PartitionSpec = WHOLE
    kernel: PartitionSpec = WHOLE
    tokens: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    gathering: Gathering = ALONE

    @property
    def class_axis_name(self) -> AxisName | None:
        return (*self.classes, *self.gathering.visits) or None

    @property
    def batch_axis_name(self) -> AxisName | None:
        return self.tokens or None

    @classmethod
    def of(
        cls,
        hidden: Array,
        kernel: Array,
        transposed: bool,
        hidden_spec: PartitionSpec | None,
        kernel_spec: PartitionSpec | None,
        class_axis_name: AxisName | None,
        batch_axis_name: AxisName | None,
        wire: Any,
    ) -> Layout:
        """Returns the layout that the arrays have on an explicit mesh, or that the caller names."""
        mesh = jax.sharding.get_abstract_mesh()
        manual = frozenset(mesh.manual_axes)
        ndim, batch_ndim = 2, hidden.ndim - 1
        for name, spec, rank in (("hidden_spec", hidden_spec, hidden.ndim), ("kernel_spec", kernel_spec, ndim)):
            _check_spec(name, spec, rank, mesh)
        if both := set(_names(batch_axis_name)) & set(_names(class_axis_name)):
            raise ValueError(
                f"class_axis_name: expected a mesh axis that does not split the tokens, got {sorted(both)[0]!r}; "
                "kernel_spec says that the tokens' axes split the kernel"
            )
        if manual:
            if hidden_spec is not None:
                raise ValueError("hidden_spec: expected None inside jax.shard_map, where batch_axis_name says it")
            if kernel_spec is None:
                return cls(None, tokens=_names(batch_axis_name), classes=_names(class_axis_name))
            return cls._checked(
                None, PartitionSpec(), kernel_spec, transposed, _names(batch_axis_name), _names(class_axis_name), wire
            )
        hidden_own, kernel_own = jax.typeof(hidden).sharding, jax.typeof(kernel).sharding
        explicit = any(hidden_own.spec) or any(kernel_own.spec)
        if not explicit and hidden_spec is None and kernel_spec is None:
            return cls(None, tokens=_names(batch_axis_name), classes=_names(class_axis_name))
        if class_axis_name is not None or batch_axis_name is not None:
            raise ValueError(
                "class_axis_name, batch_axis_name: expected None outside jax.shard_map on a mesh that is read off the "
                f"arrays or given as specs, got {class_axis_name!r} and {batch_axis_name!r}"
            )
        if explicit:
            mesh = hidden_own.mesh if any(hidden_own.spec) else kernel_own.mesh
        elif mesh.empty:
            raise ValueError("hidden_spec, kernel_spec: expected a mesh in context: with jax.set_mesh(mesh)")
        spec = _padded(hidden_spec if hidden_spec is not None else hidden_own.spec, hidden.ndim)
        laid: PartitionSpec = kernel_own.spec if kernel_spec is None else kernel_spec
        if spec[-1] is not None:
            remedy = f"jax.sharding.reshard(hidden, {PartitionSpec(*spec[:-1], None)})"
            raise ValueError(f"hidden: expected D whole on every device, got {PartitionSpec(*spec)}: {remedy}")
        tokens = tuple(name for part in spec[:batch_ndim] for name in _names(part))
        return cls._checked(mesh, PartitionSpec(*spec[:batch_ndim]), laid, transposed, tokens, None, wire)

    @classmethod
    def _checked(
        cls,
        mesh: AbstractMesh | None,
        batch: PartitionSpec,
        kernel_spec: PartitionSpec,
        transposed: bool,
        tokens: tuple[str, ...],
        classes: tuple[str, ...] | None,
        wire: Any,
    ) -> Layout:
        spec = _padded(kernel_spec, 2)
        class_axis = 0 if transposed else 1
        features, rest = _names(spec[1 - class_axis]), _names(spec[class_axis])
        own = tuple(name for name in rest if name not in tokens)
        shared = tuple(name for name in rest if name in tokens)

        def remedy(new: tuple[str, ...]) -> str:
            entries = [spec[0], spec[1]]
            entries[1 - class_axis] = _entry(tuple(name for name in features if name in tokens))
            entries[class_axis] = _entry(new)
            return f"jax.sharding.reshard(kernel, {PartitionSpec(*entries)})"

        if foreign := [name for name in features if name not in tokens]:
            raise ValueError(
                f"kernel: expected D whole, or split over axes that split the tokens, {tokens}, got {foreign} in "
                f"{PartitionSpec(*spec)}: {remedy((*own, *foreign, *shared))}"
            )
        if rest != own + shared:
            raise ValueError(
                f"kernel: expected the classes split over {own} first and then over the tokens' {shared}, got "
                f"{PartitionSpec(*spec)}: {remedy(own + shared)}"
            )
        if classes is not None and classes != own:
            raise ValueError(f"class_axis_name: expected {own or None}, as kernel_spec says, got {classes or None}")
        axes = (shared, features) if transposed else (features, shared)
        return cls(mesh, batch, PartitionSpec(*spec), tokens, own, Gathering(axes, wire))

    def devices(self, names: tuple[str, ...]) -> int:
        """Returns how many devices the mesh axes `names` have."""
        if not names:
            return 1
        return jax.lax.axis_size(names) if self.mesh is None else math.prod(self.mesh.shape[name] for name in names)

    def visited(self, batch: tuple[int, ...], classes: int, class_axis: int) -> Layout:
        """Returns the layout by which tokens are sent, if they are fewer than the classes; else this one.

        `batch` and `classes` are those of the hidden states and the kernel as this call got them.
        """
        names, tokens = self.gathering.axes[class_axis], math.prod(batch)
        if not names or not batch or not isinstance(tokens, int):
            return self
        if self.mesh is None:
            tokens *= self.devices(names)
        else:
            tokens //= self.devices(tuple(name for name in self.tokens if name not in names))
            classes //= self.devices(self.classes)
        return replace(self, gathering=self.gathering.visited(class_axis)) if tokens < classes else self

    def check_sizes(self, batch: tuple[int, ...], kernel: Array, class_axis: int) -> None:
        """Every axis is a multiple of the devices that split it."""
        if self.mesh is None:
            return
        for size, part in zip(batch, self.batch, strict=True):
            if size % (count := self.devices(_names(part))):
                raise ValueError(f"hidden: expected a batch axis that {part} divides, {count} devices, got {size}")
        for axis, part in enumerate(self.kernel):
            if (size := kernel.shape[axis]) % (count := self.devices(_names(part))):
                what = "K" if axis == class_axis else "D"
                more = -(-size // count) * count
                pad = f": pad the kernel to {more} classes and say class_where=jnp.arange({more}) < {size}"
                raise ValueError(
                    f"kernel: expected {what} that {part} divides, {count} devices, got {size}"
                    + (pad if what == "K" else "")
                )

    def local(self, run: Callable[..., Any], operands: dict[str, Any], out_specs: Any) -> Any:
        """Returns run(operands), each device on its own part of them."""
        if self.mesh is None:
            # Neither hidden nor kernel is split by an explicit mesh, so nothing is.
            return run(jax.tree.map(everywhere, operands))
        leaves, tree = jax.tree.flatten(operands)
        specs = self.specs(operands)
        placed = [_placed(x, NamedSharding(self.mesh, spec)) for x, spec in zip(leaves, specs, strict=True)]
        return jax.shard_map(
            lambda *leaves: run(jax.tree.unflatten(tree, leaves)),
            mesh=self.mesh,
            in_specs=tuple(specs),
            out_specs=out_specs,
        )(*placed)

    def specs(self, operands: dict[str, Any]) -> list[PartitionSpec]:
        """Returns how each leaf of the operands lies."""
        by_class, by_token = PartitionSpec(self.classes or None), self.batch
        kinds = {
            "hidden": PartitionSpec(*self.batch, None),
            "kernel": self.kernel,
            **dict.fromkeys(("bias", "class_where", "class_weights"), by_class),
            **dict.fromkeys(("weights", "where"), by_token),
            **dict.fromkeys(("z_loss", "denominator"), PartitionSpec()),
        }
        found: list[PartitionSpec] = []
        for name in sorted(operands):
            if name in kinds:
                found += [kinds[name]] * len(jax.tree.leaves(operands[name]))
            else:
                found += self._specs_of(operands[name])
        return found

    def _specs_of(self, tree: Any) -> list[PartitionSpec]:
        """Targets: batch axes first where a leaf has one entry per token, classes last where it has one per class."""
        found: list[PartitionSpec] = []
        for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Target)):
            for x, by_token, by_class in told(node):
                batch = tuple(self.batch) if by_token else ()
                rest = [None] * (x.ndim - len(batch))
                if by_class and rest:
                    rest[-1] = _entry(self.classes)
                found.append(PartitionSpec(*batch, *rest))
        return found


def _placed(x: Array, sharding: NamedSharding) -> Array:
    """`x` as it must lie: on an explicit mesh by resharding, else by what `jax.shard_map` makes of it."""
    explicit = any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
    own = jax.typeof(x).sharding
    return jax.sharding.reshard(x, sharding) if explicit and own.spec != sharding.spec else x


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _entry(names: tuple[str, ...]) -> Any:
    return None if not names else names[0] if len(names) == 1 else names


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (ndim - len(spec)))


def _check_spec(name: str, spec: Any, ndim: int, mesh: AbstractMesh) -> None:
    if spec is None:
        return
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name}: expected a jax.sharding.PartitionSpec, got {spec!r}")
    if len(spec) > ndim:
        raise ValueError(f"{name}: expected a spec of at most {ndim} axes, got {spec}")
    if unknown := [x for part in spec for x in _names(part) if not mesh.empty and x not in mesh.axis_names]:
        raise ValueError(f"{name}: expected axes of the mesh, {tuple(mesh.axis_names)}, got {unknown[0]!r} in {spec}")
