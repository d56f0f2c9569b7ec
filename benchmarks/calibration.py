"""Time and memory of calibration against one pass of softmax and against torchmetrics, on the same arrays.

    python benchmarks/calibration.py                          # a million examples of 100 classes; needs 3 GB
    python benchmarks/calibration.py --shape 100000x100 --repeat 20

Every ratio is within one run. `temporaries` is what the compiled program allocates beside its arguments and results, in
multiples of the logits. Torchmetrics joins in if it is installed, with and without its checks of the arguments; it
has no temperature, and torch's own optimiser, L-BFGS, stands beside ours.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from measure import interleaved_times, machine, table, temporary_bytes

from jax_ls import calibration

OURS: dict[str, Callable[..., Any]] = {
    "softmax": lambda z, y: jax.nn.softmax(z, axis=-1),
    "ECE": calibration.expected_calibration_error,
    "ECE, equal mass": functools.partial(calibration.expected_calibration_error, binning="mass"),
    "reliability": calibration.reliability,
    "temperature": calibration.fit_temperature,
    "NLL": calibration.negative_log_likelihood,
    "Brier score": calibration.brier_score,
    "AURC": calibration.area_under_risk_coverage,
    "class-wise ECE": calibration.classwise_calibration_error,
}


def peers(z: jax.Array, y: jax.Array) -> dict[str, Callable[[], Any]]:
    """What torch and torchmetrics take for the same, if they are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torchmetrics")):
        return {}
    torch: Any = importlib.import_module("torch")
    theirs: Any = importlib.import_module("torchmetrics.functional.classification")
    logits, labels = torch.from_numpy(np.array(z)), torch.from_numpy(np.array(y, np.int64))
    error = functools.partial(theirs.multiclass_calibration_error, logits, labels, num_classes=z.shape[1], n_bins=15)

    def lbfgs() -> Any:
        log_t = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Any:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(logits * torch.exp(-log_t), labels)
            value.backward()
            return value

        optimizer.step(loss)
        return log_t.exp().item()

    return {
        "torchmetrics ECE": lambda: error().item(),
        "torchmetrics ECE, unchecked": lambda: error(validate_args=False).item(),
        "torch temperature": lbfgs,
    }


def parse_shape(text: str) -> tuple[int, int]:
    try:
        examples, classes = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected EXAMPLESxCLASSES, got {text!r}") from None
    if examples < 1 or classes < 2:
        raise argparse.ArgumentTypeError(f"expected an example and two classes or more, got {text!r}")
    return examples, classes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", type=parse_shape, default=(1_000_000, 100), metavar="EXAMPLESxCLASSES")
    parser.add_argument("--repeat", type=int, default=5, help="how often each function is timed; the median counts")
    parser.add_argument("--true-temperature", type=float, default=1.7, help="of the labels' distribution")
    args = parser.parse_args()

    key_z, key_y = jax.random.split(jax.random.key(0))
    z = 3 * jax.random.normal(key_z, args.shape)
    y = jax.random.categorical(key_y, z / args.true_temperature)
    compiled = {name: jax.jit(function).lower(z, y).compile() for name, function in OURS.items()}
    functions: dict[str, Callable[[], Any]] = {
        name: functools.partial(program, z, y) for name, program in compiled.items()
    }
    theirs = peers(z, y)
    seconds = interleaved_times(functions | theirs, args.repeat)

    rows = []
    for name, function in (functions | theirs).items():
        value = np.asarray(function()) if name not in ("softmax", "reliability") else None
        temporaries = f"{temporary_bytes(compiled[name]) / z.nbytes:.2f}×" if name in compiled else ""
        peer = seconds.get("torch temperature" if name == "temperature" else "torchmetrics ECE")
        ratio = f"{seconds[name] / peer:.2f}×" if peer and name in ("ECE", "reliability", "temperature") else ""
        cells = [f"{1e3 * seconds[name]:.0f}", f"{seconds[name] / seconds['softmax']:.2f}×", ratio, temporaries]
        rows.append([name, *cells, "" if value is None else f"{value:.5f}"])
    print(f"{machine()}; {args.shape[0]:,} examples of {args.shape[1]} classes, float32\n")
    print(table(["", "ms", "of softmax", "of torch", "temporaries", "value"], rows))


if __name__ == "__main__":
    main()
