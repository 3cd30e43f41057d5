"""A model's chat template is untrusted: it can render conversations and do nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from counted import counted

from apex_build.calibration.chat import ChatTemplate, chat_template, render, try_render
from apex_build.errors import ChatTemplateFailed
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Document
from apex_build.plugins import load_plugins

HELLO = Document("chat", messages=({"role": "user", "content": "hello"},), origin="set:1")


def rendered(text: str, *documents: Document) -> list[str | None]:
    return render(ChatTemplate(text, "model.gguf", {"bos_token": "<s>", "eos_token": "</s>"}), documents or (HELLO,))


def test_a_conversation_with_tools_and_reasoning_as_the_model_writes_it(testbed: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": "ü <b>"}}}
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    )
    (text,) = render(chat_template(model), [Document("tools", messages=messages, tools=(tool,))])
    assert text is not None
    assert "<think>\nI add.\n</think>" in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "text": "ü <b>"}}\n</tool_call>' in text
    assert "<tool_response>\n2\n</tool_response>" in text and text.endswith("2<|im_end|>\n")


def test_special_tokens_and_the_date_are_there_and_fixed() -> None:
    assert rendered("{{ bos_token }}{{ strftime_now('%d.%m.%Y') }}{{ messages[0].content }}{{ eos_token }}") == [
        "<s>01.01.2026hello</s>"
    ]


def test_what_transformers_offers_a_template() -> None:
    keys = "{{ {'b': 1, 'a': [2, 3]} | tojson(separators=(',', ':'), sort_keys=true) }}"
    assert rendered(keys) == ['{"a":[2,3],"b":1}']
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == ["hello!"]


def test_a_mistake_of_the_template_is_not_blamed_on_a_conversation() -> None:
    with pytest.raises(ChatTemplateFailed) as caught:
        rendered("{% for %}")
    assert "set:1" not in caught.value.message


def test_a_conversation_that_the_template_refuses_is_left_out() -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ "
        "messages[0].content }}"
    )
    system = Document("chat", messages=({"role": "system", "content": "be good"},))
    assert rendered(refusing, system, HELLO) == [None, "hello"]


ENDLESS = "more computing|not done"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox forbids"),
        ("{{ messages.__class__.__init__.__globals__ }}", "sandbox forbids"),
        pytest.param(
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            ENDLESS,
            marks=pytest.mark.slow,
        ),
        ("{{ 'x' * 10**11 }}", "memory"),
        ("{% for %}", "line 1"),
        ("{{ nothing.at.all }}", "UndefinedError.*set:1"),
    ],
)
def test_a_template_that_fails_or_tries_to_leave_is_named(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex_build.calibration import chat

    if said == ENDLESS:  # elsewhere a loaded machine may take long to start the child
        monkeypatch.setattr(chat, "_WALL_SECONDS", 8.0)
    with pytest.raises(ChatTemplateFailed, match=f"(?s)chat template of model.gguf: .*({said})"):
        rendered(template)


def test_a_model_without_a_template_needs_one(testbed: Path, tmp_path: Path) -> None:
    from gguf_edit import copy

    bare = copy(testbed, tmp_path / "bare.gguf", keys={"tokenizer.chat_template": None})
    model = read_model(bare, load_plugins().role_of)
    with pytest.raises(ChatTemplateFailed, match="no chat template") as caught:
        chat_template(model)
    assert "--chat-template FILE" in str(caught.value.hint)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert render(chat_template(model, tmp_path / "mine.jinja"), [HELLO]) == ["hello!"]


def test_a_template_that_writes_without_end_is_ended() -> None:
    with counted() as work, pytest.raises(ChatTemplateFailed, match="many times what it is given"):
        rendered(
            "{% for n in range(90000) %}{{ 'x' * 2000 }}{% endfor %}",
            *[Document("a", messages=({"role": "user", "content": "b"},))] * 3,
        )
    assert work.read < 32 << 20, "it would write 540 MB"


def test_where_a_template_raised_is_named_by_line_and_message() -> None:
    template = ChatTemplate(
        "{%- macro say(m) -%}\n{{ m.content + 1 }}\n{%- endmacro -%}\n{% for message in messages %}\n"
        "{% if message.role == 'narrator' %}{{ raise_exception('no narrator') }}{% endif %}\n"
        "{% if message.role == 'user' %}{{ say(message) }}{% endif %}{% endfor %}",
        "model.gguf",
        {},
    )
    hello, answer = {"role": "assistant", "content": "hello"}, {"role": "user", "content": "a"}
    failed = Document("chat", messages=(hello, answer), origin="set:7")
    refused = Document("chat", messages=(hello, hello, {"role": "narrator", "content": "b"}), origin="set:8")
    found = try_render(template, [failed, refused])
    assert [(one.line, one.message) for one in found] == [(2, 2), (5, 3)]
    assert found[1].words == "no narrator"
    assert found[1].where(refused) == "line 5 of the template, message 3 (narrator) of set:8"
    with pytest.raises(ChatTemplateFailed, match=r"TypeError: .*line 2 of the template, message 2 \(user\) of set:7"):
        render(template, [failed])


def test_special_tokens_that_the_model_has_are_given_and_no_others(testbed: Path, tmp_path: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    (tmp_path / "mine.jinja").write_text("{{ bos_token is defined }}{{ eos_token }}{{ pad_token }}")
    template = chat_template(model, tmp_path / "mine.jinja")
    assert render(template, [HELLO]) == ["False<|im_end|><|endoftext|>"]
