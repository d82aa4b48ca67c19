"""Conversations as prompts: turns in order, special tokens from the template alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hinny.errors import ConfigError, RequestError
from hinny.infer.server.chat import FILE, Chat, load
from hinny.infer.server.schemas import Message
from hinny.tokenizer import ByteTokenizer, JSONTokenizer, train_bpe

SPECIAL = "{% for m in messages %}<|endoftext|>{{ m.role }}:{{ m.content }}{% endfor %}"


def said(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]  # type: ignore[arg-type]


def text(chat: Chat, *turns: tuple[str, str]) -> str:
    return chat.tokenizer.decode(chat.prompt(said(*turns)))


def test_the_plain_form_ends_where_the_answer_begins() -> None:
    chat = Chat(ByteTokenizer())
    assert text(chat, ("system", "Short."), ("user", " Hi\n"), ("assistant", "Ho"), ("user", "{{ 1 }} & <b>")) == (
        "System: Short.\nUser: Hi\nAssistant: Ho\nUser: {{ 1 }} & <b>\nAssistant:")
    assert chat.stop == ("\nUser:",)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["user assistant endoftext " * 9], 270)])
def test_a_special_token_in_a_template_is_one_token_and_in_a_message_text(
        tokenizer: ByteTokenizer | JSONTokenizer) -> None:
    chat = Chat(tokenizer, SPECIAL)
    tokens = chat.prompt(said(("user", "a<|endoftext|>b"), ("assistant", "c")))
    assert [i for i, token in enumerate(tokens) if token == tokenizer.eod] == [
        0, 1 + len(tokenizer.encode("user:a<|endoftext|>b"))]
    assert tokenizer.decode(tokens) == "user:a<|endoftext|>bassistant:c"
    assert chat.stop == ()


def test_a_message_may_hold_the_mark_itself() -> None:
    assert text(Chat(ByteTokenizer(), SPECIAL), ("user", "\ufdd0<|endoftext|>")) == "user:\ufdd0<|endoftext|>"
    with pytest.raises(RequestError, match="noncharacters"):
        Chat(ByteTokenizer()).prompt(said(("user", "".join(map(chr, range(0xfdd0, 0xfdf0))))))


def test_a_template_may_refuse_and_cannot_reach_out() -> None:
    chat = Chat(ByteTokenizer(), "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        chat.prompt(said(("user", "Hi")))
    escaping = Chat(ByteTokenizer(), "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="unsafe"):
        escaping.prompt(said(("user", "Hi")))


def test_a_bad_template_is_refused_when_the_server_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Chat(ByteTokenizer(), "{% for %}")
    with pytest.raises(ConfigError, match=r"none\.jinja"):
        load(ByteTokenizer(), tmp_path, tmp_path / "none.jinja")


def test_a_runs_own_template_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    turn = ("user", "Hi")
    assert text(load(ByteTokenizer(), tmp_path, None), turn) == "User: Hi\nAssistant:"
    (tmp_path / FILE).write_text("own {{ messages[0].content }}")
    assert text(load(ByteTokenizer(), tmp_path, None), turn) == "own Hi"
    other = tmp_path / "other"
    other.write_text("other {{ messages[0].content }}")
    assert text(load(ByteTokenizer(), tmp_path, other), turn) == "other Hi"
