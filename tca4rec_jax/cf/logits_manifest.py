"""The manifest of a CF logits store: what it was written for, and how that differs from the data.

manifest.json has counts, hashes, the dtype, the CF model's name and statistics of its softmax;
ids.npz has the ids themselves, so that a mismatch can be told in words.

Axis letters: m sampled entries, I items.
"""

import io
import json

import numpy as np

from tca4rec_jax.cf.logits_arrays import REMEDY, LogitsStoreError, Place, key_values, within
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences

FORMAT = 1
MANIFEST = "manifest.json"
IDS = "ids.npz"
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)
_NEEDED = {"history_length", "entries_per", "rows_hash", "catalogue_hash", "cf_model", "arrays"}
_SHOWN = 3  # differing ids in a message


def identity(sequences: ItemSequences, catalogue: Catalogue) -> dict:
    """The fields that tie a store to the data."""
    return {
        "num_rows": len(sequences),
        "num_positions": len(sequences.items),
        "num_items": catalogue.num_items,
        "rows_hash": sequences.content_hash(),
        "catalogue_hash": catalogue.content_hash(),
    }


def write_ids(place: Place, sequences: ItemSequences, catalogue: Catalogue) -> None:
    """Writes ids.npz."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        item_ids=np.array(catalogue.item_ids, dtype=np.str_),
        user=sequences.user,
        items=sequences.items,
        offsets=sequences.offsets,
    )
    key_values(place).write(IDS, buffer.getvalue()).result()


def write_manifest(place: Place, manifest: dict) -> None:
    """Writes manifest.json: the last file of a store, which makes it complete."""
    text = json.dumps(manifest, indent=2) + "\n"
    key_values(place).write(MANIFEST, text.encode()).result()


def read_manifest(place: Place) -> dict:
    """Raises LogitsStoreError if there is no manifest or not a complete one."""
    file = within(place, MANIFEST)
    found = key_values(place).read(MANIFEST).result()
    if found.state != "value":
        raise LogitsStoreError(f"there are no CF logits at {place} (no {MANIFEST}); {REMEDY}")
    try:
        manifest = json.loads(found.value)
    except ValueError as error:
        raise LogitsStoreError(f"{file} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LogitsStoreError(f"{file}: expected a manifest of format {FORMAT}; {REMEDY}")
    if not set(manifest) >= _NEEDED:
        raise LogitsStoreError(f"{file} is incomplete; {REMEDY}")
    return manifest


def check_manifest(
    place: Place, manifest: dict, sequences: ItemSequences, catalogue: Catalogue
) -> None:
    """Raises LogitsStoreError, with the ids that differ, if a store is not one of these data."""
    for field, value in identity(sequences, catalogue).items():
        if manifest.get(field) != value:
            raise LogitsStoreError(
                f"{within(place, MANIFEST)}: {field} is {manifest.get(field)}, but the data has "
                f"{value}{_difference(place, sequences, catalogue)}; the logits were written for "
                f"other data. {REMEDY.capitalize()}"
            )


def temperature_statistics(logits_mxI: np.ndarray) -> dict:
    """What the CF temperature beta will mean: spread of the logits, entropy at several betas."""
    logits_mxI = np.asarray(logits_mxI, np.float64)
    entropy = {}
    for beta in BETAS:
        z_mxI = logits_mxI / beta
        z_mxI = z_mxI - z_mxI.max(axis=1, keepdims=True)
        mass_mxI = np.exp(z_mxI)
        total_m = mass_mxI.sum(axis=1)
        entropy_m = np.log(total_m) - (mass_mxI * z_mxI).sum(axis=1) / total_m
        entropy[f"{beta:g}"] = float(entropy_m.mean())
    return {
        "sampled_entries": len(logits_mxI),
        "mean": float(logits_mxI.mean()),
        "standard_deviation": float(logits_mxI.std(axis=1).mean()),
        "lowest": float(logits_mxI.min()),
        "highest": float(logits_mxI.max()),
        "entropy_nats": entropy,
    }


def _difference(place: Place, sequences: ItemSequences, catalogue: Catalogue) -> str:
    """' (...)': in words what differs; empty if the store does not have its ids."""
    found = key_values(place).read(IDS).result()
    if found.state != "value":
        return ""
    with np.load(io.BytesIO(found.value), allow_pickle=False) as ids:
        stored_ids = ids["item_ids"].tolist()
        user, items, offsets = ids["user"], ids["items"], ids["offsets"]
    if list(catalogue.item_ids) != stored_ids:
        return f" ({_items_differ(stored_ids, list(catalogue.item_ids))})"
    rows = min(len(user), len(sequences))
    other_user = user[:rows] != sequences.user[:rows]
    if other_user.any():
        row = int(np.argmax(other_user))
        return f" (row {row} is user {user[row]} there, user {sequences.user[row]} in the data)"
    if len(user) != len(sequences):
        return f" ({len(user)} rows there, {len(sequences)} in the data; the first {rows} agree)"
    for row in range(rows):
        there, here = items[offsets[row] : offsets[row + 1]], sequences[row]
        if not np.array_equal(there, here):
            names = [[stored_ids[item] for item in of] for of in (there, here)]
            return (
                f" (row {row}, user {user[row]}, has the {len(there)} items .. {names[0][-_SHOWN:]}"
                f" there, the {len(here)} items .. {names[1][-_SHOWN:]} in the data)"
            )
    return " (the ids are the same: titles or timestamps differ)"


def _items_differ(there: list[str], here: list[str]) -> str:
    known_there, known_here = set(there), set(here)
    lost = [item for item in there if item not in known_here]
    new = [item for item in here if item not in known_there]
    if not lost and not new:
        at = next(place for place, item in enumerate(there) if item != here[place])
        pair = f"item {at} is {there[at]!r} there, {here[at]!r} here"
        return f"the same item ids in another order: {pair}"
    parts = [
        f"{len(ids)} items only {where}, such as {ids[:_SHOWN]}"
        for ids, where in ((lost, "there"), (new, "in the data"))
        if ids
    ]
    return "; ".join(parts)
