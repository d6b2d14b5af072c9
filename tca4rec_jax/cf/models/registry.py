"""The CF models by name: `--config.cf.model=` picks one of MODELS. base.py says what one is."""

import dataclasses
from typing import Any

from tca4rec_jax.cf.losses import LossConfig
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.bert4rec import BERT4Rec, BERT4RecConfig
from tca4rec_jax.cf.models.bpr_mf import BPRMF, BPRMFConfig
from tca4rec_jax.cf.models.caser import Caser, CaserConfig
from tca4rec_jax.cf.models.gru4rec import GRU4Rec, GRU4RecConfig
from tca4rec_jax.cf.models.hstu import HSTU, HSTUConfig
from tca4rec_jax.cf.models.item_item import EASE, EASEConfig, ItemKNN, ItemKNNConfig
from tca4rec_jax.cf.models.lightgcn import LightGCN, LightGCNConfig
from tca4rec_jax.cf.models.popularity import Popularity, PopularityConfig
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """A CF model by name."""

    label: str  # for tables and manifests
    module: type[CFModel]
    config: type[Any]  # the dataclass of its architecture
    training: LossConfig | None = None  # as its paper has it; None if it is not trained


_BY_USER = LossConfig("bpr", targets="window", negatives_outside="user")
MODELS = {
    "sasrec": ModelKind("SASRec", SASRec, SASRecConfig, LossConfig("bce")),
    "hstu": ModelKind("HSTU", HSTU, HSTUConfig, LossConfig("softmax")),
    "gru4rec": ModelKind("GRU4Rec", GRU4Rec, GRU4RecConfig, LossConfig("bpr", negatives=32)),
    "caser": ModelKind(
        "Caser", Caser, CaserConfig, LossConfig("bce", targets="window", negatives=3)
    ),
    "bert4rec": ModelKind("BERT4Rec", BERT4Rec, BERT4RecConfig, LossConfig("softmax")),
    "lightgcn": ModelKind("LightGCN", LightGCN, LightGCNConfig, _BY_USER),
    "bpr_mf": ModelKind("BPR-MF", BPRMF, BPRMFConfig, _BY_USER),
    "ease": ModelKind("EASE", EASE, EASEConfig),
    "item_knn": ModelKind("ItemKNN", ItemKNN, ItemKNNConfig),
    "popularity": ModelKind("most popular", Popularity, PopularityConfig),
}
