"""Conversations as tokens: masks by tag and by prefixes agree, and a wrong mask is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.data import tokenizer as tokenizers
from gptcore.data.characters import ByteTokenizer, CharacterTokenizer
from gptcore.data.chat import Chat, chat_for, save
from gptcore.data.chat_template import CHATML, CHATML_TOKENS, ChatTemplate
from gptcore.data.examples import Tokenised
from gptcore.data.records import Demonstration, Message
from gptcore.data.vocabulary import Tokenizer
from gptcore.errors import UserError

TALK = (
    Message("system", "Be brief."),
    Message("user", "2 + 2?"),
    Message("assistant", "4"),
    Message("user", "Write <|im_end|>"),
    Message("assistant", "<|im_end|>, <|endoftext|>"),
)
UNTAGGED = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def learnt(chat: Chat, example: Tokenised) -> list[bytes]:
    """The stretches to learn, special tokens spelled out."""
    names = {token: name.encode() for name, token in chat.tokenizer.special_tokens.items()}
    spell = [names.get(t) or chat.tokenizer.decode_bytes([t]) for t in example.tokens.tolist()]
    runs, before = [], False
    for text, mask in zip(spell, example.loss_mask.tolist(), strict=True):
        if mask:
            runs.append(runs.pop() + text if before else text)
        before = mask
    return runs


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizers.train(
        ["user assistant 2 + 2? Write brief 4 <|im_end|> <|endoftext|>\n" * 9], vocab_size=300
    )


@pytest.mark.parametrize("source", [CHATML, UNTAGGED])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_responses_are_learnt_with_their_stop_tokens(source: str, kind: str, bpe: Tokenizer) -> None:
    tokenizer = (ByteTokenizer() if kind == "bytes" else bpe).with_special_tokens(CHATML_TOKENS)
    chat = Chat(tokenizer, ChatTemplate(source))
    both = chat.conversation(TALK)
    assert learnt(chat, both) == [b"4<|im_end|>", b"<|im_end|>, <|endoftext|><|im_end|>"]
    assert learnt(chat, chat.conversation(TALK, turns="last")) == [b"<|im_end|>, <|endoftext|><|im_end|>"]
    end = tokenizer.special_tokens["<|im_end|>"]
    assert (both.tokens == end).sum() == 5 and tokenizer.eot not in both.tokens, "letters stay letters"
    assert both.tokens[-1] == end and chat.stop_ids == (end, tokenizer.eot)


def test_the_mask_by_prefixes_is_the_mask_by_the_tag(bpe: Tokenizer) -> None:
    tokenizer = bpe.with_special_tokens(CHATML_TOKENS)
    tagged, untagged = (Chat(tokenizer, ChatTemplate(source)) for source in (CHATML, UNTAGGED))
    for turns in ("all", "last"):
        one, other = (chat.conversation(TALK, turns=turns) for chat in (tagged, untagged))
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.loss_mask, other.loss_mask)


PIECES = [*CHATML_TOKENS, "<|endoftext|>", "<|im_", "end|>", "<", "|>", "user", "\n", " ", "é", "\U0010ff00"]


@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), min_size=2, max_size=5)
)
def test_whatever_is_said_only_the_template_writes_control_tokens(said: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    talk = [Message(role, text + ".") for role, text in zip(roles, said, strict=False)]
    if talk[-1].role == "user":
        talk.append(Message("assistant", "yes"))
    tokenizer = ByteTokenizer().with_special_tokens(CHATML_TOKENS)
    chat = Chat(tokenizer, ChatTemplate(CHATML))
    example = chat.conversation(talk)
    start, end = (tokenizer.special_tokens[name] for name in CHATML_TOKENS)
    ids = example.tokens.tolist()
    assert ids.count(start) == ids.count(end) == len(talk) and tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "".join(f"{m.role}\n{m.content}\n" for m in talk)[:-1]
    spoken = [m.content.encode() + b"<|im_end|>" for m in talk if m.role == "assistant"]
    assert learnt(chat, example) == spoken


@pytest.mark.parametrize("template", ["chatml", "plain", "none"])
def test_a_prompt_is_what_comes_before_its_response(template: str, bpe: Tokenizer) -> None:
    chat = chat_for(bpe, template)
    for prompt in ("2 + 2?", TALK[:2]):
        ids = chat.prompt_ids(prompt)
        example = chat.response(prompt, "4")
        assert ids == example.tokens[: len(ids)].tolist()
        assert example.loss_mask.tolist() == [False] * len(ids) + [True] * (len(example.tokens) - len(ids))
        assert example.tokens[-1] == chat.stop_ids[0]


def test_text_alone_is_learnt_whole_whatever_the_template() -> None:
    chat = chat_for(ByteTokenizer())
    example = chat.demonstration(Demonstration("", "ab"))
    assert (
        example.tokens.tolist() == [256, 97, 98, 256] and example.loss_mask.tolist() == [False] + [True] * 3
    )


def test_weights_and_turns_of_demonstrations() -> None:
    chat = chat_for(ByteTokenizer())
    record = Demonstration(TALK[:4], TALK[4].content, weight=0.5, messages=TALK)
    assert chat.demonstration(record).weight == 0.5
    assert len(learnt(chat, chat.demonstration(record))) == 2
    assert len(learnt(chat, chat.demonstration(record, turns="last"))) == 1
    with pytest.raises(UserError, match="several turns needs a template"):
        chat_for(ByteTokenizer(), "none").demonstration(record)


CASES = {
    "drops message 0 .user, 'a question'.": CHATML.replace("in messages", "in messages[1:]"),
    "the loss mask misses the token that ends a response: <|im_end|> stands behind it": CHATML.replace(
        "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    ),
    "the loss mask covers everything": "{% generation %}" + UNTAGGED + "{% endgeneration %}",
    "the loss mask is empty": "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + UNTAGGED,
    "not prefix-preserving at message 1": "{{ messages | length }}" + UNTAGGED,
    "misses the token that ends": UNTAGGED.replace("+ '<|im_end|>'", ""),
    "roles must alternate": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("sentence", CASES)
def test_a_template_that_would_train_a_model_wrongly_is_refused(sentence: str) -> None:
    tokenizer = ByteTokenizer().with_special_tokens(CHATML_TOKENS)
    with pytest.raises(UserError, match=sentence.replace("|", r"\|")):
        Chat(tokenizer, ChatTemplate(CASES[sentence])).conversation(TALK)


def test_a_template_that_rewrites_the_past_can_still_teach_the_last_turn() -> None:
    """One that shortens earlier answers, as those of reasoning models do: the last turn is known."""
    shortened = "(message['content'] if loop.last else message['content'][:1])"
    source = UNTAGGED.replace("message['content']", shortened, 1)
    chat = Chat(ByteTokenizer().with_special_tokens(CHATML_TOKENS), ChatTemplate(source))
    talk = (
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "long"),
    )
    assert learnt(chat, chat.conversation(talk, turns="last")) == [b"long<|im_end|>"]


def test_a_template_may_leave_out_what_was_thought_before_an_earlier_answer() -> None:
    answer = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    source = UNTAGGED.replace("message['content']", answer, 1)
    chat = Chat(ByteTokenizer().with_special_tokens(CHATML_TOKENS), ChatTemplate(source))
    thought = Message("assistant", "<think>hm</think>a")
    talk = (Message("user", "q"), thought, Message("user", "r"), thought)
    assert learnt(chat, chat.conversation(talk, turns="last")) == [b"<think>hm</think>a<|im_end|>"]
    with pytest.raises(UserError, match=r"not prefix-preserving at message 1.*learn the last turn alone"):
        chat.conversation(talk)


def test_a_tokenizer_without_the_template_s_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"writes <\|im_start\|>, <\|im_end\|>, which the tokenizer has not"):
        Chat(ByteTokenizer(), ChatTemplate(CHATML))
    with pytest.raises(UserError, match="no end-of-text token, so that no response could end"):
        Chat(CharacterTokenizer("ab", eot=False), None)
    with pytest.raises(UserError, match="'plain' needs a tokenizer with an end-of-text token"):
        chat_for(CharacterTokenizer("ab", eot=False), "plain")


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_added_tokens_get_the_next_ids_and_are_kept(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    plain: Tokenizer = {
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer("<|im_end> 2"),
        "bpe": bpe,
    }[kind]
    more = plain.with_special_tokens(CHATML_TOKENS)
    size = plain.vocab_size
    assert more.vocab_size == size + 2 and more.eot == plain.eot
    assert [more.special_tokens[name] for name in CHATML_TOKENS] == [size, size + 1]
    assert more.encode("<|im_end|> 2") == plain.encode("<|im_end|> 2") and more.decode([size, size + 1]) == ""
    assert more.fingerprint != plain.fingerprint
    assert more.with_special_tokens(CHATML_TOKENS[::-1]).fingerprint == more.fingerprint
    more.save(tmp_path)
    back = tokenizers.load(tmp_path)
    assert (back.fingerprint, back.special_tokens, back.eot) == (
        more.fingerprint,
        more.special_tokens,
        more.eot,
    )


def test_a_chat_is_kept_beside_its_tokenizer(tmp_path: Path) -> None:
    chat = chat_for(ByteTokenizer())
    save(chat, tmp_path)
    back = chat_for(tokenizers.load(tmp_path), tmp_path)
    one, other = chat.conversation(TALK), back.conversation(TALK)
    assert np.array_equal(one.tokens, other.tokens) and back.stop_ids == chat.stop_ids


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_names_that_a_template_reads_are_kept_with_it(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "<|im_end|>"}'
    )
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[kind].with_special_tokens(["<s>", *CHATML_TOKENS])
    chat = chat_for(tokenizer, tmp_path / "model")
    save(chat, tmp_path / "run")
    back = chat_for(tokenizers.load(tmp_path / "run"), tmp_path / "run")
    assert back.prompt_ids("2 + 2?") == chat.prompt_ids("2 + 2?")
    assert back.prompt_ids("2 + 2?")[0] == tokenizer.special_tokens["<s>"] and back.stop_ids == chat.stop_ids


def test_gpt2_s_vocabulary_speaks_chatml(shared_data: Path) -> None:
    chat = chat_for(tokenizers.load(shared_data / "gpt2_bpe"))
    assert chat.tokenizer.special_tokens["<|im_end|>"] == 50258 and chat.stop_ids == (50258, 50256)
    example = chat.conversation(TALK)
    assert learnt(chat, example)[0] == b"4<|im_end|>"
