# SPDX-License-Identifier: Apache-2.0
"""Chat templates against transformers' own rendering."""

from __future__ import annotations

import pickle

import pytest
from chat_styles import STYLES, save_tokenizer, template
from mb_config import TokenizerConfig
from mb_engine.data import DataError
from mb_engine.data.chat import ChatTemplate, load_chat_template

TURNS = [
    {"role": "user", "content": "what is two and two?"},
    {"role": "assistant", "content": "four, said the cat"},
    {"role": "user", "content": "and the mat?"},
    {"role": "assistant", "content": "  it is é on the <mat> "},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & é"}}]


@pytest.fixture(scope="module", params=STYLES)
def folder(request, tmp_path_factory):
    pytest.importorskip("transformers")
    return save_tokenizer(tmp_path_factory.mktemp("chat") / request.param, request.param)


def template_of(folder, **settings):
    return load_chat_template(
        TokenizerConfig(tokenizer_type="huggingface", tokenizer_model=str(folder), **settings)
    )


class TestRendering:
    @pytest.mark.parametrize("tools", [None, TOOLS])
    @pytest.mark.parametrize("prompt", [False, True])
    def test_is_that_of_transformers(self, folder, tools, prompt):
        from transformers import AutoTokenizer

        oracle = AutoTokenizer.from_pretrained(folder)
        expected = oracle.apply_chat_template(
            TURNS, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        made = template_of(folder)
        assert made.render(TURNS, tools=tools, add_generation_prompt=prompt) == expected

    def test_turns_hold_what_the_assistant_says_and_the_mark_that_ends_it(self, folder):
        made = template_of(folder).conversation(TURNS)
        assert made.messages == [1, 3]
        for (start, end), answer in zip(
            made.turns, ["four, said the cat", "é on the"], strict=True
        ):
            said = made.text[start:end]
            assert answer in said
            assert said.endswith(("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>"))
            assert "user" not in said

    def test_marks_in_the_template_say_the_same(self, folder):
        plain = template_of(folder)
        tagged = ChatTemplate(
            source=template(folder.name, tagged=True), special_tokens=plain.special_tokens
        )
        assert tagged.marks_turns
        assert tagged.conversation(TURNS) == plain.conversation(TURNS)


class TestRefusals:
    def test_a_template_may_refuse_roles(self):
        made = ChatTemplate(source=template("mistral"), special_tokens={})
        with pytest.raises(DataError, match=r"refuses the messages \(Only user and assistant"):
            made.render([{"role": "tool", "content": ""}])

    def test_a_template_that_rewrites_earlier_turns_needs_marks(self):
        source = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
        with pytest.raises(DataError, match=r"first 2 messages otherwise when more follow"):
            ChatTemplate(source=source).conversation(TURNS)

    def test_each_answer_needs_its_marks(self):
        source = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
        with pytest.raises(DataError, match=r"marks 1 answers of 2"):
            ChatTemplate(source=source).conversation(TURNS)

    def test_a_broken_template_is_named_with_its_line(self, tmp_path):
        path = tmp_path / "broken.jinja"
        path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
        with pytest.raises(DataError, match=r"not valid at its line 2"):
            load_chat_template(TokenizerConfig(chat_template=str(path)))

    def test_templates_cannot_reach_python(self):
        with pytest.raises(DataError, match=r"unsafe"):
            ChatTemplate(source="{{ messages.__class__.__mro__ }}").render(TURNS)


class TestSources:
    def test_a_file_replaces_the_tokenizers_own(self, tmp_path):
        folder = save_tokenizer(tmp_path / "t")
        (tmp_path / "own.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
        made = template_of(folder, chat_template=str(tmp_path / "own.jinja"))
        assert made.render(TURNS) == "what is two and two?</s>"
        with pytest.raises(DataError, match=r"chat_template=.*does not exist"):
            template_of(folder, chat_template="absent.jinja")

    def test_a_folder_may_keep_it_beside(self, tmp_path):
        folder = save_tokenizer(tmp_path)
        (folder / "chat_template.jinja").write_text("beside")
        assert template_of(folder).render(TURNS) == "beside"

    def test_bytes_have_none(self):
        assert load_chat_template(TokenizerConfig()) is None

    def test_it_travels_to_other_processes(self, tmp_path):
        made = template_of(save_tokenizer(tmp_path, "zephyr"))
        assert pickle.loads(pickle.dumps(made)).render(TURNS) == made.render(TURNS)
