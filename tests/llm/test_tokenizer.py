"""The tokenizers of GGUF files against a byte-level BPE from its definition, SentencePiece's own,
and transformers."""

import json
import time
from dataclasses import replace
from pathlib import Path

import gguf
import make_gemma_golden
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from tca4rec_jax.data.downloads import fetch
from tca4rec_jax.data.item_tokens import tokenise_items
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.tokenizer import in_chat, load_tokenizer, text_encoder

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return load_tokenizer(smollm2_path)


def test_encodings_equal_the_plain_bpe(tokenizer):
    encodings = json.loads((GOLDENS / "smollm2_tokens.json").read_text("utf-8"))
    assert len(encodings) > 8
    for text, ids in encodings.items():
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("1995") == ["1", "9", "9", "5"]


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert len(tokenizer) == 49152
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer.decode([2, 68], skip_special_tokens=True) == tokenizer.decode([68])


TEXTS = (
    "Toy Story (1995)",
    "I'LL see 12345 films,  two  spaces\n\n and lines \t",
    "Les Misérables and Les Mise\u0301rables 100%!!\n",
    "東京物語 🎬",
)
MERGES = ["1 9", "i e", "Ġ S", "t o", "to r", "1 2", "12 3"]


def write_tokenizer(path, pre, vocabulary=(), *, bos=None):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if "<s>" in vocabulary:
        writer.add_bos_token_id(vocabulary.index("<s>"))
    if bos is not None:
        writer.add_add_bos_token(bos)
    if vocabulary:
        writer.add_token_list(list(vocabulary))
        writer.add_token_types([1] * len(vocabulary))
        writer.add_token_merges(MERGES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary(*more):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(merge.replace(" ", "") for merge in MERGES), *more]


def test_qwen2_equals_transformers(tmp_path):
    vocabulary = byte_level_vocabulary()
    ours = load_tokenizer(write_tokenizer(tmp_path / "qwen.gguf", "qwen2", vocabulary))
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    theirs = Qwen2Tokenizer({token: i for i, token in enumerate(vocabulary)}, merges)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.tokenize(text), text
    assert ours.tokenize("123") == ["1", "2", "3"]


def test_llama3_keeps_three_digits_and_whole_words(tmp_path):
    vocabulary = byte_level_vocabulary("whole")  # which no merge makes
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "llama.gguf", "llama-bpe", vocabulary))
    assert tokenizer.tokenize("12345 whole") == ["123", "4", "5", "Ġ", *"whole"]
    assert tokenizer.tokenize("whole") == ["whole"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_tokenizer_is_refused(tmp_path):
    path = write_tokenizer(tmp_path / "other.gguf", "tekken")
    with pytest.raises(ValueError, match=r"other.gguf.*'tekken'; known are 'llama'.*'smollm'"):
        load_tokenizer(path)


def test_a_file_says_whether_a_bos_begins_a_text(tmp_path):
    vocabulary, keys = byte_level_vocabulary("<s>"), ("qwen2", "llama-bpe")
    for pre, said, added in [(keys[0], None, 0), (keys[1], None, 1), (keys[0], True, 1)]:
        path = write_tokenizer(tmp_path / "x.gguf", pre, vocabulary, bos=said)
        tokenizer = load_tokenizer(path)
        bos = [vocabulary.index("<s>")] * added
        assert tokenizer("a")["input_ids"] == [*bos, vocabulary.index("a")]
        assert text_encoder(tokenizer, "added").first("") == bos
        assert text_encoder(tokenizer, "known").first("") == [vocabulary.index("<s>")]
        assert text_encoder(tokenizer, "never").first("") == []


def test_a_prompt_of_smollm2_is_text(tokenizer):
    encoder = text_encoder(tokenizer, "added")
    strike = encoder.inside(" Strike <|im_end|> Two")
    assert strike[:1] == tokenizer(" Strike")["input_ids"]
    assert not set(strike) & set(encoder.control.values())
    assert tokenizer.decode(strike) == " Strike <|im_end|> Two"
    assert encoder.control["<|im_end|>"] == 2
    # No BOS, as the file says; a text by itself has the same tokens as ever.
    assert encoder.first("Movies") == tokenizer("Movies")["input_ids"]
    assert text_encoder(tokenizer, "known").first("Movies")[0] == tokenizer.bos_token_id


@pytest.fixture(scope="module")
def gemma(gemma_path):
    return load_tokenizer(gemma_path)


@pytest.mark.slow
def test_gemma3_encodes_as_sentencepiece(gemma):
    golden = json.loads((GOLDENS / "gemma3_tokens.json").read_text("utf-8"))
    encoder = text_encoder(gemma, "never")
    for text, ids in golden["texts"].items():
        assert encoder.first(text) == encoder.inside(text) == ids, text
        assert gemma.decode(ids) == text
    lines = (fetch("movielens-100k") / "ml-100k.item").read_text("utf-8").splitlines()[1:]
    assert make_gemma_golden.digest(map(encoder.inside, lines)) == golden["movielens"]


@pytest.mark.slow
def test_special_tokens_of_gemma3(gemma):
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id) == (2, 1, 0)
    assert (gemma.unk_token_id, len(gemma)) == (3, 262144)
    assert gemma("a<eos>")["input_ids"] == [2, 236746, 1]
    assert text_encoder(gemma, "added").first("a") == [2, 236746]


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SAID = "Movies one person watched, in order:\n"
SAYING = PromptTemplate((SAID + "{history}\n{target}",))
WATCHED = ("Toy Story (1995)", "Heat </s> 2", "Fargo (1996)")


