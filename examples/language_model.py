"""Trains a small Transformer on Python's standard library, its 32,000-word loss smoothed and never written out.

    pip install -e ".[examples]"
    python examples/language_model.py --small

takes a minute and a half on two CPU cores. Perplexity on held-out files, always of the plain likelihood, falls from
306, that of the words' frequencies, to 109 with smoothing and 100 without (measured). Both networks start from the
same weights and see the same batches; in so short a run smoothing costs likelihood.

    python examples/language_model.py --small --prior unigram --out runs/lm
    python examples/language_model.py --small --prior unigram --out runs/lm --resume --mesh 4,2

continues an interrupted run where it was last saved, on other devices if need be. To see it on one CPU, set
XLA_FLAGS=--xla_force_host_platform_device_count=8. `--help` lists every flag.
"""

import argparse
import contextlib
import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import stdlib_text
from flags import COUNT, SEED, SMOOTHING, InputError, OneLineParser
from flax import nnx
from runs import Rows, RunDirectory
from stdlib_text import Text
from tqdm import tqdm
from transformer import Devices, Shape, Transformer

DESCRIPTION = "Train a small Transformer on the source of Python's standard library with a smoothed loss."
EXAMPLES = """\
examples:
  python examples/language_model.py --small           two CPU cores are enough
  python examples/language_model.py --small --prior unigram --out runs/lm
                                                      smoothed towards the frequencies of the words
  python examples/language_model.py --small --prior unigram --out runs/lm --resume --mesh 4,2
                                                      that run continued on eight devices: 4 parts of each batch,
                                                      2 of the vocabulary
"""

SMALL = {"width": 128, "layers": 2, "heads": 4, "rate": 5e-3, "steps": 80, "batch_size": 16, "seq_len": 64}
LARGE = {"width": 512, "layers": 6, "heads": 8, "rate": 1e-3, "steps": 4000, "batch_size": 64, "seq_len": 256}

# Enough that perplexities of two models differ by more than chance, few enough for two cores.
HELD_OUT_TOKENS = {True: 16_384, False: 262_144}


@dataclass
class Learner:
    """One network in training, the moments of its optimizer included."""

    name: str
    smoothing: float
    state: nnx.State


