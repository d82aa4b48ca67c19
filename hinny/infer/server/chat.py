"""Conversations as text for a model, which knows nothing of turns: a plain form, or a Jinja template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hinny.errors import ConfigError, RequestError
from hinny.infer.server.schemas import Message
from hinny.infer.text import encoded
from hinny.tokenizer import EOD_TEXT, Tokenizer

PLAIN = """\
{% for message in messages %}{{ message.role | capitalize }}: {{ message.content | trim }}
{% endfor %}Assistant:"""
"""For models that were never taught a form of their own. The answer ends where the user's next turn would begin."""

PLAIN_STOP = ("\nUser:",)
FILE = "chat_template.jinja"
"""A template beside a run's tokenizer has this name."""
MARKS = [chr(0xfdd0 + n) for n in range(32)]
"""Characters that Unicode keeps free for a program's own use."""


class Chat:
    """Messages → the tokens of a prompt that an answer follows."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template: Jinja, given `messages` and `add_generation_prompt`; None is the plain form.

        ConfigError for one that cannot be read. Names of special tokens in a template are these tokens; in what
        people write they are text.
        """
        self.stop = PLAIN_STOP if template is None else ()
        """Strings that end an answer beside those of the request."""
        self.tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        environment = ImmutableSandboxedEnvironment(trim_blocks=template is not None, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(PLAIN if template is None else template)
        except TemplateError as fault:
            raise ConfigError(f"the chat template cannot be read: {fault}.") from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation and of the beginning of an answer. RequestError if the template or
        the tokenizer has objections."""
        contents = [message.text for message in messages]
        mark = next((m for m in MARKS if not any(m in content for content in contents)), None)
        if mark is None:
            raise RequestError("the messages contain every one of Unicode's noncharacters; leave one out.")
        spelt = re.compile("|".join(map(re.escape, self._special)) or "(?!)")
        # a mark inside keeps a special token's name that somebody wrote from becoming the token
        turns = [{"role": message.role, "content": spelt.sub(lambda m: m[0][0] + mark + m[0][1:], content)}
                 for message, content in zip(messages, contents, strict=True)]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, eos_token=EOD_TEXT, bos_token="")
        except (TemplateError, TypeError, ValueError) as fault:
            raise RequestError(f"the chat template refuses these messages: {fault}.") from None
        tokens: list[int] = []
        behind = 0
        for found in spelt.finditer(text):
            tokens += [*self._encode(text[behind:found.start()], mark), self._special[found[0]]]
            behind = found.end()
        return tokens + self._encode(text[behind:], mark)

    def _encode(self, text: str, mark: str) -> list[int]:
        return encoded(self.tokenizer, [text.replace(mark, "")])[0] if text else []


def load(tokenizer: Tokenizer, run: Path, template: Path | None) -> Chat:
    """The form of conversations: of the file `template`, else of the run's own if it has one, else the plain one."""
    own = run / FILE
    path = template or (own if own.is_file() else None)
    if path is None:
        return Chat(tokenizer)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: the chat template cannot be read: {fault}.") from None
    return Chat(tokenizer, text)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Name → id; longest names first, so that of two that begin alike the longer is found."""
    found = {EOD_TEXT: tokenizer.eod}
    if tokenizer.file_name == "tokenizer.json":
        added = json.loads(tokenizer.content).get("added_tokens", [])
        found |= {token["content"]: token["id"] for token in added if token["special"]}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _raise(message: str) -> None:
    raise TemplateError(message)
