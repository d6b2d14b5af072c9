"""A Hugging Face folder with random weights of an architecture, to time the launch scripts with.

    python launch/benchmarks/random_llm.py --architecture=llama-3.2-3b --folder=models/random-3b

Tokens are those of --tokenizer, of which the architecture's vocabulary may have more.
"""

from pathlib import Path

from absl import app, flags
from train_step_inputs import random_weights

from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.launching import start
from tca4rec_jax.llm.checkpoints.export import write_hugging_face
from tca4rec_jax.llm.tokenizer import load_tokenizer

_ARCHITECTURE = flags.DEFINE_string("architecture", None, "Of the weights.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", "smollm2-135m-instruct", "A folder, file or name.")
_FOLDER = flags.DEFINE_string("folder", None, "Where it is written.", required=True)


def main(argv):
    del argv
    start()
    path = Path(_TOKENIZER.value)
    tokenizer = load_tokenizer(path if path.exists() else fetch_file(_TOKENIZER.value))
    config, params = random_weights(_ARCHITECTURE.value)
    write_hugging_face(_FOLDER.value, config, params, tokenizer, dtype="bfloat16")


if __name__ == "__main__":
    app.run(main)
