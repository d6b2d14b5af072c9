"""TCA4Rec as its published code runs it: `official(config)` sets every quirk (docs/official.md).

Each quirk is a field of its own, off by default. `tests/test_official.py` has a test for each.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from tca4rec_jax.config import published_cf, published_rows

DOMAINS = {  # the word of the prompt, by data set
    "Toys_and_Games": "games",
    "Office_Products": "office products",
    "Sports_and_Outdoors": "sports",
}
INSTRUCTION = (  # word for word
    "###Instruction:\nGiven the user interaction history, please recommendate the {domain} that "
    "user is most likely to view.\n\n###Input:\nUser Interaction Histories: {{history}}.\n\n"
    "Then the movie that user is most likely to watch is:\n###Response:{{target}}"
)
ROWS, EPOCHS, BATCH = 10_000, 10, 16


class LLM(NamedTuple):
    """An LLM: where it is, and the fields of the prompt that its tokenizer asks for."""

    weights: str
    end: str
    bos_token: str = ""
    bos: str = "added"


LLMS = {
    "llama_3_2_3b": LLM("models/Llama-3.2-3B", end="<|end_of_text|>"),
    "llama_3_1_8b": LLM("models/Llama-3.1-8B", end="<|end_of_text|>"),
    "llama_2_7b": LLM("models/Llama-2-7b-hf", end="</s>"),
    "qwen2_5_0_5b": LLM("models/Qwen2.5-0.5B", end="<|endoftext|>", bos_token="<|im_start|>"),
    "qwen2_5_1_5b": LLM("models/Qwen2.5-1.5B", end="<|endoftext|>", bos_token="<|im_start|>"),
    "smollm2_135m": LLM("smollm2-135m-instruct", end="<|im_end|>", bos="known"),
}


def official(config: ConfigDict, dataset: str, llm: str, *, masked: bool, features: bool) -> None:
    """Sets all that the published code does, for a data set in DOMAINS and an LLM in LLMS.

    `masked` is its MSL switch (the softmax over the trie's children, tau 4.5), `features` the CF
    vectors in its prompts.
    """
    named = LLMS[llm]
    config.seed = 42
    published_cf(config)
    config.data.update(path=f"data/{dataset}", max_title_length=100, title_spaces="kept")
    config.cf.sasrec.mask_padding = False
    config.llm.update(weights=named.weights, dtype="bfloat16")
    official_prompt(config, named, DOMAINS[dataset], features=features)
    config.objective.update(alpha=0.1, beta=1.0, form="log_expectation", cf_dtype="bfloat16")
    config.objective.update(softmax="children" if masked else "vocabulary")
    config.objective.tau = 4.5 if masked else 1.0
    config.training.update(targets="last", unsupervised_end=2)
    config.training.buckets = (config.prompt.max_tokens,)  # one: batches of any lengths
    config.training.update(batch_size=BATCH, rows_per_mean=4, steps=EPOCHS * ROWS // BATCH)
    config.optimizer.update(learning_rate=2e-5, weight_decay=0.01, epsilon=1e-6, clip=0.0)
    config.optimizer.update(warmup_steps=20, warmup_from_zero=True)
    config.optimizer.decay_steps = 16 * config.training.steps
    config.validation.update(every_epochs=2.0, rows=0, beams=3, metric="hr@3 by title")
    config.validation.update(min_gain=0.001, patience=3)
    config.inference.checkpoint = "best"
    config.decoding.update(mask="after_softmax", rules="huggingface", length_penalty=1.0, beams=10)
    config.decoding.update(exclude_history=False, max_title_tokens=64)
    config.evaluation.update(rows=0, hits="title", text_match=True)


def downloaded_rows(config: ConfigDict, dataset: str) -> None:
    """The rows that the published preprocessing makes of Amazon's files, for the shipped ones."""
    published_rows(config)
    files = {"interactions": f"data/{dataset}.json.gz", "catalogue": f"data/meta_{dataset}.json.gz"}
    config.data.update(**files, title_spaces="single", samples=(0, 5_000, 5_000))
    config.training.rows = ROWS  # SASRec is trained on all of them
    if dataset != "Office_Products":
        config.data.filters.last_days = 48 * 30
        config.data.update(attributes=("brand",), needed_attributes=("brand",))


def official_prompt(config: ConfigDict, llm: LLM, domain: str, *, features: bool) -> None:
    """The published prompt, and the projector of the vectors that it carries with `features`."""
    instruction = INSTRUCTION.format(domain=domain)
    vectors = ("{user}", "{vector}") if features else ("", "")
    config.prompt.update(templates=(vectors[0] + instruction,), item='"{title}"' + vectors[1])
    config.prompt.update(separator=", ", target="{title}", end=llm.end, max_tokens=2048)
    config.prompt.update(bos=llm.bos, bos_token=llm.bos_token)
    config.prompt.update(bos_before_target=True, tokenised="whole")
    if features:
        config.projector.update(width=320, activation="relu", train=False)


def amazon_titles(config: ConfigDict) -> None:
    """The data, LLM and evaluation on which TCA4Rec's authors ran other title recommenders."""
    llm = LLMS["llama_3_2_3b"]
    published_cf(config)
    config.cf.sasrec.update(loss="bce", dropout=0.5)
    config.llm.update(weights=llm.weights, dtype="bfloat16")
    text = "Recommend one product to a person who bought these.\nBought: {history}\nNext: {target}"
    config.prompt.update(templates=(text,), item='"{title}"', separator=", ", target="")
    config.prompt.update(bos=llm.bos, end=llm.end, max_tokens=512)
    config.training.buckets = (config.prompt.max_tokens,)
    config.optimizer.update(learning_rate=1e-4, warmup_steps=20, warmup_from_zero=True)
    config.evaluation.update(rows=0, hits="title")


def answers_of_movies(config: ConfigDict) -> None:
    """What TALLRec and CoLLM have in common: the LLM, the loss and the evaluation of answers."""
    llm = LLMS["llama_2_7b"]
    config.llm.update(weights=llm.weights, dtype="bfloat16")
    config.prompt.update(bos=llm.bos, max_tokens=512)
    config.objective.update(alpha=0.0, softmax="vocabulary", form="log_expectation")
    config.training.update(batch_size=128, buckets=(config.prompt.max_tokens,))
    config.optimizer.learning_rate = 1e-4
    config.evaluation.rows = 0
