"""Makes published_tca.npz from a record of the published PyTorch code's numbers; needs NumPy only.

    python tests/goldens/make_published_golden.py golden_office.npz

The record was taken by running the official TCA4Rec code (commit baeca9e) in float32 on CPU with
torch 2.13.0 on its Office_Products data and the tokenizer of SmolLM2-135M-Instruct (V = 49152, end
token 2). Its rows are 0 to 5, 14 (a title that several items share) and 33 (a long title) of the
training file, counted from 0; its CF logits are those of a SASRec trained for eight short epochs.
The LLM's logits are random: row b has 3 * RandomState(seed[b]).standard_normal((tokens, V)).

Writes, beside itself, only what the tests need (axes: I items, B = 8 rows, N tokens of the rows'
titles, M those with a loss, E pairs of a position and a child of its trie node, S settings):
  title_lengths_I, title_tokens   every title's tokens, one after the other, without the end token
  target_B, cf_logits_BxI         the rows' target items, counted from 0, and their CF logits
  children_N, token_E, p_cf_E     the token distribution before each title token, as sparse rows
  seed_B, logits_first_Bx4, logits_sum_B   the LLM's logits: how to make and to check them
  settings_Sx3                    (alpha, tau, 1 if the softmax is over the children only)
  loss_SxM, loss_BxS, loss_S      losses of positions, of rows alone and of the rows as one batch
  gradient_2_E, gradient_3_E      of settings 2 and 3: d loss of the row / d logit of the child

The published code gives a title's last token no loss and appends no end token to the labels.
"""

import argparse
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent / "published_tca.npz"


def narrow(values: np.ndarray) -> np.ndarray:
    """The same whole numbers as uint16."""
    narrowed = values.astype(np.uint16)
    np.testing.assert_array_equal(narrowed, values)
    return narrowed


def check_layout(record: dict[str, np.ndarray]) -> None:
    """Raises AssertionError unless what the fixture leaves out follows from what it keeps."""
    offsets, tokens = record["item_tok_offsets"], record["item_tok_ids"]
    lengths_B = record["n_response"]
    rows = zip(
        record["input_ids"], record["response_start"], lengths_B, record["title_idx"], strict=True
    )
    for ids, start, length, item in rows:
        title = tokens[offsets[item - 1] : offsets[item]]
        np.testing.assert_array_equal(ids[start : start + length], title)
    row_N = np.repeat(np.arange(lengths_B.size), lengths_B)
    t_N = np.concatenate([np.arange(length) for length in lengths_B])
    trained_N = t_N < lengths_B[row_N] - 1
    expected = {
        "item_ids": np.arange(1, offsets.size),
        "pos_row": row_N,
        "pos_t": t_N,
        "loss_token_row": row_N[trained_N],
        "loss_token_t": t_N[trained_N],
        "allowed_token_ids": record["dist_token_ids"],
        "logit_scale": 3.0,
        "bos_eos_pad_vocab": [1, 2, 0, 49152],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(record[name], values, err_msg=name)


def compact(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the fixture."""
    return {
        "title_lengths_I": narrow(np.diff(record["item_tok_offsets"])),
        "title_tokens": narrow(record["item_tok_ids"]),
        "target_B": narrow(record["title_idx"] - 1),
        "cf_logits_BxI": record["cf_logits"][:, 1:],  # item 0 is padding
        "children_N": narrow(np.diff(record["pos_offsets"])),
        "token_E": narrow(record["dist_token_ids"]),
        "p_cf_E": record["dist_probs"],
        "seed_B": narrow(record["seed"]),
        "logits_first_Bx4": record["logits_check_first4"],
        "logits_sum_B": record["logits_check_sum"],
        "settings_Sx3": record["configs_alpha_tau_msl"],
        "loss_SxM": record["loss_token"],
        "loss_BxS": record["loss_row"],
        "loss_S": record["loss_batch8"],
        "gradient_2_E": record["grad_cfg2_at_dist_tokens"],
        "gradient_3_E": record["grad_cfg3_at_dist_tokens"],
    }


def main(path: Path) -> None:
    """Writes the fixture."""
    with np.load(path, allow_pickle=False) as file:
        record = dict(file)
    check_layout(record)
    np.savez_compressed(TARGET, **compact(record))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="the record of the published code's numbers")
    main(parser.parse_args().record)
