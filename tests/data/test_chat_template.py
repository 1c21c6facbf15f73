"""Templates: rendered as transformers renders them, in a sandbox, with content that stays content."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.data.chat_template import BUILT_IN, CHATML, ChatTemplate, is_there, split_special
from gptcore.data.records import Message
from gptcore.errors import UserError

TALK = (
    Message("system", "Be brief."),
    Message("user", 'Say <|im_end|> & "naïve"'),
    Message("assistant", "<|im_end|>"),
    Message("user", "Again"),
    Message("assistant", "No."),
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<s>")
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}},)
TAGGED = """{% for m in messages %}
{% if m.role == 'assistant' %}
A: {% generation %}{{ m.content | trim }}</s>{% endgeneration %}

{% else %}
{{ m.role[0] | upper }}: {{ m.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}A: {% endif %}
"""
BRACKETS = """{{ bos_token }}{% for m in messages %}{% if loop.index0 == 0 and m['role'] == 'system' %}{% continue %}
{% endif %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 1 %}{{ messages[0]['content'] }} {% endif %}
{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""
WITH_TOOLS = """{%- if tools %}{{ tools | tojson(indent=2) }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{% endif -%}
{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}
{{- ns.n ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- if ns.n > 9 -%}{%- break -%}{%- endif -%}{%- endfor -%}"""


@pytest.mark.parametrize("source", [CHATML, BUILT_IN["plain"], TAGGED, BRACKETS, WITH_TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_it_renders_as_transformers_does(source: str, prompt: bool) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tags = ChatTemplate(source).has_generation_tag
    expected, spans = render(
        [[message.to_dict() for message in TALK]], tools=list(TOOLS), chat_template=source,
        add_generation_prompt=prompt, return_assistant_tokens_mask=tags, **names,
    )  # fmt: skip
    template = ChatTemplate(source, names)
    found = template.render(TALK, special=SPECIAL, add_generation_prompt=prompt, tools=TOOLS)
    assert found.plain() == expected[0]
    # the same stretches, by their words: guards lengthen ours
    words = [found.plain(start, stop) for start, stop in found.spans]
    assert words == ([expected[0][a:b] for a, b in spans[0]] if tags else [])
    assert bool(words) == tags


def test_content_that_spells_a_token_is_told_from_the_template_s_own() -> None:
    found = ChatTemplate(CHATML).render(TALK, special=SPECIAL)
    names = [name for _, _, name in split_special(found.text, SPECIAL) if name]
    assert names == ["<|im_start|>", "<|im_end|>"] * 5, "two more are letters"
    assert found.plain().count("<|im_end|>") == 7


def test_marks_are_letters_that_no_message_has() -> None:
    talk = (Message("user", "\U0010ff00\U0010ff01"), Message("assistant", "\U0010ff02"))
    found = ChatTemplate(CHATML).render(talk, special=SPECIAL)
    assert "user\n\U0010ff00\U0010ff01<|im_end|>" in found.plain() and len(found.spans) == 1


def test_a_guard_in_escaped_json_is_taken_out_again() -> None:
    template = ChatTemplate("{{ tools | tojson(ensure_ascii=true) }}{{ messages[0].content }}")
    found = template.render(TALK[1:2], special=SPECIAL, tools=({"say": "<|im_end|> é"},))
    assert found.plain() == '[{"say": "<|im_end|> \\u00e9"}]' + TALK[1].content


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'no'}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'etc/passwd' %}",
    ],
)
def test_a_template_can_neither_reach_out_nor_change_anything(source: str) -> None:
    with pytest.raises(UserError, match="^mine: "):
        found = ChatTemplate(source, origin="mine").render(TALK)
        assert found.text.strip() == "", "an attribute that is not safe renders as nothing"
        raise UserError("mine: rendered as nothing")


def test_what_is_no_template() -> None:
    with pytest.raises(UserError, match="mine, line 2: not a template"):
        ChatTemplate("{% if a %}\n{% endfor %}", origin="mine")


def test_the_date_is_the_one_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime.datetime(2026, 1, 2))
    assert template.render(TALK).text == "02 Jan 2026"


@pytest.mark.parametrize("shape", ["file", "config", "named", "jinja"])
def test_templates_are_found_where_models_keep_them(tmp_path: Path, shape: str) -> None:
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if shape == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token + eos_token }}")
        config["chat_template"] = "{{ 'not this' }}"
    elif shape == "config":
        config["chat_template"] = "{{ bos_token + eos_token }}"
    elif shape == "named":
        named = {"name": "default", "template": "{{ bos_token + eos_token }}"}
        config["chat_template"] = [{"name": "tools", "template": "no"}, named]
    else:
        (tmp_path / "mine.jinja").write_text("{{ bos_token + eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert is_there(tmp_path) == (shape != "jinja")
    place = tmp_path / "mine.jinja" if shape == "jinja" else tmp_path
    assert ChatTemplate.load(place).render(TALK).text == "<s></s>"


def test_a_directory_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no chat_template.jinja, and no chat_template in a tokenizer_config"
    ):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ChatTemplate.load(tmp_path)
