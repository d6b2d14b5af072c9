"""The first losses of a run, computed anew from the published formulas.

Prompts are texts that the tokenizer reads whole, soft labels come from a dictionary of prefixes
(published_formulas.py), the optimiser is AdamW by hand. Of the project this takes the data, the
order of the batches, the CF vectors and the decoder. test_official.py does so with tiny data. By
hand, after prepare_data and train_cf of the same config in the work directory:

    python tests/first_losses.py --config=FILE.py:ARGUMENT --workdir=W --domain="office products"

trains training.steps steps and prints both losses of each. Dropout must be off.
"""

import dataclasses
import functools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from published_formulas import PublishedLoss, prompt

from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.train import load_batches, train
from tca4rec_jax.training.examples import row_of_example


class PublishedRun:
    """A training run by the published formulas."""

    def __init__(self, experiment: Experiment, domain: str):
        config, tokenizer = experiment.config, experiment.tokenizer
        self.experiment, self.config, self.domain = experiment, config, domain
        self.tokenize = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.titles, self.split = experiment.data.catalogue.titles, experiment.data.splits["train"]
        bos = config.prompt.bos_token or tokenizer.bos_token
        self.bos, end = tokenizer.convert_tokens_to_ids([bos, config.prompt.end])
        tokens, kept = [*map(self.tokenize, self.titles)], ("alpha", "beta", "tau")
        self.formulas = PublishedLoss(tokens, end, **{n: config.objective[n] for n in kept})
        self.store = experiment.cf_store("train")
        batches = load_batches(experiment)
        row_R = row_of_example(batches.examples, self.split)
        self.rows = lambda step: row_R[batches.rows(step)]

    def losses(self) -> Iterator[float]:
        """The loss of each step."""
        graph, state, base = self.experiment.initial_state()
        params = state.params
        first = second = jax.tree.map(jnp.zeros_like, params)

        @jax.jit
        @jax.value_and_grad
        def loss_and_gradient(params, batch):
            decoder = nnx.merge(graph, params, base)
            hidden = decoder.hidden(batch["tokens"], batch["length"])
            z_NxV = decoder.head()(hidden[batch["row"], batch["at"]]) / self.config.objective.tau
            z_NxC = jnp.take_along_axis(z_NxV, batch["token"], axis=1)
            expected = jax.nn.logsumexp(z_NxC, axis=1, b=batch["label"])
            if self.config.objective.softmax == "children":
                z_NxV = jnp.where(batch["label"] > 0, z_NxC, -jnp.inf)
            return jnp.sum(batch["weight"] * (jax.nn.logsumexp(z_NxV, axis=1) - expected))

        for step in range(self.config.training.steps):
            value, gradient = loss_and_gradient(params, self.batch(self.rows(step)))
            yield float(value)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
            change = functools.partial(self.change, step + 1)
            params = jax.tree.map(jnp.subtract, params, jax.tree.map(change, params, first, second))

    def change(self, number: int, param, first, second):
        """What AdamW takes from a parameter in the update of this number."""
        optimizer, done = self.config.optimizer, number - 1
        warm, end = optimizer.warmup_steps, optimizer.decay_steps
        rate = min(done / warm, (end - done) / (end - warm))
        first, second = first / (1 - 0.9**number), second / (1 - 0.999**number)
        change = first / (jnp.sqrt(second) + 1e-6) + optimizer.weight_decay * param
        return optimizer.learning_rate * rate * change

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of the rows and, of each supervised position, soft label and weight."""
        begin = [self.bos] if self.config.prompt.bos == "known" else []
        table, bias = self.store.item_table, self.store.item_bias
        bias = np.zeros(len(table), np.float32) if bias is None else bias
        table = np.column_stack([table, bias])
        ids, positions = [], []
        for number, row in enumerate(rows):
            *history, target = self.split[row]
            text = prompt([self.titles[item] for item in history], self.domain)
            asked = [*begin, *self.tokenize(text), self.bos]
            vector = np.append(self.store.read(self.split.last_positions[[row]])[0], np.float32(1))
            labels = self.formulas.soft_labels(target, vector, table)
            positions += [(number, len(asked) - 1 + at, label) for at, label in enumerate(labels)]
            ids.append([*asked, *self.formulas.titles[target]])
        weight_N = self.weights(np.array([number for number, *_ in positions]))
        padding = -len(positions) % 64  # of no weight, so that few programs are compiled
        row_N, at_N, labels = zip(*positions, *positions[-1:] * padding, strict=True)
        return {
            "tokens": padded(ids, np.int32),
            "length": np.array([*map(len, ids)], np.int32),
            "row": np.array(row_N),
            "at": np.array(at_N),
            "token": padded([[*label] for label in labels], np.int32),
            "label": padded([[*label.values()] for label in labels], np.float32),
            "weight": np.pad(weight_N, (0, padding)),
        }

    def weights(self, row_N: np.ndarray) -> np.ndarray:
        """Of positions of some rows in the mean of the micro-batches' means."""
        group_N = row_N // self.config.training.rows_per_mean
        _, group_N, counts = np.unique(group_N, return_inverse=True, return_counts=True)
        return (1 / (len(counts) * counts[group_N])).astype(np.float32)


def padded(rows: list[list], dtype: type) -> np.ndarray:
    """Rows with zeros at their ends, of few different widths."""
    width = -(-max(map(len, rows)) // 64) * 64
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], dtype)


def compare(experiment: Experiment, domain: str) -> Iterator[tuple[float, float]]:
    """(the run's loss, the published one) of each step; trains the run if it is not there."""
    train(dataclasses.replace(experiment))  # it takes the arrays that it begins with
    log = read_json_lines(experiment.directory / "log.jsonl")
    ours = [line["loss"] for line in log if "loss" in line]  # others are of validations
    yield from zip(ours, PublishedRun(experiment, domain).losses(), strict=True)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "A config file, with an argument.", required=True)
    flags.DEFINE_string("workdir", None, "The work directory.", required=True)
    flags.DEFINE_string("domain", None, "The word of the prompt.", required=True)
    flags.FLAGS(sys.argv)
    file, _, arg = flags.FLAGS.config.partition(":")
    run = Experiment(runpy.run_path(file)["get_config"](arg), Path(flags.FLAGS.workdir))
    worst = 0.0
    for step, (loss, published) in enumerate(compare(run, flags.FLAGS.domain)):
        print(f"{step:3} {loss:.6f} {published:.6f} {loss - published:+.1e}", flush=True)
        worst = max(worst, abs(loss - published))
    sys.exit(worst > 1e-4)
