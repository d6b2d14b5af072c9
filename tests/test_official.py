"""Each quirk of the published code, one by one, against the published formulas on tiny data."""

import ast
import dataclasses
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_losses import compare
from published_formulas import PublishedLoss, prompt
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.config import build, config_fields, config_value, default_config
from tca4rec_jax.config_checks import check_llm, validate
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.losses import of_logits, tca_loss
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.item_tokens import TextEncoder, tokenise_items
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.summary import check_cutoffs
from tca4rec_jax.evaluation.text_match import text_rank
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.metrics import rank_in_list
from tca4rec_jax.published_projection import project_rounded
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.examples import build_examples
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs" / "official").glob("*.py"))
PAGE = ROOT / "docs" / "official.md"
BOS, END, MERGED, VOCABULARY = 1, 2, 3, 128
# Many titles under one first token and one under another; one begins another, one has one token.
TITLES = [*(f"a{chr(98 + n % 20)}{chr(98 + n // 20)}!" for n in range(80)), "ab", "ab", "c", "x y"]
PUBLISHED = Objective(0.3, cf_dtype="bfloat16")


def encode(text):
    """A token a letter, but one of a quotation mark and a comma: they are merged."""
    return [ord(letter) for letter in text.replace('",', chr(MERGED))]


LETTERS = TextEncoder(encode, encode, {"<s>": BOS, "</s>": END}, bos=BOS)
TEMPLATE = PromptTemplate(
    (prompt(["H"], "toys").replace('"H"', "{history}") + "{target}",),
    item='"{title}"',
    separator=", ",
    target="{title}",
    end="</s>",
    bos_before_target=True,
    tokenised="whole",
    max_tokens=1000,
)


def sequences():
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.integers(0, len(TITLES), (8, 3)), [[80], [82], [5], [83]] * 2], 1)
    return ItemSequences(np.arange(8), items.ravel(), 4 * np.arange(9), np.full(32, -1))


@dataclasses.dataclass
class Store:
    """CF logits in memory."""

    vectors: np.ndarray
    table: np.ndarray

    def read(self, positions):
        return self.vectors[positions]


def examples_of(template, unsupervised_end=2, forced=True):
    """(examples, items' tokens, their trie)."""
    tokens = tokenise_items({"title": TITLES}, LETTERS, template)
    trie = ItemTrie.build(tokens.written)
    trie = trie if forced else trie.compress()
    how = {"unsupervised_end": unsupervised_end, "max_tokens": 1000}
    decisions = title_decisions(trie, forced)
    return build_examples(sequences(), tokens, decisions, targets="last", **how), tokens, trie


LOSS = jax.jit(tca_loss, static_argnums=1, static_argnames="projection")


def case(objective=PUBLISHED, unsupervised_end=2):
    """(our loss of a batch, the published one of PublishedLoss(..)) with the same logits."""
    split, rng = sequences(), np.random.default_rng(1)
    examples, tokens, trie = examples_of(TEMPLATE, unsupervised_end, objective.rounds)
    store = Store(*(rng.normal(size=(size, 8)).astype(np.float32) for size in (32, 84)))
    batches = Batches(examples, store, batch_size=8, seed=0, buckets=(1000,))
    batch = batches.gather(np.arange(8))
    logits = rng.normal(0, 2, (*batch.tokens_BxS.shape, VOCABULARY)).astype(np.float32)
    args = logits, of_logits, batch.targets, batch.cf_BxPxD, CFItems(store.table)
    projection = project_rounded if objective.rounds else None
    sums = LOSS(*args, DeviceTrie.of(trie), objective, projection=projection)

    def published(**changes):
        loss = PublishedLoss([encode(title) for title in TITLES], END, 0.3, **changes)
        losses = []
        for row, last in enumerate(split.last_positions):
            item = split.items[last]
            first = len(examples.tokens[row]) - len(tokens.written[item])
            losses += loss.positions(
                item, logits[row, first - 1 :], store.vectors[last], store.table
            )
        return np.mean(losses)

    return float(sums.total / sums.positions), published


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_with_all_quirks_is_the_published_one(masked):
    softmax = "children" if masked else "vocabulary"
    objective = dataclasses.replace(PUBLISHED, softmax=softmax, tau=4.5 if masked else 1.0)
    ours, published = case(objective)
    assert ours == pytest.approx(published(masked=masked, tau=objective.tau), abs=1e-5)


