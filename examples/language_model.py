"""Trains a small Transformer on Python's standard library, its 32,000-word loss smoothed and never written out.

    pip install -e ".[examples]"
    python examples/language_model.py --small

takes a minute and a half on two CPU cores. Perplexity on held-out files, always of the plain likelihood, falls from
306, that of the words' frequencies, to 109 with smoothing and 100 without (measured). Both networks start from the
same weights and see the same batches; in so short a run smoothing costs likelihood.

    python examples/language_model.py --small --prior unigram --out runs/lm
    python examples/language_model.py --small --prior unigram --out runs/lm --resume --mesh 2,2,2

continues an interrupted run where it was last saved, on other devices if need be. To see it on one CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8. `--help` lists every flag.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # Ctrl-C ends in one line, during the imports too. What was saved can be resumed.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nlanguage_model.py: interrupted\n"), os._exit(130)))

import argparse
import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import stdlib_text
from checkpoints import InputError, Rows, RunDirectory, replacing
from flax import nnx
from matplotlib.figure import Figure
from stdlib_text import Text, TextError
from tqdm import tqdm
from transformer import Devices, Shape, Transformer

SMALL = {"width": 128, "layers": 2, "heads": 4, "rate": 5e-3, "steps": 80, "batch_size": 16, "seq_len": 64}
LARGE = {"width": 512, "layers": 6, "heads": 8, "rate": 1e-3, "steps": 4000, "batch_size": 64, "seq_len": 256}

# Enough that perplexities of two models differ by more than chance, few enough for two cores.
HELD_OUT_TOKENS = {True: 16_384, False: 262_144}


class Trainer:
    """The network's plan and its compiled steps. ε is an argument of a step: all networks share one program."""

    def __init__(self, args: Namespace, text: Text, devices: Devices):
        self.args, self.text, self.devices = args, text, devices
        vocabulary = len(text.counts)
        shape = Shape(vocabulary, args.width, args.layers, args.heads, args.seq_len)
        model = Transformer(shape, text.unigram(), nnx.Rngs(args.seed))
        schedule = optax.warmup_cosine_decay_schedule(args.rate / 10, args.rate, args.steps // 10, args.steps)
        rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
        self.plan, state = nnx.split((model, nnx.Optimizer(model, rule, wrt=nnx.Param)))
        self.first_state = jax.tree.map(np.asarray, state)
        self.shardings = devices.of_state(state, vocabulary)

        words = {"class_where": text.exists(), "prior": text.unigram()}
        words = jax.device_put(words, devices.of_state(words, vocabulary))
        self.exists = {"class_where": words["class_where"]}
        self.words = words if args.prior == "unigram" else self.exists
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, devices.replicated))
        self.nll = jax.jit(self._nll, out_shardings=devices.replicated)

    def _step(self, state: nnx.State, inputs: jax.Array, targets: jax.Array, smoothing: jax.Array, words: Any) -> Any:
        """One update: the new state and the loss before it."""
        model, optimizer = nnx.merge(self.plan, state)

        def loss_fn(model):
            return self.devices.loss(model(inputs), model, targets, smoothing=smoothing, relative=True, **words)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def _nll(self, state: nnx.State, inputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Mean loss of one batch without smoothing."""
        model, _ = nnx.merge(self.plan, state)
        return self.devices.loss(model(inputs), model, targets, weights=weights, **self.exists)

    def train(self, state: nnx.State, smoothing: float, step: int) -> tuple[nnx.State, float]:
        """Shows the batch of this step, the same one whatever the devices."""
        batch = self.text.batch(self.args.seed, step, self.args.batch_size, self.args.seq_len)
        batch = jax.device_put(batch, self.devices.tokens)
        state, loss = self.step(state, *batch, np.float32(smoothing), self.words)
        # Waiting here keeps forced host devices from running ahead of one another.
        return state, float(loss)

    def held_out_nll(self, state: nnx.State) -> float:
        """Mean over the held-out windows, each token counted once."""
        size, length = self.args.batch_size, self.args.seq_len
        windows, total = held_out(self.args, self.text), 0.0
        for start in range(0, len(windows), size):
            rows = windows[start : start + size]
            # A short batch is filled up with copies of weight 0.
            weights = np.broadcast_to((np.arange(size) < len(rows))[:, None], (size, length)).astype(np.float32)
            padded = np.resize(rows, (size, length + 1))
            batch = jax.device_put((padded[:, :-1], padded[:, 1:], weights), self.devices.tokens)
            total += len(rows) * float(self.nll(state, *batch))
        return total / len(windows)


def held_out(args: Namespace, text: Text) -> np.ndarray:
    return text.held_out_windows(HELD_OUT_TOKENS[args.small], args.seq_len)


def fit(args: Namespace, trainer: Trainer, run: RunDirectory) -> Rows:
    """Trains the steps that are left; returns the metrics of all."""
    smoothed = {f"smoothing {args.smoothing:g}, {args.prior}": args.smoothing} if args.smoothing else {}
    strengths = smoothed | {"no smoothing": 0.0}
    # The same first weights for both.
    states = {name: jax.device_put(trainer.first_state, trainer.shardings) for name in strengths}
    saved, done, rows = run.restore(states) if args.resume else (states, 0, [])
    states = {name: saved[name] for name in strengths}

    tokens = args.batch_size * args.seq_len * len(states)
    silent = not (sys.stderr.isatty() and sys.stdout.isatty())
    with tqdm(total=args.steps * tokens, initial=done * tokens, disable=silent, unit="tok", unit_scale=True) as bar:
        losses, since = [], time.perf_counter()
        for step in range(done, args.steps):
            losses.append([])
            for name, smoothing in strengths.items():
                states[name], loss = trainer.train(states[name], smoothing, step)
                losses[-1].append(loss)
            if not np.isfinite(losses[-1]).all():
                raise InputError(f"the loss is no longer finite in step {step + 1}: choose another --smoothing")
            bar.set_postfix_str(" | ".join(f"loss {loss:.3f}" for loss in losses[-1]), refresh=False)
            bar.update(tokens)
            if (step + 1) % args.every and step + 1 < args.steps:
                continue
            told = f"step {step + 1:>4}, {len(losses) * tokens / (time.perf_counter() - since):,.0f} tokens/s: "
            for name, loss in zip(states, np.mean(losses, axis=0).tolist(), strict=True):
                nll = trainer.held_out_nll(states[name])
                row = {"run": name, "step": step + 1, "train_loss": loss, "nll": nll, "perplexity": math.exp(nll)}
                rows.append(row)
            scores = ", ".join(f"{row['perplexity']:.1f} ({row['run']})" for row in rows[-len(states) :])
            tqdm.write(f"{told}held-out perplexity {scores}", file=sys.stdout)
            sys.stdout.flush()
            run.save(step + 1, states, rows)
            losses, since = [], time.perf_counter()
    return rows


def report(rows: Rows, targets: np.ndarray, unigram: np.ndarray, out: Path | None) -> None:
    """Prints the last scores beside those of a model that only counts words; draws the curves of every step."""
    counted = -float(np.log(unigram[targets]).mean())
    print(f"{f'{targets.size:,} held-out tokens':<24}{'training loss':>15}{'NLL':>10}{'perplexity':>13}")
    print(f"{'frequencies alone':<24}{'':>15}{counted:>10.4f}{math.exp(counted):>13.2f}")
    for row in (row for row in rows if row["step"] == rows[-1]["step"]):
        print(f"{row['run']:<24}{row['train_loss']:>15.4f}{row['nll']:>10.4f}{row['perplexity']:>13.2f}")
    print("the training loss is smoothed, less the entropy of its targets; NLL and perplexity are without smoothing")
    if out is None:
        return
    figure = Figure(figsize=(9.6, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    right.axhline(math.exp(counted), color="0.4", ls=":", label="frequencies of the words alone")
    for name, style in zip(dict.fromkeys(row["run"] for row in rows), ("o-", "s--"), strict=False):
        steps, losses, scores = zip(
            *((row["step"], row["train_loss"], row["perplexity"]) for row in rows if row["run"] == name), strict=True
        )
        left.plot(steps, losses, style)
        right.plot(steps, scores, style, label=name)
    top = 1.1 * max(row["train_loss"] for row in rows)
    left.set(xlabel="step", ylabel="training loss above the entropy of its targets", xlim=(0, None), ylim=(0, top))
    right.set(xlabel="step", ylabel="perplexity on held-out files (logarithmic)", yscale="log", xlim=(0, None))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both")
    right.legend(loc="center right")
    with replacing(out / "curves.png") as part:
        figure.savefig(part, format="png")
    print(f"\nwrote {out}: metrics.jsonl, curves.png, checkpoints")


def train(args: Namespace) -> None:
    """From flags to the table."""
    count = jax.device_count()
    shape = data, fsdp, model = args.mesh or (count, 1, 1)
    if math.prod(shape) != count:
        raise InputError(f"--mesh {data},{fsdp},{model} takes {math.prod(shape)} devices, but there are {count}")
    if args.batch_size % (data * fsdp):
        raise InputError(f"--batch-size {args.batch_size} does not divide among {data * fsdp} devices: see --mesh")
    if args.width % fsdp:
        raise InputError(f"the width of {args.width} does not divide by {fsdp}: see --mesh")
    text = stdlib_text.load(args.max_files, args.seq_len)
    if len(text.counts) % model:
        raise InputError(f"the vocabulary of {len(text.counts):,} entries does not divide by {model}: see --mesh")
    print(f"text: {text.files} source files, {len(text.train):,} tokens to train on, {len(text.held_out):,} held out")
    print(f"vocabulary: {text.words:,} words, padded to {len(text.counts):,}")
    print(f"devices: {data} x {fsdp} x {model} {jax.devices()[0].device_kind}", flush=True)

    # What must not change when a run is resumed. The mesh may.
    names = ("small", "smoothing", "prior", "steps", "every", "batch_size", "seq_len", "seed")
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    settings["text of checksum"] = f"{text.fingerprint():08x}"
    start = time.perf_counter()
    devices = Devices(shape)
    with RunDirectory(args.out, settings, args.resume) as run, jax.set_mesh(devices.mesh):
        rows = fit(args, Trainer(args, text, devices), run)
        print(f"time: {time.perf_counter() - start:.0f} s\n")
        report(rows, held_out(args, text)[:, 1:], text.unigram(), args.out)


def count(text: str) -> int:
    if not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1 and at most 1,000,000, got {text}")
    return int(text)


def mesh(text: str) -> tuple[int, int, int]:
    data, fsdp, model = map(count, text.split(","))
    return data, fsdp, model


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, Namespace]:
    """The parser, to report later errors with, and the flags it read."""
    # argparse puts a usage text before an error; without one the error stands alone.
    parser = argparse.ArgumentParser("language_model.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--small", action="store_true", help="a network and a run that suit two CPU cores")
    smoothing = "the share of each target that leaves its word (default 0.1); 0 trains one network, else its twin too"
    add("--smoothing", type=float, default=0.1, metavar="EPS", help=smoothing)
    prior = "where that share goes: to all words, or to each by its frequency (default uniform)"
    add("--prior", choices=("uniform", "unigram"), default="uniform", help=prior)
    split = "split batches DATA x FSDP ways, parameters FSDP ways, words MODEL ways (default: all devices on DATA)"
    add("--mesh", type=mesh, metavar="DATA,FSDP,MODEL", help=split)
    for flag, what in (("steps", "updates"), ("batch_size", "windows in a batch"), ("seq_len", "tokens in a window")):
        default = f"{what} (default {LARGE[flag]}, {SMALL[flag]} if --small)"
        add(f"--{flag.replace('_', '-')}", type=count, metavar="N", help=default)
    add("--every", type=count, metavar="N", help="measure, and save to --out, after so many steps (default a quarter)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the batches (default 0)")
    add("--max-files", type=count, metavar="N", help="read only so many source files, to try things out")
    add("--out", metavar="DIR", help="write metrics, a picture and checkpoints here")
    add("--resume", action="store_true", help="continue the run in --out, on a mesh of any shape")
    args = parser.parse_args(argv)
    if not (-1 <= args.smoothing < 1 and 0 <= args.seed < 2**31):
        parser.error("expected --smoothing in [-1, 1) and --seed in [0, 2^31)")
    if args.out == "" or (args.resume and args.out is None):
        parser.error("--resume needs --out, the directory of the run to continue")
    for name, value in (SMALL if args.small else LARGE).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.out, args.every = args.out and Path(args.out), args.every or max(1, args.steps // 4)
    return parser, args


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser, args = parse(argv)
    try:
        train(args)
    except (InputError, TextError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
