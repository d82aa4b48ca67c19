"""What goes out is opened by the programs that it is for, with the same ids and the same continuation."""

import io
import json
import random

import pytest
import sentencepiece
import torch
from converted_runs import converted, values_of
from small import small_config

import hinny
from hinny import tokenizer as tokenizers
from hinny.checkpoint import load_model, tokenizer_files
from hinny.errors import CheckpointError, ConfigError
from hinny.tokenizer import ByteTokenizer, JSONTokenizer, train_bpe

LLAMA = small_config("*-*-", vocab_size=300, mlp=dict(d_ff=24, activation="swiglu"), attention=dict(
    n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=1.0, rope_base=10000.0))
TEXTS = ["Hello world", " two  spaces ", "naïve ½ 東京 \n\n tabs\t and 🎉", "def f(x):\n    return x + 12345\n", "",
         "é é", "\x00\x7f"]


def texts():
    draw = random.Random(0)
    ranges = ((32, 127), (1, 0x3000), (0x10000, 0x1F000))
    return TEXTS + ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(40)) for _ in range(50)]


def words_of_text():
    return train_bpe(["the quick brown fox " * 30, "def f(x): return x " * 30], 280)


def test_bytes_go_out_as_a_file_of_the_library_that_gives_the_same_ids():
    own = ByteTokenizer()
    out = JSONTokenizer(tokenizer_files.byte_level(own), "test")
    assert (out.vocab_size, out.eod) == (own.vocab_size, own.eod) == (257, 256)
    for text in texts():
        assert out.encode(text) == own.encode(text) == list(text.encode())
        assert out.decode(own.encode(text)) == text
    for byte in range(256):
        assert out.n_bytes([byte]) == 1


@pytest.mark.parametrize("words", [ByteTokenizer(), words_of_text()], ids=["bytes", "bpe"])
def test_transformers_opens_model_and_tokenizer_and_goes_on_as_hinny_does(tmp_path, words):
    transformers = pytest.importorskip("transformers")
    values = {name: value.float() for name, value in values_of(LLAMA).items()}
    run = converted(tmp_path / "run", values, config=LLAMA)
    words.save(run.path)
    hinny.convert(run.path, tmp_path / "out", to="llama", shard_bytes=8000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == words.eod
    for text in texts():
        assert tokenizer(text)["input_ids"] == words.encode(text)
        assert tokenizer.decode(words.encode(text)) == words.decode(words.encode(text))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (words.eod, None)
    prompt = "the quick"
    ids = torch.tensor([words.encode(prompt)])
    with torch.no_grad():
        difference = model(ids).logits - load_model(run)(ids)
    assert difference.abs().max() < 1e-5 * load_model(run)(ids).abs().max()
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:].tolist()
    mine = list(hinny.Engine(run.path).tokens(ids[0].tolist(), 8))
    known = words.vocab_size
    # hinny never writes one of the words that only pad the vocabulary
    length = next((i for i, token in enumerate(out) if token >= known), len(out))
    assert mine[:length] == out[:length]


def sentencepiece_model():
    content = io.BytesIO()
    lines = iter(["the quick brown fox jumps over the lazy dog", "def f(x): return x", "1 2 3 4 5 6 7 8 9 0"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=content, vocab_size=60,
                                             minloglevel=2, pad_id=-1, hard_vocab_limit=False)
    return content.getvalue()


def test_a_sentencepiece_model_is_refused_for_auto_tokenizer_and_copied_where_asked(tmp_path):
    values = values_of(LLAMA)
    run = converted(tmp_path / "run", values, config=LLAMA)
    (run.path / "tokenizer.json").unlink()
    (run.path / "tokenizer.model").write_bytes(content := sentencepiece_model())
    with pytest.raises(CheckpointError, match=r"is a SentencePiece model.*--tokenizer FILE\.json.*--tokenizer none"):
        hinny.convert(run.path, tmp_path / "out", to="llama")
    record = hinny.convert(run.path, tmp_path / "out", to="llama", tokenizer="none")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == content
    assert "SentencePiece" in record["notes"][0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizers.load(run.path).eod


def test_a_given_tokenizer_must_be_the_runs_own_in_other_words(tmp_path):
    words = words_of_text()
    run = converted(tmp_path / "run", values_of(LLAMA), config=LLAMA)
    words.save(run.path)
    other = tmp_path / "other"
    other.mkdir()
    words.save(other)
    hinny.convert(run.path, tmp_path / "out", to="llama", tokenizer=other / "tokenizer.json")
    train_bpe(["completely different words here " * 30], 275).save(other)
    with pytest.raises(CheckpointError, match=r"is another tokenizer than the run's: it encodes \d+ of \d+ tokens"):
        hinny.convert(run.path, tmp_path / "no", to="llama", tokenizer=other / "tokenizer.json")
    with pytest.raises(CheckpointError, match="only such a file can stand for"):
        hinny.convert(run.path, tmp_path / "no", to="llama", tokenizer="bytes")


def test_a_run_without_a_tokenizer_goes_out_without_one_and_says_so(tmp_path):
    run = converted(tmp_path / "run", values_of(LLAMA), config=LLAMA)
    (run.path / "tokenizer.json").unlink()
    record = hinny.convert(run.path, tmp_path / "out", to="llama")
    assert record["notes"] == ["The run has no tokenizer: none was written."]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {}


def test_a_dry_run_refuses_ranks_that_cannot_share_the_model(tmp_path):
    run = converted(tmp_path / "run", values_of(LLAMA), config=LLAMA)
    with pytest.raises(CheckpointError, match=r"n_kv_heads is 2, which tp = 3 must divide"):
        hinny.convert(run.path, to="megatron", tp=3, dry_run=True)
    by_layout = [hinny.convert(run.path, to="megatron", layout=layout, dry_run=True)["mapping"]
                 for layout in ("released", "current")]
    assert [any(line["theirs"].endswith("input_layernorm.weight") for line in m) for m in by_layout] == [True, False]


@pytest.mark.parametrize(("to", "pattern"), [("megatron", "M-M*-"), ("state-spaces", "MM")])
def test_formats_that_write_themselves_come_back_bit_for_bit(tmp_path, to, pattern):
    # more rows than the tokenizer has words: they come back too
    config = small_config(pattern, vocab_size=300, **({"attention": dict(
        n_heads=4, n_kv_heads=2, head_dim=8, positions="none")} if "*" in pattern else {}))
    run = converted(tmp_path / "run", values_of(config), config=config)
    options = {"layout": "released"} if to == "megatron" else {}
    plan = hinny.convert(run.path, to=to, dry_run=True, **options)
    assert {name for line in plan["mapping"] for name in line["ours"]} == load_model(run).state_dict().keys()
    record = hinny.convert(run.path, tmp_path / "out", to=to, **options)
    assert ("d_state 128 for" in "".join(record["notes"])) == (to == "megatron")
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="shard_bytes has no effect"):
        hinny.convert(run.path, tmp_path / "no", to=to, shard_bytes=1000)
    assert "tokenizer.json" in {p.name for p in (tmp_path / "out").iterdir()}
    hinny.convert(tmp_path / "out", tmp_path / "back")
    mine, back = load_model(run).state_dict(), load_model(tmp_path / "back").state_dict()
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[name], back[name]) for name in mine)
    assert tokenizers.load(tmp_path / "back").encode("é 1") == tokenizers.load(run.path).encode("é 1")
