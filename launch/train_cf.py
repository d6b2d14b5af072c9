"""Trains the CF model of a run, ranks with it, and keeps its logits for the LLM.

    python launch/train_cf.py --config=configs/quickstart.py --workdir=runs/quickstart

--config.cf.model= takes sasrec, hstu, gru4rec, caser, bert4rec, lightgcn, bpr_mf, ease, item_knn or
popularity. Reads WORKDIR/data (launch/prepare_data.py). Writes WORKDIR/cf: the model, its logits of
every split, and report.md and .png, which describe it. A second run with the same settings reuses
the files, an interrupted one goes on.
"""

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.dataset import load
from tca4rec_jax.evaluation.report import show_cf_results, write_cf_report
from tca4rec_jax.launching import launch


def main(config, workdir):
    """Trains the CF model, writes its logits and prints its metrics."""
    data = load(workdir / "data", config.data)
    metrics = run_cf(config.cf, data, workdir, history_length=config.data.history_length)
    write_cf_report(workdir / "cf", metrics)
    show_cf_results(metrics)


if __name__ == "__main__":
    launch(main, "train_cf", run_on="main_process", reads=["data"], writes=["cf", "cf_logits"])
