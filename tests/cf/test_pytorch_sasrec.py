import dataclasses
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tca4rec_jax.cf.models.sasrec import SASRecConfig
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec, read_state_dict
from tca4rec_jax.errors import UserError

GOLDENS = Path(__file__).parents[1] / "goldens"
CHECKPOINT = GOLDENS / "pytorch_sasrec.pt"
CONFIG = SASRecConfig(num_items=11, history_length=5, units=8, blocks=2, heads=1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_parity_with_pytorch_short_histories_included(tmp_path, suffix):
    path = CHECKPOINT
    if suffix == ".safetensors":
        path = tmp_path / "sasrec.safetensors"
        save_file(read_state_dict(CHECKPOINT), path)
    model = read_sasrec(path, CONFIG)
    golden = np.load(GOLDENS / "pytorch_sasrec.npz")
    vectors = np.asarray(model.user_vectors(golden["histories"] - 1))
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-5)
    table, _ = model.items()
    np.testing.assert_allclose(vectors @ np.asarray(table).T, golden["logits"], atol=1e-4)


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def repacked(path, **changes):
    """The golden checkpoint with members replaced."""
    with zipfile.ZipFile(CHECKPOINT) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, changes.get(name.rpartition("/")[2], source.read(name)))
    return path


def test_a_pickle_that_names_anything_else_runs_no_code(tmp_path, capsys):
    path = repacked(tmp_path / "hostile.pt", **{"data.pkl": pickle.dumps(Hostile())})
    with pytest.raises(ValueError, match=r"hostile\.pt: it names builtins\.print"):
        read_state_dict(path)
    assert "code ran" not in capsys.readouterr().out


def test_damaged_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"old\.pt: it is not a zip file"):
        read_state_dict(path)
    with pytest.raises(ValueError, match=r"nowhere\.pt: no such file"):
        read_state_dict(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"short\.pt: storage 0 has 1 of"):
        read_state_dict(repacked(tmp_path / "short.pt", **{"0": b"\0\0\0\0"}))
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(repacked(tmp_path / "list.pt", **{"data.pkl": pickle.dumps([1])}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 12}, r"item_emb\.weight has shape \(12, 8\), expected \(13, 8\)"),
        ({"units": 4}, r"item_emb\.weight has shape \(12, 8\), .* cf\.sasrec\.units=4"),
        ({"history_length": 6}, r"pos_emb\.weight has shape \(5, 8\).*cf\.history_length=6"),
        ({"blocks": 1}, r"cf\.sasrec\.blocks=1.*unknown tensors \['attention_layernorms\.1"),
        ({"heads": 2}, r"cf\.sasrec\.heads is 2"),
    ],
)
def test_what_does_not_fit_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        read_sasrec(CHECKPOINT, dataclasses.replace(CONFIG, **changes))


def normed(x, tensors, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-8) * tensors[f"{name}.weight"] + tensors[
        f"{name}.bias"
    ]


def attended(x, tensors, name):
    """torch.nn.MultiheadAttention of one head, each position over itself and those before."""
    weights = np.split(tensors[f"{name}.in_proj_weight"], 3)
    biases = np.split(tensors[f"{name}.in_proj_bias"], 3)
    query, key, value = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
    out = np.zeros_like(x)
    for place in range(len(x)):
        scores = key[: place + 1] @ query[place] / np.sqrt(x.shape[1])
        shares = np.exp(scores - scores.max())
        out[place] = shares @ value[: place + 1] / shares.sum()
    return out @ tensors[f"{name}.out_proj.weight"].T + tensors[f"{name}.out_proj.bias"]


def fed_forward(x, tensors, name):
    for layer, activation in (("conv1", lambda y: np.maximum(y, 0)), ("conv2", lambda y: y)):
        kernel, bias = (tensors[f"{name}.{layer}.{part}"] for part in ("weight", "bias"))
        x = activation(x @ kernel[:, :, 0].T + bias)
    return x