@pytest.mark.parametrize(
    ("off", "line"),
    [
        ({"objective": dataclasses.replace(PUBLISHED, form="cross_entropy")}, "form"),
        ({"objective": dataclasses.replace(PUBLISHED, cf_dtype="float32")}, "dtype"),
        ({"unsupervised_end": 0}, "unsupervised_end"),
    ],
    ids=["objective.form", "objective.cf_dtype", "training.unsupervised_end"],
)
def test_a_quirk_of_the_loss_that_is_off_changes_its_line_alone(off, line):
    changes = {"form": "cross_entropy", "dtype": np.float32, "unsupervised_end": 0}
    ours, published = case(**off)
    assert ours == pytest.approx(published(**{line: changes[line]}), abs=1e-5)
    assert abs(ours - published()) > 5e-4


def published_row(row, bos=(BOS,)):
    """The tokens of a row, from its texts."""
    *history, target = (TITLES[item] for item in sequences().items[4 * row :][:4])
    return [*encode(prompt(history, "toys")), *bos, *encode(target), END]


def test_a_prompt_is_tokenised_as_one_text_before_bos_and_the_target():
    examples, *_ = examples_of(TEMPLATE)
    for row in range(8):
        assert examples.tokens[row].tolist() == published_row(row)
    assert MERGED in examples.tokens[0]


def test_without_bos_before_the_target_it_alone_is_missing():
    template = dataclasses.replace(TEMPLATE, bos_before_target=False)
    assert examples_of(template)[0].tokens[0].tolist() == published_row(0, bos=())


def test_in_pieces_a_prompt_has_the_tokens_of_each_text_on_its_own():
    examples, *_ = examples_of(dataclasses.replace(TEMPLATE, tokenised="pieces"))
    two = [ord('"'), ord(",")]
    apart = [t for token in published_row(0) for t in (two if token == MERGED else [token])]
    assert examples.tokens[0].tolist() == apart


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="bos_before_target is true, but the tokenizer has no BOS"):
        tokenise_items({"title": TITLES}, LETTERS._replace(bos=None), TEMPLATE)
    with pytest.raises(UserError, match="'decisions', which is for objective.cf_dtype=float32"):
        Objective(softmax="children", mean_over="decisions", cf_dtype="bfloat16")
    tokens = tokenise_items({"title": TITLES}, LETTERS, TEMPLATE)
    trie = ItemTrie.build(tokens.written)
    with pytest.raises(UserError, match="prompt.tokenised is 'whole': set training.targets=last"):
        build_examples(sequences(), tokens, title_decisions(trie), targets="all", max_tokens=1000)


def test_titles_of_too_many_tokens_are_not_recommended():
    allowed = ItemFilter(np.array([True, False, True, True]))
    lengths = examples_of(TEMPLATE)[1].written.lengths[-4:]
    assert lengths.tolist() == [3, 3, 2, 4]
    assert allowed.only(lengths <= 3).allowed_I.tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="leaves no item"):
        allowed.only(lengths > 4)


SETTINGS = {  # of the run, no quirks
    *("seed", "data.path", "llm.weights", "llm.dtype", "training.buckets", "training.steps"),
    *("inference.batch_size", "prompt.templates", "prompt.item", "prompt.end", "cf.max_epochs"),
}


def official_config(arg=""):
    return runpy.run_path(str(ROOT / "configs" / "official" / "tca4rec.py"))["get_config"](arg)


def test_the_page_says_what_the_preset_sets():
    """docs/official.md: each field it gives a value has it in the preset, and another by default
    unless the page says so; and every field that the preset changes is on the page."""
    page, config, defaults = PAGE.read_text(), official_config(), default_config()
    named = set(re.findall(r"`(\w+\.[\w.]+)\b", page))
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    given = [
        (*one, row[2]) for row in rows for one in re.findall(r"`(\w+\.[\w.]+)=([^`]+)`", row[1])
    ]
    assert len(given) > 20
    for name, text, ours in given:
        value = ast.literal_eval(text)
        assert config_value(config, name) == value, name
        assert ours.startswith("the same") == (config_value(defaults, name) == value), name
    changed = {n for n in config_fields() if config_value(config, n) != config_value(defaults, n)}
    assert changed - SETTINGS <= named