def sentencepiece_bpe():
    """As Llama 2 and Mistral: a space before a text, words across spaces, bytes of what is rare."""
    learner, spaces = Tokenizer(models.BPE()), normalizers.Replace(" ", "▁")
    learner.normalizer = normalizers.Sequence([spaces, normalizers.Replace("\n", "")])
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    learner.train_from_iterator([SAID, *WATCHED], trainer)
    learned = json.loads(learner.to_str())["model"]
    words = [*SPECIAL, *BYTES, *learned["vocab"]]
    backend = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.add_special_tokens(SPECIAL)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return backend


def write_sentencepiece(path, *more, kind=4, prefix=None):
    """The GGUF file of `sentencepiece_bpe`, as llama.cpp converts it, and more words of a kind."""
    words = list(sentencepiece_bpe().get_vocab(with_added_tokens=False).items())
    words = [*sorted(dict(words), key=dict(words).__getitem__), *more]
    kinds = [2, 3, 3, *[6] * len(BYTES), *[1] * (len(words) - 259 - len(more)), *[kind] * len(more)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_scores([-float(number) for number in range(len(words))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_of_llama2_equals_transformers(tmp_path):
    ours, theirs = (
        load_tokenizer(write_sentencepiece(tmp_path / "a.gguf")),
        llama(sentencepiece_bpe()),
    )
    for text in (*TEXTS, SAID, *WATCHED, "Toy  Story", " Toy", "<s>Toy</s> a ", "</s>", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        for encoder in ("first", "inside"):
            a, b = (getattr(text_encoder(one, "added"), encoder) for one in (ours, theirs))
            assert a(text) == b(text), text
    assert (
        ours.decode(ours("Toy 東 Story")["input_ids"], skip_special_tokens=True) == "Toy 東 Story"
    )


def test_an_endless_piece_of_sentencepiece_takes_no_time(tmp_path):
    path = write_sentencepiece(tmp_path / "a.gguf", "ab" * 2**20, kind=1)
    began = time.process_time()
    assert load_tokenizer(path).tokenize("Toy")
    assert time.process_time() - began < 5


def test_what_a_user_of_sentencepiece_defined_is_never_taken_apart(tmp_path):
    path = tmp_path / "a.gguf"
    plain = load_tokenizer(write_sentencepiece(path, prefix=False)).tokenize
    tokenizer = load_tokenizer(write_sentencepiece(path, "  ", "<b>", "Toy S", prefix=False))
    expected = ["<b>", *plain("Toy"), "  ", "Toy S", *plain("tory")]
    assert tokenizer.tokenize("<b>Toy  Toy Story") == expected
    encoder = text_encoder(tokenizer, "added")
    assert encoder.inside("<b>")[0] == len(tokenizer) - 2
    assert set(encoder.control) == {"<s>", "</s>"}
    assert tokenizer.decode(encoder.first("<b>Toy  Toy Story")[1:]) == "<b>Toy  Toy Story"


def test_bos_may_be_another_control_token(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "a.gguf"))
    other = tokenizer.convert_tokens_to_ids("</s>")
    encoder = text_encoder(tokenizer, "known", "</s>")
    assert (encoder.bos, encoder.first("")) == (other, [other])
    assert text_encoder(tokenizer, "never").bos == tokenizer.bos_token_id
    with pytest.raises(UserError, match="bos_token is 'x': expected one of .* control tokens, <s>"):
        text_encoder(tokenizer, "known", "x")


def sentencepiece_unigram(scheme):
    """As T5 and newer exports of Llama 2: the space is the pre-tokenizer's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([SAID, *WATCHED], trainer)
    return backend


def of_backend(backend):
    named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def llama(backend):
    """As transformers 5 makes one of Llama 2's files."""
    model = json.loads(backend.to_str())["model"]
    tokenizer = LlamaTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])
    tokenizer.backend_tokenizer.post_processor = backend.post_processor
    return tokenizer


@pytest.mark.parametrize(
    ("made", "bos"),
    [
        (of_backend(sentencepiece_bpe()), [1]),
        (llama(sentencepiece_bpe()), [1]),
        (of_backend(sentencepiece_unigram("first")), []),
    ],
    ids=["bpe", "llama", "unigram"],
)
def test_pieces_of_sentencepiece_are_those_of_the_whole_prompt(made, bos, tmp_path):
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 2  # a space before it
    encoder = text_encoder(tokenizer, "added")
    titles = [title for title in WATCHED if "</s>" not in title]
    items = tokenise_items({"title": titles}, encoder, SAYING)
    pieces = np.concatenate([items.before[0], items.written.values]).tolist()
    assert pieces == tokenizer("".join([SAID, *(f" {title}\n" for title in titles)]))["input_ids"]
    assert encoder.first("") == bos
    ended = tokenise_items({"title": titles}, encoder, replace(SAYING, end="</s>"))
    assert ended.written[0].tolist() == [*items.written[0][:-1], 2]


def test_a_control_token_in_a_title_is_text_or_refused():
    """A Unigram model takes any text that is in its vocabulary."""
    bpe, unigram = (
        text_encoder(of_backend(backend), "added")
        for backend in (sentencepiece_bpe(), sentencepiece_unigram("always"))
    )
    items = tokenise_items({"title": WATCHED}, bpe, SAYING)
    assert not set(items.written.values) & set(bpe.control.values())
    with pytest.raises(UserError, match="item 1: ' Heat </s> 2' contains </s> as this"):
        tokenise_items({"title": WATCHED}, unigram, SAYING)


HISTORY = np.array([[0, 1]])
CHAT = (
    "{{ bos_token }}{% for one in messages %}[{{ one['role'] }}] {{ one['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[{ 'me' }] {% endif %}"
)


def test_a_chat_is_that_of_the_tokenizer():
    """Its own BOS and no other; control tokens where it has them; braces of its own."""
    tokenizer = of_backend(sentencepiece_bpe())
    tokenizer.chat_template = CHAT
    template = PromptTemplate(
        (SAID + "{history}\n{target}",), item="{title}", end="</s>", chat=True, bos="known"
    )
    chat = in_chat(template, tokenizer)
    assert chat.templates == (f"<s>[user] {SAID}{{history}}</s>[{{{{ 'me' }}}}] {{target}}",)
    encoder = text_encoder(tokenizer, chat.bos)
    ids, _ = prompts(tokenise_items({"title": ("Toy", "Story")}, encoder, chat), HISTORY, 200)
    pieces = (f"[user] {SAID}", "Toy", "\n", "Story")
    before = [1, *(token for piece in pieces for token in encoder.inside(piece))]
    assert ids[0].tolist() == [*before, 2, *encoder.inside("[{ 'me' }] ")]


def test_the_chat_of_smollm2_is_in_its_file(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    template = PromptTemplate(
        ("Seen:\n{history}\nNext:{target}",), item="{title}", end="<|im_end|>", chat=True
    )
    template = in_chat(template, tokenizer)
    items = tokenise_items({"title": ("Heat", "Up")}, text_encoder(tokenizer, "never"), template)
    ids, _ = prompts(items, HISTORY, 200)
    message = {"role": "user", "content": "Seen:\nHeat\nUp\nNext:"}
    expected = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    assert ids[0].tolist() == expected


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "chat template fails: no"),
        ("{{ messages[0]['content'] | upper }}", "does not hold a message as it is"),
    ],
)
def test_a_chat_template_that_will_not_do_is_named(chat, message):
    tokenizer = of_backend(sentencepiece_bpe())
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match=message):
        in_chat(PromptTemplate(chat=True), tokenizer)


def test_the_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (tmp_path / "own.py").write_text("raise SystemExit('run')\n")
    fields = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_in_python_is_refused():
    with pytest.raises(UserError, match="CanineTokenizer has no tokenizer.json"):
        text_encoder(CanineTokenizer(), "added")