def todays_vector(tensors, history, norm_first):
    """The last output of the reference repository's model of today for a padded history (0)."""
    real = history != 0
    places = np.arange(1, len(history) + 1) * real
    item_table, D = tensors["item_emb.weight"], CONFIG.units
    x = item_table[history] * np.sqrt(D) * real[:, None] + tensors["pos_emb.weight"][places]
    for block in range(CONFIG.blocks):
        attention, forward = f"attention_layers.{block}", f"forward_layers.{block}"
        first, second = f"attention_layernorms.{block}", f"forward_layernorms.{block}"
        if norm_first:
            x = x + attended(normed(x, tensors, first), tensors, attention)
            x = x + fed_forward(normed(x, tensors, second), tensors, forward)
        else:
            x = normed(x + attended(x, tensors, attention), tensors, first)
            x = normed(x + fed_forward(x, tensors, forward), tensors, second)
    return normed(x, tensors, "last_layernorm")[-1]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_reference_repository_of_today_is_read_where_the_norm_is_stated(tmp_path, norm, caplog):
    tensors, random = read_state_dict(CHECKPOINT), np.random.default_rng(0)
    tensors["pos_emb.weight"] = np.pad(tensors["pos_emb.weight"], ((1, 0), (0, 0)))
    drawn = {
        name: np.float32(value + random.normal(scale=0.3, size=value.shape))
        for name, value in tensors.items()
        if not name.endswith("_emb.weight")
    }
    tensors |= drawn
    path = tmp_path / "today.safetensors"
    save_file(tensors, path)
    histories = np.load(GOLDENS / "pytorch_sasrec.npz")["histories"]
    expected = np.stack([todays_vector(tensors, row, norm == "pre") for row in histories])

    model = read_sasrec(path, dataclasses.replace(CONFIG, norm=norm))
    np.testing.assert_allclose(model.user_vectors(histories - 1), expected, atol=1e-4)
    assert not caplog.records
    original = read_sasrec(path, CONFIG)
    assert np.abs(original.user_vectors(histories - 1) - expected).max() > 0.1
    assert "today.safetensors has a row of positions for padding" in caplog.text


def pickled(offset=0, size=(2, 2), stride=(2, 1)):
    """A state dict of the tensor 'w', whose storage is the golden checkpoint's first."""

    def value(one):
        return pickle.dumps(one, 2)[2:-1]

    storage = b"(" + value("storage") + b"ctorch\nFloatStorage\n"
    storage += value("0") + value("cpu") + value(96) + b"tQ"
    numbers = value(offset) + value(size) + value(stride)
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"tR"
    return b"\x80\x02}" + value("w") + rebuilt + b"s."


@pytest.mark.parametrize(
    "numbers",
    [
        {"stride": (-8, 8)},
        {"stride": (-(10**9), 10**9)},
        {"stride": (2**62, 2**62)},
        {"stride": (2.0, 1.0)},
        {"size": (10**12,), "stride": (0,)},
        {"size": (-1, -1)},
        {"size": (0, 2**63), "stride": (1, 1)},
        {"size": (2, 2, 2)},
        {"size": (97,), "stride": (1,)},
        {"offset": -1},
        {"offset": 93},
        {"offset": 2**63},
    ],
)
def test_no_tensor_reaches_outside_of_its_storage(tmp_path, numbers):
    path = tmp_path / "hostile.pt"
    with pytest.raises(UserError, match=r"hostile\.pt: "):
        read_state_dict(repacked(path, **{"data.pkl": pickled(**numbers)}))


def test_a_file_takes_no_more_memory_than_it_has_bytes(tmp_path):
    path = repacked(tmp_path / "a.pt", **{"data.pkl": pickled(92)})
    expected = read_state_dict(CHECKPOINT)["item_emb.weight"].ravel()[92:]
    np.testing.assert_array_equal(read_state_dict(path)["w"].ravel(), expected)
    many = b"".join(pickled()[3:-1].replace(b"w", bytes([at])) for at in b"abc")
    path = repacked(tmp_path / "many.pt", **{"data.pkl": b"\x80\x02}" + many + b"."})
    first, *others = read_state_dict(path).values()
    assert len(others) == 2
    assert all(np.shares_memory(first, other) for other in others)
    numbered = b"\x80\x02}r\xff\xff\xff\x7f."
    with pytest.raises(UserError, match="its pickle numbers an object 2147483647"):
        read_state_dict(repacked(path, **{"data.pkl": numbered}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled())
        archive.writestr("a/data/0", bytes(1 << 20))
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_state_dict(path)
