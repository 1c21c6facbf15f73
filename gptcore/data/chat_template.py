"""Chat templates: from messages to the text a model was or will be trained on, and which of it are responses.

A template is Jinja, as Hugging Face models carry it (``chat_template``), run in a sandbox that can change nothing.
Content is data: where a message spells a special token in letters, those letters stay letters.

Letters that no message has mark, during one rendering, where ``{% generation %}`` begins and ends and which
spellings of special tokens came from content. Positions below are in the rendered text with the latter still in.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.data.records import Message
from gptcore.errors import UserError

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# For a vocabulary without tokens for turns: words open them, the end of text closes what the assistant says.
PLAIN = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:\\n' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n\\n' -}}
{%- else -%}
{{- message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
_MARKS = range(0x10FF00, 0x10FFFE)  # private use: no script, no whitespace, nothing that a template looks for


class Marks(NamedTuple):
    """Three characters that the messages at hand do not have."""

    begin: str
    end: str
    guard: str


class Rendered(NamedTuple):
    """``text`` with guards, which are the letter ``guard``; ``spans``: [start, stop) of each ``{% generation %}``."""

    text: str
    spans: tuple[tuple[int, int], ...]
    guard: str

    def plain(self, start: int = 0, stop: int | None = None) -> str:
        """The text as it is to be encoded."""
        # tojson may have written a guard as an escape
        escaped = json.dumps(self.guard)[1:-1]
        return self.text[start:stop].replace(self.guard, "").replace(escaped, "")


class ChatTemplate:
    """A template and the names that it is given.

    ``source``: Jinja. ``variables``: ``bos_token``, ``eos_token`` and whatever else it reads. ``now`` gives the time
    for ``strftime_now``; the present one by default. ``origin`` names it in errors.

    Raises:
        UserError: not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        *,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
        origin: str = "chat template",
    ) -> None:
        import jinja2

        self.source, self.variables, self.origin = source, dict(variables or {}), origin
        self._environment = _environment(now)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{origin}, line {error.lineno}: not a template: {error.message}") from None

    @property
    def has_generation_tag(self) -> bool:
        """Whether it says itself what the assistant wrote."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def marks_for(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Marks:
        """Characters to mark a rendering of these messages with."""
        present = set(self.source)
        _visit([message.to_dict() for message in messages], present.update)
        _visit(list(tools), present.update)
        free = [chr(code) for code in _MARKS if chr(code) not in present]
        if len(free) < 3:
            raise UserError(f"{self.origin}: the messages use all private characters that could mark them")
        return Marks(*free[:3])

    def render(
        self,
        messages: Sequence[Message],
        *,
        special: Sequence[str] = (),
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        marks: Marks | None = None,
    ) -> Rendered:
        """The messages in the template's form.

        Args:
            special: names of special tokens, which content may spell without becoming one.
            add_generation_prompt: end where the assistant is to speak.
            tools: JSON schemas, for templates that tell a model of them.
            marks: those of an earlier rendering, so that texts can be compared.

        Raises:
            UserError: what the template raises, or an error inside it.
        """
        marks = marks or self.marks_for(messages, tools)
        pattern = _alternatives(special)

        def guarded(text: str) -> str:
            return pattern.sub(lambda m: m[0][0] + marks.guard + m[0][1:], text) if pattern else text

        values = _mapped([message.to_dict() for message in messages], guarded)
        self._environment.extensions[_EXTENSION].marks = marks  # type: ignore[attr-defined]
        try:
            text = self._template.render(
                messages=values,
                tools=_mapped(list(tools), guarded) or None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (
            Exception
        ) as error:  # a template is a program: it may fail in any way, or be stopped by the sandbox
            raise UserError(f"{self.origin}: {error}") from None
        return _unmarked(text, marks)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> ChatTemplate:
        """The template of a model's directory, or of one Jinja file.

        A directory has ``chat_template.jinja``, or ``chat_template`` in its ``tokenizer_config.json``, whose
        ``bos_token`` and ``eos_token`` the template sees; of several the one named "default" is taken.

        Raises:
            UserError: there is none, or it is not valid.
        """
        place = Path(path)
        directory = place if place.is_dir() else place.parent
        config = config_of(directory)
        variables = {
            f"{name}_token": _content(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")
        }
        variables = {name: value for name, value in variables.items() if value is not None}
        file = place / TEMPLATE_FILE if place.is_dir() else place
        if file.is_file():
            return cls(_read(file), variables, origin=str(file), **options)
        found = config.get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if not isinstance(found, str):
            raise UserError(f"{path}: no {TEMPLATE_FILE}, and no chat_template in a {CONFIG_FILE}")
        return cls(found, variables, origin=f"{directory / CONFIG_FILE}: chat_template", **options)


def is_there(directory: str | os.PathLike[str]) -> bool:
    """Whether ``ChatTemplate.load(directory)`` would find one."""
    return (Path(directory) / TEMPLATE_FILE).is_file() or bool(config_of(directory).get("chat_template"))


def config_of(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model's ``tokenizer_config.json`` says; nothing where there is none."""
    file = Path(directory) / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def split_special(text: str, special: Sequence[str]) -> list[tuple[int, int, str | None]]:
    """``text`` cut at the special tokens in it: (start, stop, the token's name or None), in order, none empty."""
    pattern = _alternatives(special)
    pieces: list[tuple[int, int, str | None]] = []
    place = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > place:
            pieces.append((place, match.start(), None))
        pieces.append((match.start(), match.end(), match[0]))
        place = match.end()
    return [*pieces, (place, len(text), None)] if place < len(text) else pieces


def _alternatives(special: Sequence[str]) -> re.Pattern[str] | None:
    names = sorted((name for name in special if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


_EXTENSION = "gptcore.data.chat_template.Generation"


def _environment(now: Callable[[], datetime.datetime]) -> Any:
    """Jinja as Hugging Face's templates expect it, in a sandbox."""
    from jinja2 import Undefined
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), "jinja2.ext.loopcontrols"]
    )
    environment.undefined = Undefined
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _generation() -> type:
    """The tag ``{% generation %} ... {% endgeneration %}``, which marks what it encloses."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  Jinja's own convention
        identifier = _EXTENSION
        marks: Marks

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return self.marks.begin + caller() + self.marks.end

    return Generation


def _unmarked(text: str, marks: Marks) -> Rendered:
    """The text without the marks of ``{% generation %}``, and where they stood."""
    parts, spans, length, begun = [], [], 0, 0
    for piece in re.split(f"([{marks.begin}{marks.end}])", text):
        if piece == marks.begin:
            begun = length
        elif piece == marks.end:
            spans.append((begun, length))
        else:
            parts.append(piece)
            length += len(piece)
    return Rendered("".join(parts), tuple(spans), marks.guard)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with every text in it, keys apart, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, (list, tuple)) else value


def _visit(value: Any, see: Callable[[str], None]) -> None:
    _mapped(value, lambda text: see(text) or text)  # type: ignore[func-returns-value]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a template: {error}") from None


def _content(token: Any) -> str | None:
    """A token's name, which some files wrap."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None
