"""Practice of multiple choice: a reader of the text alone finds each answer, and those tokens alone count."""

import re
from collections import Counter

import numpy as np
import pytest
import sentencepiece

from hinny import tokenizer
from hinny.config import DataConfig, SyntheticConfig
from hinny.data.choices import choice_min_length, choice_training
from hinny.data.mix import Stream
from hinny.errors import DataError

SHOWN = "The following are multiple choice questions (with answers) about codes and sums.\n\n"
HIDDEN = "The following are questions (with answers) about codes and sums.\n\n"


@pytest.fixture(scope="module", params=["bpe", "bytes", "sentencepiece"])
def coder(request, folder, tmp_path_factory):
    if request.param != "sentencepiece":
        return tokenizer.load(folder if request.param == "bpe" else "bytes")
    text = "".join(document(tokenizer.ByteTokenizer(), seed, 3000)[1] for seed in range(9))
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with open(file, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()), model_writer=writer, vocab_size=400, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return tokenizer.load(file)


def document(coder, seed, length):
    example = choice_training(np.random.default_rng(seed), coder, length)
    return example, coder.decode(example.tokens)


def marked(example, coder):
    """The text of each stretch of answer tokens."""
    flags = np.flatnonzero(np.diff([False, *example.answers, False]))
    return [coder.decode(example.tokens[a:b]).strip() for a, b in flags.reshape(-1, 2)]


def solve(question):
    """Form and answers of a question without its last words: what must be said and what stands for it."""
    if total := re.search(r"What is (\d\d) plus (\d\d)\?\n", question):
        number = str(int(total[1]) + int(total[2]))
    else:
        thing = re.search(r"What is the code of the (\w+ \w+)\?\n", question)
        codes = re.findall(r"The code of the (\w+ \w+) is (\d{3})\.", question)
        assert len(dict(codes)) == len({code for _, code in codes}) == 4
        number = dict(codes)[thing[1]]
    options = dict(re.findall(r"^([A-D])\. (\d+)$", question, re.MULTILINE))
    if question.startswith("Question: "):
        assert not options
        return number, None
    assert list(options) == list("ABCD")
    assert len(set(options.values())) == 4
    return number, {value: letter for letter, value in options.items()}[number]


def read(text):
    """The form of a document and its answers; fails where an answer is wrong."""
    head = SHOWN if text.startswith(SHOWN) else HIDDEN
    assert text.startswith(head)
    forms, said = [], []
    for question in text.removeprefix(head).split("\n\n"):
        asked, answer = question.rsplit("Answer: ", 1)
        number, letter = solve(asked)
        assert answer in (number, letter)
        assert (letter is None) == (head == HIDDEN)
        forms.append("cloze" if letter is None else "letter" if answer == letter else "text")
        said.append(answer)
    assert len(set(forms)) == 1
    return forms[0], said


def test_every_answer_is_right_and_nothing_else_counts(coder):
    forms, kinds = Counter(), Counter()
    for seed in range(90):
        example, text = document(coder, seed, 1500)
        assert len(example.tokens) == len(example.answers) <= 1500
        form, said = read(text)
        assert marked(example, coder) == said
        forms[form] += 1
        kinds.update("sum" if " plus " in question else "lookup" for question in text.split("\n\n")[1:])
    assert min(forms[form] for form in ("letter", "text", "cloze")) > 15
    assert 0.35 < kinds["sum"] / kinds.total() < 0.7, "sums are shorter: more of them fit"


def test_answers_begin_where_the_tokens_of_a_prompt_end(coder):
    """An evaluation encodes the text up to `Answer:` and scores what follows it."""
    for seed in range(20):
        example, text = document(coder, seed, 900)
        starts = [i for i, answer in enumerate(example.answers) if answer and not example.answers[i - 1]]
        prompts = [text[:found.end()] for found in re.finditer("Answer:", text)]
        assert [coder.encode(prompt) for prompt in prompts] == [example.tokens[:start] for start in starts]


def test_one_question_up_to_what_fits(coder):
    asked = [document(coder, seed, 1500)[1].count("Answer: ") for seed in range(60)]
    assert min(asked) == 1
    assert max(asked) > 8
    # with too little room: one question, which always fits in the least
    least = choice_min_length(coder)
    found = [document(coder, seed, 3) for seed in range(400)]
    assert {text.count("Answer: ") for _, text in found} == {1}
    assert 0.85 * least < max(len(example.tokens) for example, _ in found) <= least


def test_a_run_whose_sequences_hold_no_question_is_refused(folder):
    """Else its rows would be cut before an answer, and nothing would be learned."""
    synthetic = SyntheticConfig(share=1.0, tasks={"choice": 1.0})
    data = DataConfig(path=str(folder), boundaries="reset", synthetic=synthetic)
    least = choice_min_length(tokenizer.load(folder)) - 1
    sizes = {"batch_size": 4, "seed": 1, "vocab_size": 600, "steps": 50}
    with pytest.raises(DataError, match=f"tasks.choice: a sequence has {least} tokens.*train.seq_len to {least} or"):
        Stream(data, seq_len=least - 1, **sizes)
    stream = Stream(data, seq_len=least, **sizes)
    for step in range(50):
        batch = stream.batch(step)
        assert batch.mask.any(axis=1).all()
        assert all(name.endswith("synthetic choice") for name in batch.names)


def test_a_tokenizer_that_cannot_spell_the_questions_is_refused():
    class Lossy(tokenizer.ByteTokenizer):
        def encode_many(self, texts):
            return super().encode_many([text.replace("\n", " ") for text in texts])

    with pytest.raises(DataError, match=r"cannot spell multiple choice exactly.*leave choice out"):
        choice_training(np.random.default_rng(0), Lossy(), 900)
