"""(hidden, kernel, q) -> loss, without ever holding the logits. How: see `_token_chunks.py`."""

from jax_ls.linear.any_loss import chunked_loss
from jax_ls.linear.output_layer import linear_cross_entropy

__all__ = ["chunked_loss", "linear_cross_entropy"]
