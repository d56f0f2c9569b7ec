"""Which plan an output layer is computed by, and how large its chunks or blocks are."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ls import checks

__all__ = ["Plan", "block_sizes", "chosen", "chunk_count", "symbolic_chunk_size"]

Plan = Literal["auto", "tokens", "classes"]

MANY_CLASSES = {"narrow": 2, "wide": 32}
"""Class blocks from so many times more classes than tokens on, by the dtype of the kernel."""


def chosen(
    plan: Plan,
    tokens: int,
    classes: int,
    kernel: DTypeLike,
    accumulate: DTypeLike,
    *,
    written_out: bool,
    visited: bool = False,
) -> str:
    """Returns "tokens" or "classes".

    Of D features, token chunks hold about D·K numbers for the kernel's gradient where its dtype is narrower than
    `accumulate`, and half as many for the logits of a chunk. Class blocks hold D·N for the gradient of `hidden` and
    half as many for the logits of a block, and take a fourth product. So they are chosen for a target that is not
    written out for each token and K ≥ 2 N if the kernel is narrow; else, since chunks then hold their logits alone,
    K ≥ 32 N. Not where token chunks gather the tokens, `visited`, and so hold a part of the kernel's gradient alone.
    """
    checks.check_option("plan", plan, ("auto", "tokens", "classes"))
    if plan != "auto":
        return plan
    if not isinstance(tokens, int):
        # A symbolic number, of `jax.export`.
        return "tokens"
    narrow = jnp.dtype(kernel).itemsize < jnp.dtype(accumulate).itemsize
    many = classes >= MANY_CLASSES["narrow" if narrow else "wide"] * tokens
    return "classes" if many and not written_out and not visited else "tokens"


def chunk_count(tokens: int, features: int, classes: int, chunk_size: int | None, visitors: int = 1) -> int:
    """Returns into how many chunks the tokens of a device are cut.

    By default the logits of a chunk are as many as the numbers of `hidden`, or half those of the kernel if that is
    more. Smaller chunks would save little memory and spend their time on adding to the kernel's gradient. Of a symbolic
    number of tokens, chunks of half the kernel's numbers are as many as it takes.

    Args:
      tokens, classes: how many a device holds.
      features: D.
      chunk_size: how many tokens' logits a device holds.
      visitors: how many devices see each other's tokens: a chunk has as many of each.
    """
    if not isinstance(tokens, int):
        return -(-tokens // symbolic_chunk_size(features, chunk_size))
    if chunk_size is None:
        chunk_size = max(tokens * features // classes, features // 2, 1)
    of_each = max(checks.check_size("chunk_size", chunk_size) // visitors, 1)
    fewest = max(1, -(-tokens // of_each))
    # A divisor nearby leaves no ragged chunk to pad.
    return next((count for count in range(fewest, 2 * fewest) if tokens % count == 0), fewest)


def symbolic_chunk_size(features: int, chunk_size: int | None) -> int:
    """Returns the tokens of a chunk where their number is symbolic."""
    return max(features // 2, 1) if chunk_size is None else checks.check_size("chunk_size", chunk_size)


def block_sizes(features: int, classes: int, parts: int, size: int | None) -> tuple[int, int]:
    """Returns the classes of a block in each of `parts` parts of `classes` classes: elsewhere, and on TPU.

    By default D/2, so that the float32 logits of a block are half as many as the numbers of `hidden`, but 512 at
    least: a CPU takes twice as long over 128. About D, 4096 at least, on TPU, whose compiler expects fewer cycles then.
    """
    if size is not None:
        if checks.check_size("block_size", size) > parts * classes:
            raise ValueError(f"block_size: expected at most the {parts * classes} classes of a device, got {size}")
        within = -(-size // parts)
        return within, within
    elsewhere = max(512, features // 2 // 128 * 128)
    fewest = max(4096, features // 128 * 128)
    # Of sizes up to a quarter more, the one with the fewest classes in two blocks.
    within = {-(-total // parts) for total in range(fewest, fewest * 5 // 4 + 1, 128)}
    on_tpu = min(within, key=lambda x: (-(-classes // x) * x, -x))
    return min(-(-elsewhere // parts), classes), min(on_tpu, classes)
