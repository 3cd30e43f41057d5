"""Templates: what they see, what they may not do, and where their errors are reported."""

from __future__ import annotations

import pytest
from policy_kit import MakePolicy

from apex_build.errors import ApexError, TemplateFailed, TemplateUnsafe
from apex_build.gguf_model.catalogue import Model
from apex_build.policy.render import render
from apex_build.policy.sandbox import exactly


def rendered(make_policy: MakePolicy, model: Model, text: str, **files: str) -> list[str]:
    lines = render(make_policy(text, **files), {}, model, {"blk.0.attn_qkv.weight"})
    return [line for line, _ in lines if line]


def refused(make_policy: MakePolicy, model: Model, text: str, error: type[ApexError], **files: str) -> str:
    with pytest.raises(error) as caught:
        rendered(make_policy, model, text, **files)
    assert caught.value.exit_code == {TemplateFailed: 63, TemplateUnsafe: 64}[error]
    return caught.value.message


def test_what_a_template_sees(make_policy: MakePolicy, small: Model) -> None:
    text = """{{ model.architecture }} {{ model.trunk_layers }} {{ model.head_layers }}
{{- ' %d %d' % (model.n_expert, model.n_expert_used) }}
{% set shown = ("blk.0.attn_qkv.weight", "blk.4.ffn_up_exps.weight",
                "token_embd.weight", "blk.6.nextn.eh_proj.weight") %}
{% for t in tensors if t.name in shown %}
{{ t.name }} {{ t.layer }} {{ t.role }} {{ t.shape | join("x") }} {{ t.type }} {{ t.depth }} {{ t.draft_head }}
{{- " " }}{{ t.quantizable }}
{% endfor %}
{% for layer in layers %}
{{ layer.number }} {{ layer.depth }} {{ layer.draft_head }} {{ layer.tensors | length > 10 }}
{% endfor %}"""
    assert rendered(make_policy, small, text) == [
        "qwen35moe 6 1 8 2",
        "token_embd.weight None embedding 256x2048 F16 None False False",
        "blk.0.attn_qkv.weight 0 attention 256x512 F16 0 False True",
        "blk.4.ffn_up_exps.weight 4 routed 256x256x8 F16 1 False False",
        "blk.6.nextn.eh_proj.weight 6 nextn 512x256 F16 None True False",
        *(f"{layer} {depth} False True" for layer, depth in enumerate([0, 1, 2, 2, 1, 0])),
        "6 None True True",
    ]


def test_exactly_matches_one_name() -> None:
    assert exactly("blk.3.attn_q.weight") == r"^blk\.3\.attn_q\.weight$"
    assert exactly("a+b[0]") == r"^a\+b\[0\]$"


def test_a_template_of_another_plugin_and_one_of_its_own_can_be_included(make_policy: MakePolicy, small: Model) -> None:
    text = (
        '{% include "own.jinja" %}{% set head = {"routed": "A", "shared": "B", "attention": "C", "eh_proj": "D", '
        '"other": "E"} %}\n'
    )
    text += '{% include "apex/head.jinja" %}'
    assert rendered(make_policy, small, text, own="# mine\n") == ["# mine", "# the draft head"]


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ tensors.__class__ }}",
        "{{ tensors[0].__dataclass_fields__ }}",
        "{{ tensors[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ('%s' | format(1)).__class__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{% if ''.__class__ is defined %}x{% endif %}",
        "{% include '../../etc/passwd' %}",
        "{% include '/etc/passwd' %}",
        "{% include 'apex/../apex/head.jinja' %}",
        "{% extends '../mine/mine.jinja' %}",
        "{% import 'mine/../../secret.jinja' as x %}",
    ],
)
def test_leaving_the_sandbox_is_refused_with_the_line(make_policy: MakePolicy, small: Model, text: str) -> None:
    message = refused(make_policy, small, f"# first\n\n{text}\n", TemplateUnsafe)
    assert "mine.jinja:3: " in message