class Trainer:
    """What all learners share: the network's plan, the devices, the compiled steps."""

    def __init__(self, args: Namespace, text: Text, devices: Devices):
        self.devices = devices
        self.text = text
        self.args = args
        vocabulary = len(text.counts)
        model = Transformer(
            Shape(vocabulary, args.width, args.layers, args.heads, args.seq_len), text.unigram(), nnx.Rngs(args.seed)
        )
        schedule = optax.warmup_cosine_decay_schedule(args.rate / 10, args.rate, args.steps // 10, args.steps)
        rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
        optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
        self.plan, state = nnx.split((model, optimizer))
        self.shardings = devices.of_state(state, vocabulary)
        self.first_state = jax.tree.map(np.asarray, state)

        by_word = {"class_where": text.exists()}
        prior = {"prior": text.unigram()} if args.prior == "unigram" else {}
        self.exists, self.words = self.by_word(by_word), self.by_word(by_word | prior)
        out = (self.shardings, devices.replicated)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=out)
        self.nll = jax.jit(self._nll, out_shardings=devices.replicated)

    def by_word(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return jax.device_put(arrays, self.devices.of_state(arrays, len(self.text.counts)))

    def learner(self, name: str, smoothing: float) -> Learner:
        """A network of the same first weights for every name."""
        return Learner(name, smoothing, jax.device_put(self.first_state, self.shardings))

    def _step(self, state: nnx.State, inputs: jax.Array, targets: jax.Array, smoothing: jax.Array, words: Any) -> Any:
        """One update: the new state and the loss before it. ε is traced: learners share one program."""
        model, optimizer = nnx.merge(self.plan, state)

        def loss_fn(model):
            return self.devices.loss(model(inputs), model, targets, words, smoothing)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def _nll(self, state: nnx.State, inputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Mean loss without smoothing of one batch."""
        model, _ = nnx.merge(self.plan, state)
        return self.devices.loss(model(inputs), model, targets, self.exists, weights=weights)

    def train(self, learner: Learner, step: int) -> float:
        """Shows the batch of this step, the same one whatever the devices."""
        batch = self.text.batch(self.args.seed, step, self.args.batch_size, self.args.seq_len)
        inputs, targets = jax.device_put(batch, self.devices.tokens)
        learner.state, loss = self.step(learner.state, inputs, targets, np.float32(learner.smoothing), self.words)
        # Waiting here keeps forced host devices from running ahead of one another.
        return float(loss)

    def held_out_nll(self, learner: Learner) -> float:
        """Mean over the held-out windows, each token counted once."""
        size, length = self.args.batch_size, self.args.seq_len
        windows = self.text.held_out_windows(HELD_OUT_TOKENS[self.args.small], length)
        total = 0.0
        for start in range(0, len(windows), size):
            rows = windows[start : start + size]
            # A short batch is filled up with copies of weight 0.
            weights = np.broadcast_to((np.arange(size) < len(rows))[:, None], (size, length)).astype(np.float32)
            padded = np.resize(rows, (size, length + 1))
            batch = jax.device_put((padded[:, :-1], padded[:, 1:], weights), self.devices.tokens)
            total += len(rows) * float(self.nll(learner.state, *batch))
        return total / len(windows)


def fit(args: Namespace, trainer: Trainer, learners: list[Learner], run: RunDirectory | None) -> Rows:
    """Trains the steps that are left; returns the metrics of all."""
    done, rows = 0, []
    if run is not None and args.resume:
        states, done, rows = run.restore([learner.state for learner in learners])
        for learner, state in zip(learners, states, strict=True):
            learner.state = state

    tokens = args.batch_size * args.seq_len * len(learners)
    silent = not (sys.stderr.isatty() and sys.stdout.isatty())
    with tqdm(total=args.steps * tokens, initial=done * tokens, disable=silent, unit="tok", unit_scale=True) as bar:
        losses, seconds = [], 0.0
        for step in range(done, args.steps):
            start = time.perf_counter()
            losses.append([trainer.train(learner, step) for learner in learners])
            seconds += time.perf_counter() - start
            if not np.isfinite(losses[-1]).all():
                raise InputError(f"the loss is no longer finite in step {step + 1}: choose another --smoothing")
            bar.set_postfix_str(" | ".join(f"loss {loss:.3f}" for loss in losses[-1]), refresh=False)
            bar.update(tokens)
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                rate = len(losses) * tokens / seconds
                rows += measure(trainer, learners, step + 1, np.mean(losses, axis=0).tolist(), rate)
                losses, seconds = [], 0.0
                if run is not None:
                    run.save(step + 1, [learner.state for learner in learners], rows)
    return rows


def measure(trainer: Trainer, learners: list[Learner], step: int, losses: list[float], rate: float) -> Rows:
    """A row for each learner; `losses` and `rate`, in tokens a second, are means over the steps since the last."""
    rows = []
    for learner, loss in zip(learners, losses, strict=True):
        nll = trainer.held_out_nll(learner)
        rows.append({"run": learner.name, "step": step, "train_loss": loss, "nll": nll, "perplexity": math.exp(nll)})
    told = ", ".join(f"{row['perplexity']:.1f} ({row['run']})" for row in rows)
    tqdm.write(f"step {step:>4}, {rate:,.0f} tokens/s: held-out perplexity {told}", file=sys.stdout)
    sys.stdout.flush()
    return rows


def table(rows: Rows, tokens: int, first: float) -> str:
    """`rows` are the last of each learner, `first` the likelihood of a model that only counts words."""
    head = f"{tokens:,} held-out tokens"
    lines = [f"{head:<24}{'training loss':>15}{'NLL':>10}{'perplexity':>13}"]
    lines.append(f"{'frequencies alone':<24}{'':>15}{first:>10.4f}{math.exp(first):>13.2f}")
    lines += [
        f"{row['run']:<24}{row['train_loss']:>15.4f}{row['nll']:>10.4f}{row['perplexity']:>13.2f}" for row in rows
    ]
    lines.append("the training loss is the smoothed one; NLL and perplexity are without smoothing")
    return "\n".join(lines)


def build_devices(args: Namespace) -> Devices:
    """The mesh that --mesh asks for; by default all devices split the batch."""
    count = jax.device_count()
    data, model = args.mesh or (count, 1)
    if data * model != count:
        raise InputError(f"--mesh {data},{model} takes {data * model} devices, but there are {count}")
    if args.batch_size % data:
        raise InputError(f"--batch-size {args.batch_size} does not divide among {data} devices: see --mesh")
    return Devices((data, model))


def settings(args: Namespace, text: Text) -> dict[str, Any]:
    """What must not change when a run is resumed. The mesh may."""
    names = ("small", "smoothing", "prior", "steps", "every", "batch_size", "seq_len", "seed")
    fixed = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return fixed | {"text of checksum": f"{text.fingerprint():08x}"}


def train(args: Namespace) -> None:
    """From flags to the table."""
    devices = build_devices(args)
    text = stdlib_text.load(args.max_files, args.seq_len)
    parts = devices.shape[1]
    if len(text.counts) % parts:
        raise InputError(f"the vocabulary of {len(text.counts):,} entries does not divide by {parts}: see --mesh")
    print(f"text: {text.files} source files, {len(text.train):,} tokens to train on, {len(text.held_out):,} held out")
    print(f"vocabulary: {text.words:,} words, padded to {len(text.counts):,}")
    print(f"devices: {devices.shape[0]} x {devices.shape[1]} {jax.devices()[0].device_kind}", flush=True)

    with contextlib.ExitStack() as stack:
        run = None
        if args.out is not None:
            run = RunDirectory(args.out, settings(args, text), None, args.resume)
            stack.callback(run.close)
        start = time.perf_counter()
        trainer = Trainer(args, text, devices)
        smoothed = {f"smoothing {args.smoothing:g}, {args.prior}": args.smoothing} if args.smoothing else {}
        learners = [trainer.learner(*each) for each in (smoothed | {"no smoothing": 0.0}).items()]
        rows = fit(args, trainer, learners, run)
        print(f"time: {time.perf_counter() - start:.0f} s\n")

    windows = text.held_out_windows(HELD_OUT_TOKENS[args.small], args.seq_len)
    first = -float(np.log(text.unigram()[windows[:, 1:]]).mean())
    print(table(rows[-len(learners) :], windows[:, 1:].size, first))
    if args.out is not None:
        print(f"\nwrote {args.out}: metrics.jsonl, checkpoints")


def mesh(text: str) -> tuple[int, int]:
    """An argparse type: data,model."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected two whole numbers of at least 1 as data,model, got {text!r}")
    return int(parts[0]), int(parts[1])


def parse(argv: Sequence[str] | None) -> tuple[OneLineParser, Namespace]:
    """The parser, to report later errors with, and the flags it read."""
    parser = OneLineParser(
        prog="language_model.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--small", action="store_true", help="a network and a run that suit two CPU cores")
    smoothing = "the share of each target that leaves its word (default 0.1); 0 trains one network, else its twin too"
    add("--smoothing", type=SMOOTHING, default=0.1, metavar="EPS", help=smoothing)
    prior = "where that share goes: to all words, or to each by its frequency (default uniform)"
    add("--prior", choices=("uniform", "unigram"), default="uniform", help=prior)
    split = "split each batch DATA ways and the vocabulary MODEL ways (default: all devices on DATA)"
    add("--mesh", type=mesh, metavar="DATA,MODEL", help=split)
    for flag, what in (("steps", "updates"), ("batch_size", "windows in a batch"), ("seq_len", "tokens in a window")):
        default = f"{what} (default {LARGE[flag]}, {SMALL[flag]} if --small)"
        add(f"--{flag.replace('_', '-')}", type=COUNT, metavar="N", help=default)
    every = "measure, and save to --out, after so many steps (default a quarter of --steps)"
    add("--every", type=COUNT, metavar="N", help=every)
    add("--seed", type=SEED, default=0, metavar="N", help="of the weights and the batches (default 0)")
    add("--max-files", type=COUNT, metavar="N", help="read only so many source files, to try things out")
    add("--out", type=Path, metavar="DIR", help="write metrics.jsonl and checkpoints here")
    add("--resume", action="store_true", help="continue the run in --out, on a mesh of any shape")

    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the directory of the run to continue")
    for name, value in (SMALL if args.small else LARGE).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.every = args.every or max(1, args.steps // 4)
    return parser, args


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser, args = parse(argv)
    kept = "" if args.out is None else "; what was saved stays in --out for --resume"
    with parser.reporting(kept):
        train(args)


if __name__ == "__main__":
    main()