def test_every_quirk_on_the_page_names_a_test_that_is_there():
    """The sections of quirks against the table of the section where each is tested."""
    quirks, tested = PAGE.read_text().split("## Where each is tested")
    fields = set(re.findall(r"`(\w+\.[\w.]+)=", quirks.partition("## Loss")[2]))
    assert fields <= set(re.findall(r"`(\w+\.[\w.]+)`", tested))
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tested):
        assert f"def {name}(" in (ROOT / file).read_text(), name


def test_the_argument_of_the_preset_is_strict():
    config = official_config("dataset=Office_Products,msl=true,features=true,llm=qwen2_5_0_5b")
    assert (config.objective.softmax, config.objective.tau) == ("children", 4.5)
    assert "office products" in config.prompt.templates[0]
    assert (config.prompt.bos_token, config.projector.train) == ("<|im_start|>", False)
    downloaded = official_config("dataset=Sports_and_Outdoors,rows=downloaded")
    validate(downloaded)
    assert (downloaded.data.title_cleaning, downloaded.data.filters.last_days) == (
        "published",
        1440,
    )
    with pytest.raises(UserError, match="expected dataset=Toys_and_Games, Office_Products"):
        official_config("dataset=Office")


def test_the_optimizer_of_the_preset_is_plain_adamw():
    """Its rate begins at 0, nothing is clipped, and a gradient of Adam's epsilon moves by half."""
    optimizer = make_optimizer(build(OptimizerConfig, official_config().optimizer), 6250)
    gradient, params = {"w": jnp.array([1e3, 1e-6])}, {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(gradient, state, params)
        expected = -2e-5 * step / 20 * (np.array([1.0, 0.5]) + 0.01 * np.array([1.0, -2.0]))
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-4)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_passes_every_check_before_its_training(path):
    config = runpy.run_path(str(path))["get_config"]()
    validate(config)
    check_llm(config, "gpu")
    if config.recommender.name == "generative":
        check_cutoffs(config)
    assert config.prompt.max_tokens <= config.training.buckets[-1]


def test_the_prompt_of_the_preset_is_the_published_one():
    template, titles = official_config().prompt.templates[0], ["A", "B"]
    history = ", ".join(f'"{title}"' for title in titles)
    assert template.format(history=history, target="") == prompt(titles, "games")


def test_the_losses_of_a_run_with_all_quirks_are_the_published_ones(tmp_path):
    """Of the preset on the tiny work directory: prompts, CF, LLM, loss and optimiser together."""
    make_workdir(tmp_path)
    architecture = tmp_path / "model" / "config.json"
    longer = json.loads(architecture.read_text()) | {"max_position_embeddings": 512}
    architecture.write_text(json.dumps(longer))
    config, tiny = official_config("msl=true,run=all_quirks"), make_config(tmp_path, "any")
    config.unlock()
    config.data, config.cf, config.llm = tiny.data, tiny.cf, tiny.llm
    config.prompt.update(bos="known", bos_token="<|reserved|>", end="<|end|>", max_tokens=512)
    config.training.update(steps=4, batch_size=8, checkpoint_every=4, buckets=(512,))
    config.optimizer.update(learning_rate=0.01, warmup_steps=1)
    config.lora.dropout = 0.0
    losses = [*compare(Experiment(config, tmp_path), "games")]
    for ours, published in losses:
        assert ours == pytest.approx(published, abs=1e-5)
    assert losses[0][0] - losses[-1][0] > 0.01


def test_by_text_a_title_with_the_letter_of_padding_at_its_end_is_never_hit():
    items = ("ab!", "cd", "c d", "cd")
    trie = ItemTrie.build([[*encode(title), END] for title in items])
    leaf_of = trie.leaf_of_item
    tokenizer = SimpleNamespace(
        pad_token=None,
        convert_ids_to_tokens=lambda token: "!",
        decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)).replace(" ", ""),
    )
    experiment = SimpleNamespace(
        trie=trie,
        tokenizer=tokenizer,
        data=SimpleNamespace(catalogue=SimpleNamespace(titles=items)),
    )
    lists = np.array([[leaf_of[2], leaf_of[0], leaf_of[1]]] * 4)
    lists[3, 0] = -1
    found = text_rank(experiment, lists, np.arange(4))
    # "ab!" has lost its end, and "c d" is read as "cd", which the two of that title count as.
    assert found.tolist() == [-1, 0, -1, 2]
    by_title = rank_in_list(lists, leaf_of[np.arange(4)])
    assert by_title.tolist() == [1, 2, 0, 2]
