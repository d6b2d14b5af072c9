"""Evaluates CF models and LLM runs on the same rows and writes tables, pictures and examples.

    python launch/evaluate.py --config=configs/quickstart.py --workdir=runs/quickstart

Needs prepare_data, train_cf and the LLM runs that config.evaluation.variants names.
"""

from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.launching import launch

if __name__ == "__main__":
    launch(
        evaluate_run,
        "evaluate",
        run_on="all_processes",
        reads=["data", "cf", "cf_logits", "llm", "evaluated_runs"],
        writes=["reports"],
        config_of="any_run",
    )