@pytest.mark.parametrize("text", ["{{ lipsum.__globals__ }}", "{{ joiner }}", "{{ open('x') }}", "{{ self.x }}"])
def test_objects_that_are_not_there(make_policy: MakePolicy, small: Model, text: str) -> None:
    message = refused(make_policy, small, f"\n{text}", TemplateFailed)
    assert "mine.jinja:2: " in message
    assert "is undefined" in message or "has no" in message


def test_changing_what_the_template_was_given_is_refused(make_policy: MakePolicy, small: Model) -> None:
    assert "access to attribute 'append' of a 'list'" in refused(
        make_policy, small, "{% set x = [] %}{% set _ = x.append(1) %}", TemplateUnsafe
    )


def test_a_link_out_of_the_plugin_is_refused(make_policy: MakePolicy, small: Model) -> None:
    policy = make_policy("{% include 'out.jinja' %}")
    assert policy.template is not None
    (policy.template.parent / "out.jinja").symlink_to("/etc/passwd")
    with pytest.raises(TemplateUnsafe, match=r"mine\.jinja:1: .*link that leads out"):
        render(policy, {}, small, ())


def test_only_templates_can_be_included(make_policy: MakePolicy, small: Model) -> None:
    message = refused(make_policy, small, "{% include 'apex/plugin.py' %}", TemplateFailed)
    assert (
        "there is no template 'apex/plugin.py'; there are: apex/balanced.jinja" in message
        and "mine/mine.jinja" in message
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a\n{% for t in tensors %}\n{{ t.name }\n{% endfor %}", 3, "unexpected '}'"),
        ("\n\n{% if %}", 3, "Expected an expression"),
        ("\n{% endfor %}", 2, "Encountered unknown tag 'endfor'"),
        ("\n\n\n{{ modle.name }}", 4, "'modle' is undefined"),
        ("\n{{ tensors[0].rule }}", 2, "has no attribute 'rule'"),
        ("\n{{ 1 / 0 }}", 2, "ZeroDivisionError: division by zero"),
        ("\n{{ x | nofilter }}", 2, "No filter named 'nofilter'"),
    ],
)
def test_mistakes_are_named_with_file_and_line(
    make_policy: MakePolicy, small: Model, text: str, line: int, says: str
) -> None:
    message = refused(make_policy, small, text, TemplateFailed)
    assert f"mine.jinja:{line}: " in message and says in message


def test_a_mistake_in_an_included_template_is_named_there(make_policy: MakePolicy, small: Model) -> None:
    message = refused(make_policy, small, "{% include 'own.jinja' %}", TemplateFailed, own="# one\n# two\n{{ gone }}")
    assert "own.jinja:3: 'gone' is undefined" in message


@pytest.mark.slow
@pytest.mark.slow
def test_endless_output_and_loops_end(make_policy: MakePolicy, small: Model) -> None:
    for text, says in [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
            "more than 4 MiB",
        ),
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10 ** 11 }}", "memory"),
        ("{{ '%99999999999d' | format(1) }}", ""),
        ("{% include 'mine.jinja' %}", "recursion"),
    ]:
        assert says in refused(make_policy, small, text, TemplateFailed)


@pytest.mark.slow
def test_endless_computing_ends(make_policy: MakePolicy, small: Model) -> None:
    message = refused(
        make_policy,
        small,
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        TemplateFailed,
    )
    assert "more computing than is allowed" in message or "not done within" in message


def test_rendered_lines_know_their_place(make_policy: MakePolicy, small: Model) -> None:
    text = "# head\n\n{% for n in [1, 2] %}\na{{ n }}=Q4_K\n{% endfor %}\n{% include 'own.jinja' %}\nlast=Q8_0\n"
    lines = render(make_policy(text, own="own=Q6_K\n"), {}, small, ())
    places = {line: where.rpartition("/")[2] for line, where in lines if line}
    assert places == {
        "# head": "mine.jinja:1",
        "a1=Q4_K": "mine.jinja:4",
        "a2=Q4_K": "mine.jinja:4",
        "own=Q6_K": "own.jinja:1",
        "last=Q8_0": "mine.jinja:7",
    }
