"""Prompts are tokenised and rendered as `transformers` does it; unusable folders are refused by file and field."""

import asyncio
import json
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from coordinator_harness import DEMO_FOLDER
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback, byte_level, composed_digits
from tokenizers import Tokenizer

from baton.errors import InvalidRequestError, ModelError
from coordinator.tokenizer import ModelTokenizer

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}
<|assistant|>{% generation %}{% endgeneration %}
{%- endif %}{{ {'a': "<é&>", 'n': messages | length} | tojson }}{{ missing_variable }}"""
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "<b>\u4e2d\u6587</b> \U0001f600\n\n{{ x }}"},
    ],
    [{"role": ("user", "assistant")[at % 2], "content": f"turn {at}"} for at in range(12)],
]
TEXTS = [
    "",
    "Hello there",
    "  two  spaces\n\ttab ",
    "\u4e2d\u6587 \U0001f600 na\u00efve",
    "<s>literal</s> <|end|> specials",
    "x" * 5000,
]


def folder(path: Path, kind: str = "byte_level", **config: Any) -> Path:
    (byte_level() if kind == "byte_level" else byte_fallback()).save(str(path / "tokenizer.json"))
    template = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | template | config
    (path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    (path / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 1}))
    return path


def transformers_tokenizer(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path)


def encode(tokenizer: ModelTokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    return asyncio.run(tokenizer.encode(text, add_special_tokens))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("bos", [None, True, False])
def test_texts_become_the_tokens_that_transformers_makes(tmp_path: Path, kind: str, bos: bool | None) -> None:
    ours = ModelTokenizer(folder(tmp_path, kind, add_bos_token=bos))
    theirs = transformers_tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            assert encode(ours, text, special) == theirs.encode(text, add_special_tokens=special), (text, special)
    ids = theirs.encode(TEXTS[3])
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special_tokens=True) == theirs.decode(ids)


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path, chat: list[dict[str, str]]) -> None:
    ours, theirs = ModelTokenizer(folder(tmp_path)), transformers_tokenizer(tmp_path)
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat, {}) == rendered
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert encode(ours, rendered, add_special_tokens=False) == ids


def test_the_demo_model_is_rendered_as_transformers_renders_it() -> None:
    ours, theirs = ModelTokenizer(DEMO_FOLDER), transformers_tokenizer(DEMO_FOLDER)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    rendered = ours.render_chat(chat, {})
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert encode(ours, rendered, False) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert encode(ours, "import asyncio\n") == theirs.encode("import asyncio\n")
    assert 5 in ours.facts.eos_token_ids


def test_the_template_file_wins_over_the_field_and_a_list_is_searched_for_default(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x"}]
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "field"}]
    folder(tmp_path, chat_template=templates)
    assert ModelTokenizer(tmp_path).render_chat(chat, {}) == "field"
    (tmp_path / "chat_template.jinja").write_text("file {{ enable_thinking }}")
    assert ModelTokenizer(tmp_path).render_chat(chat, {"enable_thinking": False}) == "file False"


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    folder(tmp_path, bos_token={"content": "<s>", "lstrip": False}, chat_template="{{ bos_token }}!")
    assert ModelTokenizer(tmp_path).render_chat([], {}) == "<s>!"


@pytest.mark.parametrize("kind", ["byte_level", "byte_level, tokens added", "demo"])
@pytest.mark.parametrize("keep_special_tokens", [False, True])
def test_any_tokens_of_a_byte_level_vocabulary_show_what_the_library_decodes_as_soon_as_it_is_sure(
    tmp_path: Path, kind: str, keep_special_tokens: bool
) -> None:
    if kind != "demo":
        folder(tmp_path)
    if kind == "byte_level, tokens added":
        more = Tokenizer.from_str(composed_digits().to_str())
        more.add_tokens(["\u0120in the alphabet", "\u2581not in it", "<0x41>", "\ufffd"])
        more.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ModelTokenizer(DEMO_FOLDER if kind == "demo" else tmp_path)
    size = tokenizer._tokenizer.get_vocab_size(with_added_tokens=True)
    random = Random(7)
    for _ in range(100):
        # Bytes of characters that are not whole are among the first ids, and so are special tokens.
        ids = [random.choice((random.randrange(size + 1), random.randrange(min(size, 260)))) for _ in range(80)]
        detokenizer, shown = tokenizer.detokenizer([1, 2], keep_special_tokens), ""
        for at, token_id in enumerate(ids, start=1):
            shown += detokenizer.push(token_id)
            whole = tokenizer.decode(ids[:at], keep_special_tokens)
            # Two: Python's decoder waits for the third byte of a surrogate, which is no character of UTF-8.
            assert whole in (shown, shown + "\ufffd", shown + "\ufffd\ufffd")
        assert shown + detokenizer.flush() == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=40))
def test_the_tokens_of_a_text_show_it_and_no_half_character(kind: str, text: str) -> None:
    tokenizer = _model(kind)
    ids = encode(tokenizer, text, False)
    detokenizer = tokenizer.detokenizer([], False)
    deltas = [*map(detokenizer.push, ids), detokenizer.flush()]
    assert "".join(deltas) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas)


@cache
def _model(kind: str) -> ModelTokenizer:
    with TemporaryDirectory() as name:
        return ModelTokenizer(folder(Path(name), kind))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ messages[0].content.nothing.at_all }}", "undefined|no attribute"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error_and_repeats_no_prompt(
    tmp_path: Path, template: str, says: str
) -> None:
    tokenizer = ModelTokenizer(folder(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequestError, match=says):
        tokenizer.render_chat([{"role": "user", "content": "secret words"}], {})


def test_a_template_that_quotes_the_prompt_in_its_error_is_not_quoted(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(folder(tmp_path, chat_template="{{ raise_exception('bad: ' + messages[0].content) }}"))
    with pytest.raises(InvalidRequestError) as raised:
        tokenizer.render_chat([{"role": "user", "content": "secret words"}], {})
    assert "secret" not in str(raised.value)


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ModelTokenizer(folder(tmp_path, chat_template=None)).render_chat([{"role": "user", "content": "x"}], {})


def test_token_bytes_are_the_bytes_of_the_text(tmp_path: Path) -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = ModelTokenizer(folder(tmp_path, kind))
        text = " Hello \u4e2d\U0001f600" if kind == "byte_level" else "Hello \u4e2d\U0001f600"
        data = b"".join(tokenizer.token_bytes(id) for id in encode(tokenizer, text, False))
        assert data.decode().strip() == text.strip()
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer.json", '{"version": "1.0"}', r"tokenizer\.json is not a usable tokenizer"),
        ("config.json", None, r"config\.json is missing"),
        ("config.json", "{", r"config\.json is not valid JSON"),
        ("config.json", "[]", r"config\.json must hold a JSON object"),
        ("config.json", '{"vocab_size": "many"}', r"config\.json: vocab_size"),
        ("config.json", '{"eos_token_id": "end"}', r"config\.json: eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', r"generation_config\.json: eos_token_id"),
        ("generation_config.json", '{"temperature": "hot"}', r"generation_config\.json: temperature"),
        ("tokenizer_config.json", '{"bos_token": 1}', r"tokenizer_config\.json: bos_token"),
        ("tokenizer_config.json", '{"chat_template": 1}', r"tokenizer_config\.json: chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": ""}]}', r"chat_template .*default"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', r"chat_template: .*line 1"),
        ("chat_template.jinja", "{{", r"chat_template\.jinja"),
    ],
)
def test_an_unusable_folder_is_refused_by_file_and_field(
    tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says):
        ModelTokenizer(tmp_path)


def test_ends_of_sequence_are_those_of_all_files(tmp_path: Path) -> None:
    folder(tmp_path, eos_token="<|end|>")
    assert ModelTokenizer(tmp_path).facts.eos_token_ids == (1, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1], "top_k": 20, "do_sample": true}')
    facts = ModelTokenizer(tmp_path).facts
    assert facts.eos_token_ids == (7, 1, 2)
    assert facts.sampling_defaults == {"top_k": 20}
