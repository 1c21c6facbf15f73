"""Conversations as tokens, with the mask of what the assistant said.

The mask comes from a template's ``{% generation %}`` tag, or, where it has none, from rendering growing prefixes of
the conversation. What either gives is checked: a mask of everything or of nothing, or one without the token that ends
a response, would train a model wrongly in silence, so it is refused.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptcore.data import chat_template
from gptcore.data.atomic import write_text
from gptcore.data.chat_template import CHATML_TOKENS, ChatTemplate, Rendered, split_special
from gptcore.data.examples import Tokenised
from gptcore.data.records import Demonstration, Message, Prompt, as_messages, text_of
from gptcore.data.vocabulary import Tokenizer
from gptcore.errors import UserError

_PROBE = (Message("user", "a question"), Message("assistant", "an answer"))
TURNS = ("all", "last")


class _Piece(NamedTuple):
    """A stretch of a rendered conversation that is encoded by itself."""

    ids: list[int]
    learnt: bool


class Chat:
    """A tokenizer with a template: prompts and conversations to ids.

    ``template`` None: no roles; a prompt's text, the response, the tokenizer's end of text.

    Raises:
        UserError: the template has tokens that the tokenizer lacks, or no token ends a response.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._special = tuple(tokenizer.special_tokens)
        if template is None and tokenizer.eot is None:
            raise UserError("the tokenizer has no end-of-text token, so that no response could end")
        if template is not None:
            lacking = [
                name for name in CHATML_TOKENS if name in template.source and name not in self._special
            ]
            if lacking:
                raise UserError(
                    f"{template.origin}: writes {', '.join(lacking)}, which the tokenizer has not; add them "
                    "(Tokenizer.with_special_tokens), or take the template 'plain' or 'none'"
                )
        self.stop_ids  # noqa: B018  a template that never ends a response is refused now

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which generation ends: the template's, and the end of text."""
        end = () if self.tokenizer.eot is None else (self.tokenizer.eot,)
        if self.template is None:
            return end
        last = self.conversation(_PROBE)
        stop = int(last.tokens[np.flatnonzero(last.loss_mask)[-1]])
        return tuple(dict.fromkeys((stop, *end)))

    def prompt_ids(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of ``prompt`` up to where the assistant is to speak."""
        if self.template is None:
            return self._plain_prompt(prompt)
        rendered = self._rendered(as_messages(prompt), add_generation_prompt=True, tools=tools)
        _refuse_dropped(rendered, as_messages(prompt), self._origin)
        return [token for piece in self._pieces(rendered, ()) for token in piece.ids]

    def response(self, prompt: Prompt, completion: str, weight: float = 1.0) -> Tokenised:
        """``prompt`` and the one response to learn or to judge, its stop token included."""
        if self.template is None:
            ids = self._plain_prompt(prompt)
            stop = self.tokenizer.eot
            assert stop is not None
            return Tokenised.of(ids, [*self.tokenizer.encode(completion), stop], weight)
        conversation = (*as_messages(prompt), Message("assistant", completion))
        return self.conversation(conversation, turns="last", weight=weight)

    def demonstration(self, record: Demonstration, turns: str = "all") -> Tokenised:
        """A demonstration's tokens; ``turns``: learn "all" of the assistant's turns, or the "last" alone.

        One without a prompt is text to learn, whatever the template.
        """
        if not record.prompt:
            end = [] if self.tokenizer.eot is None else [self.tokenizer.eot]
            ids = self.tokenizer.encode(record.completion)
            return Tokenised.of(end or ids[:1], [*(ids if end else ids[1:]), *end], record.weight)
        if not record.messages:
            return self.response(record.prompt, record.completion, record.weight)
        if self.template is None:
            if turns == "all" and sum(message.role == "assistant" for message in record.messages) > 1:
                raise UserError("a conversation of several turns needs a template; take 'chatml' or 'plain'")
            return self.response(record.prompt, record.completion, record.weight)
        return self.conversation(record.messages, turns=turns, tools=record.tools, weight=record.weight)

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        turns: str = "all",
        tools: Sequence[Mapping[str, Any]] = (),
        weight: float = 1.0,
    ) -> Tokenised:
        """A conversation up to the last token to learn, which is a stop token, and the mask of the assistant's turns.

        Raises:
            UserError: the template drops a message, changes what came before as a conversation grows (where that
                decides the mask), or gives a mask of nothing, of everything, or without a stop token.
        """
        assert self.template is not None
        if turns not in TURNS:
            raise UserError(f"turns: got '{turns}', expected one of {', '.join(TURNS)}")
        rendered = self._rendered(messages, tools=tools)
        _refuse_dropped(rendered, messages, self._origin)
        if self.template.has_generation_tag:
            spans = rendered.spans[-1:] if turns == "last" else rendered.spans
        else:
            spans = self._spans_by_prefixes(rendered, messages, turns, tools)
        pieces = self._pieces(rendered, self._ended(rendered, spans))
        tokens = np.array([token for piece in pieces for token in piece.ids], np.int32)
        mask = np.repeat([piece.learnt for piece in pieces], [len(piece.ids) for piece in pieces]).astype(
            bool
        )
        if not mask.any():
            raise UserError(f"{self._origin}: the loss mask is empty: nothing would be learnt")
        length = int(np.flatnonzero(mask)[-1]) + 1
        if mask[1:length].all():
            raise UserError(f"{self._origin}: the loss mask covers everything, the prompt too")
        return Tokenised(tokens[:length], mask[:length], weight)

    @property
    def _origin(self) -> str:
        return "no template" if self.template is None else self.template.origin

    def _plain_prompt(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(text_of(prompt))
        return ids or ([] if self.tokenizer.eot is None else [self.tokenizer.eot])

    def _rendered(self, messages: Sequence[Message], **options: Any) -> Rendered:
        assert self.template is not None
        return self.template.render(messages, special=self._special, **options)

    def _spans_by_prefixes(
        self, whole: Rendered, messages: Sequence[Message], turns: str, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[int, int], ...]:
        """What each assistant's turn adds to the rendering of what came before it."""
        assert self.template is not None
        marks = self.template.marks_for(messages, tools)
        places = [i for i, message in enumerate(messages) if message.role == "assistant"]
        spans = []
        for place in places[-1:] if turns == "last" else places:
            options: dict[str, Any] = {"tools": tools, "marks": marks}
            before = self._rendered(messages[:place], add_generation_prompt=True, **options).text
            after = self._rendered(messages[: place + 1], **options).text
            if not (after.startswith(before) and whole.text.startswith(after)):
                raise UserError(
                    f"{self._origin}: is not prefix-preserving at message {place}: what it writes before changes as "
                    "the conversation grows, so the assistant's part is unknown; give it {% generation %}"
                    + (", or learn the last turn alone (turns = last)" if turns == "all" else "")
                )
            spans.append((len(before), len(after)))
        return tuple(spans)

    def _ended(self, rendered: Rendered, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """``spans`` up to the stop token in each; refuses one without it."""
        tokens = [piece for piece in split_special(rendered.text, self._special) if piece[2] is not None]
        ended = []
        for start, stop in spans:
            inside = [end for begin, end, _ in tokens if start <= begin and end <= stop]
            if not inside or rendered.text[inside[-1] : stop].strip():
                following = next((name for begin, _, name in tokens if begin >= stop), None)
                behind = f": {following} stands behind it" if following else ""
                raise UserError(
                    f"{self._origin}: the loss mask misses the token that ends a response{behind}; the model would "
                    "never learn to stop"
                )
            ended.append((start, inside[-1]))
        return ended

    def _pieces(self, rendered: Rendered, spans: Sequence[tuple[int, int]]) -> list[_Piece]:
        """The rendering in pieces: cut at special tokens, and where responses begin and end, as generation cuts it."""
        cuts = sorted({place for span in spans for place in span})
        stretches: list[tuple[int, int, str | None]] = []
        for start, stop, name in split_special(rendered.text, self._special):
            inner = [] if name else [cut for cut in cuts if start < cut < stop]
            bounds = [start, *inner, stop]
            stretches += [(a, b, name) for a, b in itertools.pairwise(bounds)]
        texts = [rendered.plain(a, b) for a, b, name in stretches if name is None]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else [])
        pieces = []
        for start, _, name in stretches:
            ids = next(encoded) if name is None else [self.tokenizer.special_tokens[name]]
            learnt = any(a <= start < b for a, b in spans)
            pieces.append(_Piece(ids, learnt))
        return pieces


def chat_for(tokenizer: Tokenizer, template: str | os.PathLike[str] = "chatml") -> Chat:
    """The chat of a tokenizer: ``template`` is "chatml", "plain", "none", a Jinja file or a model's directory.

    "plain" and "none" need no token that a vocabulary may lack; "chatml" adds its two to a tokenizer without them
    (the chat's own ``tokenizer`` has them then).
    """
    if template == "none":
        return Chat(tokenizer, None)
    if template == "chatml":
        tokenizer = tokenizer.with_special_tokens(CHATML_TOKENS)
    by_id = {token: name for name, token in tokenizer.special_tokens.items()}
    end = {} if tokenizer.eot is None else {"eos_token": by_id.get(tokenizer.eot, "")}
    source = chat_template.BUILT_IN.get(str(template))
    if source is not None:
        if template == "plain" and not end:
            raise UserError("template 'plain' needs a tokenizer with an end-of-text token")
        return Chat(tokenizer, ChatTemplate(source, end, origin=f"template '{template}'"))
    found = ChatTemplate.load(template)
    found.variables = {**end, **found.variables}
    return Chat(tokenizer, found)


def save(chat: Chat, directory: str | os.PathLike[str]) -> None:
    """Keep tokenizer and template, with the names that it reads, where ``chat_for(tokenizer, directory)`` and other
    libraries find them; "none" leaves no template."""
    chat.tokenizer.save(directory)
    if chat.template is None:
        return
    write_text(Path(directory) / chat_template.TEMPLATE_FILE, chat.template.source)
    place = Path(directory) / chat_template.CONFIG_FILE
    own = {name: value for name, value in chat_template.config_of(directory).items() if value is not None}
    names = {**chat.template.variables, **own}
    write_text(place, json.dumps(names, indent=1) + "\n")


def _refuse_dropped(rendered: Rendered, messages: Sequence[Message], origin: str) -> None:
    """Every message's words must be in the text, in their order; what was thought before an earlier answer need not."""
    text, place = rendered.plain(), 0
    for number, message in enumerate(messages):
        said = message.content.strip()
        if message.role == "assistant" and number < len(messages) - 1:
            said = said.rpartition("</think>")[2].strip()
        forms = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
        found = [(at, form) for form in forms if (at := text.find(form, place)) >= 0]
        if not found:
            raise UserError(
                f"{origin}: drops message {number} ({message.role}, {said[:40]!r}): the model would answer to what it "
                "never saw"
            )
        place = found[0][0] + len(found[0][1])
