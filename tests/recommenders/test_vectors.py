"""Vectors at the placeholders of prompts: whose they are, where they stand, what is refused."""

import jax
import numpy as np
import pytest
from safetensors import safe_open
from tiny_workdir import ITEMS, make_config, make_workdir

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config_checks import check_llm
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.prompts import USER_SLOT, Prompts
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.provenance import StaleError
from tca4rec_jax.recommenders.vectors import SoftRows, describe_vectors, soft_rows
from tca4rec_jax.train import first_run, load_batches, train
from tca4rec_jax.training.curriculum import Curriculum

WIDTH, TOKEN = 3, 9
ITEM = np.arange(5 * WIDTH, dtype=np.float32).reshape(5, WIDTH) + 1
USERS = -np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH) - 1


def ragged(*rows):
    values = np.array([value for row in rows for value in row], np.int32)
    return Ragged.from_lengths(values, np.array(list(map(len, rows))))


def test_every_placeholder_carries_its_vector():
    """Rows with three, none and one of them, in another order; the room is for four."""
    tokens = ragged([TOKEN, 1, TOKEN, 2, TOKEN], [1, 2], [3, TOKEN])
    slots = ragged([USER_SLOT, 4, 0], [], [2])
    soft = SoftRows(Prompts(tokens, slots), TOKEN, ITEM, 4, lambda rows_B: USERS[rows_B])
    position, vector = soft(np.array([2, 0, 1]), width=8)
    np.testing.assert_array_equal(position, [[1, 8, 8, 8], [0, 2, 4, 8], [8, 8, 8, 8]])
    assert (position.dtype, vector.dtype) == (np.int32, np.float32)
    zero = np.zeros(WIDTH)
    np.testing.assert_array_equal(vector[0], [ITEM[2], zero, zero, zero])
    np.testing.assert_array_equal(vector[1], [USERS[0], ITEM[4], ITEM[0], zero])
    np.testing.assert_array_equal(vector[2], np.zeros((4, WIDTH)))


def test_the_curriculum_is_a_function_of_seed_and_batch():
    curriculum, steps = Curriculum(seed=3, steps=2000), np.arange(2000)
    reads = np.array([curriculum.reads_vectors(step) for step in steps.tolist()])
    backwards = [curriculum.reads_vectors(step) for step in reversed(steps.tolist())]
    np.testing.assert_array_equal(reads, backwards[::-1])
    assert not reads[0]
    for quarter in range(4):
        share = reads[quarter * 500 : (quarter + 1) * 500].mean()
        assert share == pytest.approx((quarter + 0.5) / 4, abs=0.06)
    other = [Curriculum(4, 2000).reads_vectors(step) for step in steps.tolist()]
    assert not np.array_equal(reads, other)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors")
    make_workdir(path)
    run_cf(config_of(path).cf, load(path / "data"), path, history_length=4)
    return path


def config_of(workdir, **prompt):
    config = make_config(workdir, "vectors")
    config.cf.update(model="sasrec", max_epochs=1, history_length=4)
    config.cf.sasrec.units = WIDTH
    config.training.targets = "last"
    config.prompt.update({"item": " {title}{vector}", "separator": "z", "placeholder": "y"})
    config.prompt.update(prompt)
    return config


def test_batches_read_the_vectors_of_the_stores(workdir):
    """At alpha = 0, too; the titles of the history are those that the vectors stand after."""
    config = config_of(workdir, templates=("q{user}{history}z{target}",))
    config.objective.alpha = 0.0
    experiment = Experiment(config, workdir)
    store = experiment.cf_store("train")
    batches, token = load_batches(experiment), experiment.items.placeholder
    batch, rows = batches(0), batches.rows(0)
    assert batch.soft.vector_BxLxC.shape == (4, 4 + 1, WIDTH)
    for number, row in enumerate(rows):
        (target,) = batches.examples.cf_position[row]
        history = experiment.data.splits["train"].items[:target]
        at = np.flatnonzero(batch.tokens_BxS[number] == token)
        np.testing.assert_array_equal(batch.soft.position_BxL[number, : at.size], at)
        user, *items = batch.soft.vector_BxLxC[number, : at.size]
        np.testing.assert_array_equal(user, store.read([target])[0])
        np.testing.assert_array_equal(items, store.item_table[history[1 - at.size :]])


def test_text_alone_at_first(workdir):
    config = config_of(workdir)
    config.projector.curriculum = True
    config.training.steps = 50
    batches = load_batches(Experiment(config, workdir))
    reads = [batches.curriculum.reads_vectors(number) for number in range(50)]
    assert len(set(reads)) == 2
    for number in (reads.index(True), reads.index(False)):
        batch = batches(number)
        inside = batch.soft.position_BxL < batch.tokens_BxS.shape[1]
        assert inside.any() == reads[number]
        assert inside.sum() in (0, batches.examples.slots.lengths[batches.rows(number)].sum())


