"""Every kind of tokenizer gives text back, ends documents, and refuses what is not its own."""

import json

import pytest
import sentencepiece
import tokenizers

from hinny import tokenizer
from hinny.errors import DataError

TEXT = "def f(x):\n    return x + 2024  # grüße, 你好 \U0001f40e\r\n\tend\n"
WORDS = [f"the {a} {b} went to the {c} and back again, number {i}\n" * 3 for i, (a, b, c) in enumerate(
    (a, b, c) for a in ("red", "quick", "lazy") for b in ("fox", "mule", "horse") for c in ("river", "barn", "market"))]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(WORDS, 300)


def test_bytes_are_their_own_ids_and_eod_is_the_next():
    t = tokenizer.load("bytes")
    assert t.encode(TEXT) == list(TEXT.encode())
    assert (t.vocab_size, t.eod) == (257, 256)
    assert t.decode([*t.encode(TEXT), t.eod]) == TEXT


def test_a_learnt_tokenizer_gives_any_text_back_exactly(bpe):
    assert bpe.decode(bpe.encode(TEXT)) == TEXT
    assert bpe.vocab_size == 300
    assert max(bpe.encode("".join(WORDS))) < 300
    assert len(bpe.encode(WORDS[0])) < len(WORDS[0]) / 2


def test_every_digit_is_a_token_of_its_own(bpe):
    pieces = [bpe.decode([i]) for i in bpe.encode("in 2024: 555-1234")]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("20245551234")


def test_the_same_texts_give_the_same_tokenizer(bpe):
    assert tokenizer.train_bpe(WORDS, 300).content == bpe.content
    assert tokenizer.train_bpe(WORDS[1:], 300).fingerprint != bpe.fingerprint


def test_a_special_token_spelt_in_a_text_stays_text(bpe):
    ids = bpe.encode(f"before {tokenizer.EOD_TEXT} after")
    assert bpe.eod not in ids
    assert bpe.decode(ids) == f"before {tokenizer.EOD_TEXT} after"
    assert bpe.decode([*ids[:3], bpe.eod]) == bpe.decode(ids[:3])


def test_encoding_many_texts_equals_encoding_each(bpe):
    assert bpe.encode_many([TEXT, "", WORDS[3]]) == [bpe.encode(TEXT), [], bpe.encode(WORDS[3])]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_again_from_file_and_folder(tmp_path, bpe, kind):
    t = bpe if kind == "bpe" else tokenizer.ByteTokenizer()
    t.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizer.load(source)
        assert (again.encode(TEXT), again.fingerprint, again.eod) == (t.encode(TEXT), t.fingerprint, t.eod)


def test_a_file_with_truncation_padding_and_added_tokens_still_encodes_all_text_and_no_more(tmp_path, bpe):
    inner = tokenizers.Tokenizer.from_str(bpe.content.decode())
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.EOD_TEXT} $A", special_tokens=[(tokenizer.EOD_TEXT, 0)])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).encode(TEXT) == bpe.encode(TEXT)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS), model_writer=file, vocab_size=120, model_type="bpe", minloglevel=2)
    return folder / "tokenizer.model"


def test_a_sentencepiece_model_encodes_as_the_library_does(sentencepiece_file):
    t = tokenizer.load(sentencepiece_file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "the quick mule went to the barn"
    assert t.encode(text) == library.encode(text)
    assert t.decode([*t.encode(text), t.eod]) == text
    assert (t.vocab_size, t.eod) == (120, library.eos_id())
    assert tokenizer.load(sentencepiece_file.parent).fingerprint == t.fingerprint


@pytest.fixture(scope="module")
def byte_pieces(tmp_path_factory):
    """A SentencePiece model that spells any text exactly: byte pieces, and no change to the text."""
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with open(file, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS), model_writer=writer, vocab_size=400, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2)
    return tokenizer.load(file)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "pieces"])
def test_the_bytes_of_windows_add_up_to_those_of_the_text(bpe, byte_pieces, kind):
    t = {"bytes": tokenizer.ByteTokenizer(), "bpe": bpe, "pieces": byte_pieces}[kind]
    text = TEXT + WORDS[0] + "  two spaces"
    ids = t.encode(text)
    assert t.decode(ids) == text
    for size in (1, 2, 3, 7):
        windows = [ids[i:i + size] for i in range(0, len(ids), size)]
        assert sum(t.n_bytes(window) for window in windows) == len(text.encode())
    # the windows do cut characters, which decoding alone would count as three bytes each
    assert sum(len(t.decode([i]).encode()) for i in ids) > len(text.encode()) or kind == "pieces"
    assert t.n_bytes([*ids, t.eod, t.eod]) == len(text.encode())
    with pytest.raises(DataError, match="is outside the tokenizer's vocabulary"):
        t.n_bytes([t.vocab_size])


def test_an_added_token_has_the_bytes_of_its_own_spelling(bpe):
    inner = tokenizers.Tokenizer.from_str(bpe.content.decode())
    inner.add_tokens(["grüße"])
    t = tokenizer.JSONTokenizer(inner.to_str().encode(), "test")
    ids = t.encode(TEXT)
    assert 300 in ids
    assert sum(t.n_bytes([i]) for i in ids) == len(TEXT.encode())


def test_a_vocabulary_that_is_not_of_bytes_is_counted_as_it_decodes():
    words = {tokenizer.EOD_TEXT: 0, "the": 1, "grüße": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=tokenizer.EOD_TEXT))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t = tokenizer.JSONTokenizer(inner.to_str().encode(), "test")
    assert t.n_bytes([1, 2, 0]) == len("the grüße".encode())


@pytest.mark.parametrize("bad", [-1, 300])
def test_an_id_outside_the_vocabulary_is_named(bpe, bad):
    with pytest.raises(DataError, match=rf"token id {bad} is outside .* 0 to 299"):
        bpe.decode([5, bad])


def test_what_is_no_tokenizer_is_refused_with_its_name(tmp_path, bpe):
    def refuse(name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as refusal:
            tokenizer.load(tmp_path / name)
        assert name in str(refusal.value)

    refuse("foreign.json", b'{"a": 1}', "not a file of the `tokenizers` library")
    refuse("binary.json", b"\xff\x00\x01", "not a file of the `tokenizers` library")
    refuse("foreign.model", b"no model at all", "not a SentencePiece model")
    refuse("text.txt", b"words", "the kind of tokenizer is told by the ending")
    nameless = json.loads(bpe.content)
    nameless["added_tokens"] = []
    nameless["model"]["vocab"] = {k.replace("<|endoftext|>", "x0"): v for k, v in nameless["model"]["vocab"].items()}
    refuse("nameless.json", json.dumps(nameless).encode(), "no end-of-document token among its 300 tokens")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        tokenizer.load(tmp_path / "absent.json")


def test_a_folder_must_hold_exactly_one_tokenizer(tmp_path, bpe):
    with pytest.raises(DataError, match=r"neither tokenizer.json nor tokenizer.model"):
        tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(DataError, match="both"):
        tokenizer.load(tmp_path)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(DataError, match=r"yields only \d+ tokens, not 4096"):
        tokenizer.train_bpe(["a short text"], 4096)
    with pytest.raises(DataError, match="vocab_size 100 is too small"):
        tokenizer.train_bpe(WORDS, 100)
