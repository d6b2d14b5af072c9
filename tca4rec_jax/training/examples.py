"""Training examples: token rows with their supervised positions, CF rows and trie decisions.

Everything that can be computed once per data set is computed here, vectorised, as ragged arrays;
batches.py only gathers and pads.

Which titles are targets, that is supervised (docs/method.md):
  'all':  rows are non-overlapping pieces of users' sequences, as many whole titles as fit the
          token budget; every title after a piece's first is a target.
  'last': the published protocol, a row is a history and one target; its prompt template is drawn.

Axis letters: R examples, I items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tca4rec_jax.core.decisions import RaggedDecisions
from tca4rec_jax.data.candidates import draw_candidates
from tca4rec_jax.data.item_tokens import ItemTokens, Task
from tca4rec_jax.data.prompts import Rows, check_sequences, keep_latest, row_tokens, with_candidates
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import ItemError, UserError, check_choice


@dataclass(frozen=True, eq=False)
class Examples:
    """R examples.

    The `cf_position` of a supervised title is its flat position in the ItemSequences, which is its
    row in the CF logits store.
    """

    tokens: Ragged  # int32, prompt and target
    slots: Ragged  # int32, what the placeholders among them carry, as of Prompts
    position: Ragged  # int32, the positions whose next token is supervised
    label: Ragged  # int32, aligned with `position`: that next token
    cf_position: Ragged  # int64, one per supervised title
    decisions: RaggedDecisions  # of these titles, by index into `position` and `cf_position`

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows_B: np.ndarray) -> "Examples":
        """Some of the examples (int), in the given order."""
        return Examples(**{name: part.take(rows_B) for name, part in vars(self).items()})


def build_examples(
    sequences: ItemSequences,
    tokens: ItemTokens,
    decisions: RaggedDecisions,
    *,
    targets: str,
    max_tokens: int,
    candidates: int = 0,
    unsupervised_end: int = 0,
    rows: int = 0,
    seed: int = 0,
) -> Examples:
    """Examples of a split: users' sequences ('all') or histories with targets ('last').

    `decisions` are those of every item's title (title_decisions); a row has at most max_tokens.
    The last `unsupervised_end` tokens of a title are not supervised. The templates, so many
    `candidates` if they show them, and the examples if more than `rows` (`sampled`), are drawn from
    `seed`. Raises UserError for unknown targets, prompts that they do not go with, a title that
    does not fit, or if there is no example.
    """
    check_choice("training.targets", targets, ("all", "last"))
    if targets == "all":
        check_sequences(tokens)
        pieces, first = _pieces(sequences, tokens, max_tokens)
        template_R, count = np.zeros(len(pieces), np.int64), 0
    else:
        keep = sequences.lengths > 1
        kept = sequences if keep.all() else sequences.take(keep)
        ends = np.cumsum(sequences.lengths)[keep]
        rng = np.random.default_rng(seed)
        template_R = rng.integers(len(tokens.before), size=len(kept))
        items, count = _with_candidates(kept, tokens, candidates, rng)
        pieces = keep_latest(tokens, items, max_tokens, template_R, count)
        first = ends - pieces.lengths
    if not len(pieces):
        raise UserError("no training example: every row has a single item, so nothing precedes it")
    of_tasks = sum(len(task.asked) for task in tokens.tasks)
    drawn = sampled(len(pieces) + of_tasks, rows, seed)  # before tokens and decisions are made
    row_R, task_R = np.split(drawn, [np.searchsorted(drawn, len(pieces))])
    task_R = task_R - len(pieces) + len(row_R)
    pieces, first = pieces.take(row_R), first[row_R]
    made = row_tokens(tokens, pieces, template_R[row_R], count)
    length_I = np.maximum(tokens.written.lengths - unsupervised_end, 0)
    decided = decisions.before(length_I)
    examples = _supervise(pieces, first, _targets(pieces, targets), length_I, made, decided)
    examples = _with_tasks(examples, tokens.tasks)
    if len(drawn) == len(examples):
        return examples
    return examples.take(np.concatenate([np.arange(len(row_R)), task_R]))


def _targets(pieces: Ragged, targets: str) -> np.ndarray:
    """bool [n], which items of the pieces are supervised."""
    supervised = np.full(pieces.values.size, targets == "all")
    if targets == "all":
        supervised[pieces.offsets[:-1]] = False
    else:
        supervised[pieces.offsets[1:] - 1] = True
    return supervised


def sampled(count: int, rows: int, seed: int) -> np.ndarray:
    """int64, ascending: so many `rows` of `count`, drawn from `seed`; all of them for 0 or more."""
    if not 0 < rows < count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:rows])


def _with_candidates(
    rows: ItemSequences, tokens: ItemTokens, count: int, rng: np.random.Generator
) -> tuple[Ragged, int]:
    """The items of histories and targets, with candidates between them if prompts show them."""
    if tokens.between is None:
        return Ragged(rows.items, rows.offsets), 0
    last = rows.offsets[1:] - 1
    histories = Ragged.from_lengths(np.delete(rows.items, last), rows.lengths - 1)
    all_I = np.ones(len(tokens.written), bool)
    drawn_RxN = draw_candidates(histories, rows.items[last], all_I, count, rng)
    return with_candidates(tokens, histories, drawn_RxN, rows.items[last])


def row_of_example(examples: Examples, sequences: ItemSequences) -> np.ndarray:
    """int64 [R]: the row of the split that each example was made from; -1 for one of a task."""
    of_row_R = examples.cf_position.lengths > 0
    first = examples.cf_position.values[examples.cf_position.offsets[:-1][of_row_R]]
    row_R = np.full(len(examples), -1)
    row_R[of_row_R] = sequences.row_of(first)
    return row_R


def _with_tasks(examples: Examples, tasks: Sequence[Task]) -> Examples:
    """The examples, and one of every item for each task: its answer is supervised, without CF."""

    def stack(found: Ragged, *others: Ragged) -> Ragged:
        nothing = [] if others else [_nothing(found, len(task.asked)) for task in tasks]
        return Ragged.stack([found, *others, *nothing])

    if not tasks:
        return examples
    positions = [
        ranges(task.asked.lengths - 1, task.answered.lengths).astype(np.int32) for task in tasks
    ]
    answers = [task.answered for task in tasks]
    of_answers = zip(positions, answers, strict=True)
    return Examples(
        tokens=stack(examples.tokens, *(task.asked.followed_by(task.answered) for task in tasks)),
        slots=stack(examples.slots),
        position=stack(examples.position, *(Ragged(at, of.offsets) for at, of in of_answers)),
        label=stack(examples.label, *answers),
        cf_position=stack(examples.cf_position),
        decisions=RaggedDecisions(*map(stack, examples.decisions)),
    )


def _nothing(like: Ragged, rows: int) -> Ragged:
    """So many empty rows."""
    return Ragged(like.values[:0], np.zeros(rows + 1, np.int64))


def _pieces(sequences: ItemSequences, tokens: ItemTokens, max_tokens: int):
    """(Items of consecutive pieces that fit the budget, the flat position of each one's first);
    pieces of one title are dropped."""
    lengths = tokens.shown.lengths[sequences.items] + tokens.separator.size
    ends = np.concatenate([[0], np.cumsum(lengths)])
    budget = max_tokens - tokens.before.values.size
    if lengths.size and lengths.max() > budget:
        raise ItemError(
            *("the title of item ", int(sequences.items[int(np.argmax(lengths))])),
            f" has {lengths.max()} tokens, the budget is {max_tokens} with a prefix of "
            f"{tokens.before.values.size}: raise prompt.max_tokens",
        )
    start, stop = sequences.offsets[:-1], sequences.offsets[1:]
    cuts = []
    while start.size:  # the next piece of every row that has one
        end = np.minimum(np.searchsorted(ends, ends[start] + budget, side="right") - 1, stop)
        cuts.append(np.stack([start, end]))
        start, stop = end[end < stop], stop[end < stop]
    first, last = np.concatenate(cuts, axis=1)
    order = np.argsort(first)
    first, counts = first[order], (last - first)[order]
    first, counts = first[counts > 1], counts[counts > 1]
    return Ragged.from_lengths(sequences.items[ranges(first, counts)], counts), first


def _supervise(
    pieces, first, supervised, length_I, rows: Rows, decisions: RaggedDecisions
) -> Examples:
    """Positions, labels, CF rows and decisions of the supervised titles of each piece.

    Of every item's title the first length_I tokens are supervised.
    """
    (ids, slots), starts = rows
    row_of_item = np.repeat(np.arange(len(pieces)), pieces.lengths)
    items, row = pieces.values[supervised], row_of_item[supervised]  # of every supervised title

    def per_row(values, per_title):
        lengths = np.bincount(np.repeat(row, per_title), minlength=len(pieces))
        return Ragged.from_lengths(values, lengths)

    lengths = length_I[items]
    position = ranges(starts.values[supervised] - 1, lengths)
    positions = per_row(position.astype(np.int32), lengths)
    label = ids.values[np.repeat(ids.offsets[row], lengths) + position + 1]
    cf_position = per_row(ranges(first, pieces.lengths)[supervised], 1)

    # The supervised titles before a title in its row, and their positions.
    title = np.arange(items.size) - cf_position.offsets[row]
    before = np.cumsum(lengths) - lengths - positions.offsets[row]
    decided = decisions.position.take(items)
    counts = decided.lengths
    position_of_decision = np.repeat(before, counts) + decided.values
    return Examples(
        tokens=ids,
        slots=slots,
        position=positions,
        label=per_row(label, lengths),
        cf_position=cf_position,
        decisions=RaggedDecisions(
            position=per_row(position_of_decision.astype(np.int32), counts),
            title=per_row(np.repeat(title, counts).astype(np.int32), counts),
            node=per_row(decisions.node.take(items).values, counts),
            child=per_row(decisions.child.take(items).values, counts),
        ),
    )