def test_vectors_of_the_users_own(workdir, tmp_path):
    own = np.random.default_rng(0).normal(size=(ITEMS, 5)).astype(np.float32)
    np.save(tmp_path / "own.npy", own)
    config = config_of(workdir)
    config.projector.vectors = str(tmp_path / "own.npy")
    experiment = Experiment(config, workdir)
    soft = soft_rows(experiment, experiment.prompts(np.array([[-1, -1, 7, 2]], np.int32)))
    np.testing.assert_array_equal(soft(np.array([0]), 16).vector_BxLxC[0, :2], own[[7, 2]])
    hashed = experiment.inference_inputs["item vectors"]
    np.save(tmp_path / "own.npy", -own)
    assert Experiment(config, workdir).inference_inputs["item vectors"] != hashed
    np.save(tmp_path / "own.npy", own[1:])
    with pytest.raises(UserError, match=f"vectors of {ITEMS - 1} items, the catalogue {ITEMS}"):
        Experiment(config, workdir).training_inputs  # noqa: B018
    np.save(tmp_path / "own.npy", own)
    config.prompt.templates = ("q{user}{history}z{target}",)
    with pytest.raises(UserError, match=r"width 3, projector.vectors 5: .* leave \{user\} out"):
        load_batches(Experiment(config, workdir))


@pytest.mark.parametrize(
    ("field", "value", "of_lists"),
    [
        ("width", 7, True),
        ("layers", 3, True),
        ("activation", "relu", True),
        ("train", False, False),
        ("weight_decay", 0.5, False),
        ("curriculum", True, False),
    ],
)
def test_what_a_run_with_vectors_is_made_from(workdir, field, value, of_lists):
    """Lists depend on what the projector computes, checkpoints on how it is trained, too."""
    config = config_of(workdir)
    before = Experiment(config, workdir)
    lists, checkpoints = before.inference_inputs, before.training_inputs
    config.projector[field] = value
    after = Experiment(config, workdir)
    assert (after.inference_inputs != lists) == of_lists
    assert after.training_inputs != checkpoints


def test_logits_have_no_vectors(workdir):
    config = config_of(workdir)
    config.cf.model, config.cf.logits = "ease", str(workdir / "ease")
    run_cf(config.cf, load(workdir / "data"), workdir / "other", history_length=4)
    with pytest.raises(
        UserError, match=r"has logits only: .*cf.label_items, .* projector.vectors=F"
    ):
        Experiment(config, workdir).item_vectors  # noqa: B018


def test_vectors_that_tell_no_items_apart(workdir, tmp_path):
    """Those of popularity are one zero each, and so are its users'."""
    config = config_of(workdir)
    config.cf.model, config.cf.logits = "popularity", str(workdir / "popularity")
    run_cf(config.cf, load(workdir / "data"), workdir / "other", history_length=4)
    same = r"cf.model='popularity' has the same one for every item: .* projector.vectors=FILE.npy"
    with pytest.raises(UserError, match=same):
        Experiment(config, workdir).item_vectors  # noqa: B018
    np.save(tmp_path / "own.npy", np.arange(ITEMS, dtype=np.float32)[:, None])
    config.projector.vectors = str(tmp_path / "own.npy")
    load_batches(Experiment(config, workdir))
    config.prompt.templates = ("q{user}{history}z{target}",)
    with pytest.raises(UserError, match=same):
        load_batches(Experiment(config, workdir))


def test_settings_that_do_not_go_together(workdir):
    config = config_of(workdir)
    check_llm(config, "cpu")
    config.lora.train = False
    check_llm(config, "cpu")
    config.projector.train = False
    with pytest.raises(UserError, match="nothing is trained: lora.train is False"):
        check_llm(config, "cpu")
    config.lora.train = True
    check_llm(config, "cpu")
    config.training.cache_hidden_states = True
    with pytest.raises(UserError, match="prompts carry vectors or ids: give training"):
        check_llm(config, "cpu")
    config.prompt.item = " {title}"
    check_llm(config, "cpu")
    config.lora.train = False
    with pytest.raises(UserError, match="nothing is trained"):
        check_llm(config, "cpu")


def test_layers_below_the_adapters_are_no_frozen_prefix(workdir):
    config = config_of(workdir)
    config.lora.first_layer = 1
    assert Experiment(config, workdir).frozen_prefix == 0
    config.prompt.item = " {title}"
    assert Experiment(config, workdir).frozen_prefix == 1


def mean_something_else(config, workdir, section, **fields):
    """Each of the fields changes what the parameters of the run to start from do."""
    first_run(Experiment(config, workdir))
    for name, value in fields.items():
        was, config[section][name] = config[section][name], value
        with pytest.raises(StaleError, match=rf"from other inputs: {section}.{name} was .*, is "):
            first_run(Experiment(config, workdir))
        config[section][name] = was


def test_two_stages(workdir):
    """CoLLM's: adapters of texts alone, then the projector alone, whose run holds both."""
    text = config_of(workdir, item=" {title}")
    text.run = "text"
    text.training.update(steps=2, checkpoint_every=2)
    train(Experiment(text, workdir))
    config = config_of(workdir)
    config.run = "second"
    config.training.update(steps=2, checkpoint_every=2, start_from="text")
    config.lora.train = False
    mean_something_else(config, workdir, "lora", alpha=32.0, targets="q_proj", first_layer=1)
    train(Experiment(config, workdir))
    (_, first), decoder = (
        Experiment.of_run(workdir, "text").trained_decoder("text").arrays(),
        Experiment.of_run(workdir, "second").trained_decoder("second"),
    )
    jax.tree.map(np.testing.assert_array_equal, decoder.arrays()[1], first)
    assert any(leaf.any() for leaf in jax.tree.leaves(first))
    untrained = Experiment(config, workdir).decoder.projector
    for ours, theirs in zip(
        decoder.projector.layers.values(), untrained.layers.values(), strict=True
    ):
        assert np.abs(ours[...] - theirs[...]).max() > 1e-3
    assert Experiment(config, workdir).training_inputs["training.start_from"][1] == 2
    third = config_of(workdir)
    third.training.start_from = "second"
    mean_something_else(third, workdir, "projector", activation="relu")
    np.save(workdir / "others.npy", np.eye(ITEMS, WIDTH, dtype=np.float32))
    third.projector.vectors = str(workdir / "others.npy")
    with pytest.raises(StaleError, match=r"second: .* item vectors was \w{12}, is \w{12}. Give"):
        first_run(Experiment(third, workdir))
    (workdir / "llm" / "text").rename(workdir / "llm" / "gone")
    config.training.steps = 3  # it goes on without what it was started from
    assert int(train(Experiment(config, workdir)).step) == 3
    config.run = "anew"
    with pytest.raises(StaleError, match="text does not say what it was made from"):
        train(Experiment(config, workdir))


def test_an_export_opened_again_gives_the_same_lists(workdir, tmp_path):
    """The merged LLM and the projector beside it; of another CF width the latter is refused."""
    config = config_of(workdir, templates=("q{user}{history}z{target}",))
    config.run = "exported"
    config.training.steps = 2
    config.projector.update(width=5, activation="relu")
    experiment, folder = Experiment(config, workdir), tmp_path / "out"
    train(experiment)
    export_decoder(
        folder,
        experiment.trained_decoder("exported"),
        experiment.tokenizer,
        kind="merged",
        dtype="float32",
        base_model=None,
        vectors=describe_vectors(experiment),
    )
    readme = (folder / "README.md").read_text()
    sizes = "Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 64)"
    for part in (sizes, "token 26 ('y')", "cf.model='sasrec'", "'q{user}{history}z{target}'"):
        assert part in readme
    with safe_open(folder / "projector.safetensors", framework="np") as file:
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (64, 5), "2.bias": (64,)}
    histories = [["0", "1"], ["3"]]
    expected = Recommender.load(workdir, "exported").recommend(histories, k=4)
    config.llm.weights = str(folder)
    config.projector.weights = str(folder / "projector.safetensors")
    again = Recommender(Experiment(config, workdir), "").recommend(histories, k=4)
    for ours, theirs in zip(again, expected, strict=True):
        assert [one.item_id for one in ours] == [one.item_id for one in theirs]
        scores = [[one.score for one in found] for found in (ours, theirs)]
        np.testing.assert_allclose(*scores, atol=1e-5)
    refused = {
        "width": (7, r"0.weight has shape \(5, 3\), expected \(7, 3\)"),
        "activation": ("gelu", "has the activation 'relu', but projector.activation is 'gelu'"),
    }
    for field, (value, message) in refused.items():
        config.projector.update({"width": 5, "activation": "relu", field: value})
        with pytest.raises(UserError, match=f"projector.safetensors.* {message}"):
            Experiment(config, workdir).decoder  # noqa: B018
    config.projector.update(width=5, activation="relu")
    np.save(tmp_path / "own.npy", np.ones((ITEMS, 4), np.float32))
    config.projector.vectors = str(tmp_path / "own.npy")
    config.prompt.templates = ("q{history}z{target}",)
    with pytest.raises(UserError, match="takes vectors of width 3, but those here have 4"):
        Experiment(config, workdir).decoder  # noqa: B018


def test_the_pretrained_llm_reads_no_vectors(workdir):
    config = config_of(workdir)
    assert Experiment(config, workdir).inference_decoder("").projector is None
    assert Experiment(config, workdir).decoder.projector is not None


def test_a_run_that_cannot_be_started_from(workdir):
    config = config_of(workdir)
    config.training.start_from = "nowhere"
    with pytest.raises(StaleError, match="nowhere does not say what it was made from"):
        Experiment(config, workdir).training_inputs  # noqa: B018
    config.run = "nowhere"
    with pytest.raises(UserError, match="this run itself: name another --config.run"):
        first_run(Experiment(config, workdir))
