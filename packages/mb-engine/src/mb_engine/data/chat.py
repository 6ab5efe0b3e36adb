# SPDX-License-Identifier: Apache-2.0
"""Chat templates: conversations as the text that a tokenizer's own template makes of them.

Templates are Jinja, as Hugging Face tokenizers keep them in ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from mb_engine.data.errors import DataError
from mb_engine.data.tokenizer_libraries import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_config import TokenizerConfig

# What {% generation %} puts around what it holds; no text has these two code points.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")

Message = dict[str, Any]
Span = tuple[int, int]


@frozen(kw_only=True)
class Conversation:
    """A rendered conversation.

    Attributes:
        text: What the template makes of it.
        turns: Where in the text what the assistant writes is, for each of its messages in order;
            with the mark that ends the turn, without white space after that.
        messages: Which message each of ``turns`` is.
    """

    text: str
    turns: list[Span]
    messages: list[int]


@frozen(kw_only=True, eq=False)
class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: Jinja.
        special_tokens: Variables of the template, such as ``bos_token``.
    """

    source: str
    special_tokens: Mapping[str, str] = field(factory=dict)
    _template: Any = field(init=False, repr=False)

    @_template.default
    def _compile(self) -> Any:
        jinja2 = require("jinja2", setting="a chat template")
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid at its line {error.lineno} ({error.message});"
                " correct it, or name another in tokenizer.chat_template"
            ) from error

    def __reduce__(self) -> Any:
        return _remake, (self.source, dict(self.special_tokens))

    @property
    def marks_turns(self) -> bool:
        """Whether the template itself says, with ``{% generation %}``, what assistants write."""
        return "{% generation" in self.source or "{%- generation" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return *messages* as text.

        Args:
            messages: Each with ``role`` and ``content``, and whatever else the template reads.
            tools: JSON schemas of the functions that the assistant may call.
            add_generation_prompt: End with what precedes an answer.

        Raises:
            DataError: If the template refuses them.
        """
        return self._render(messages, tools, prompt=add_generation_prompt)[0]

    def conversation(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None
    ) -> Conversation:
        """Return *messages* as text, and where in it the assistant speaks.

        With ``{% generation %}`` the template says where; without, a turn is what its message adds
        to the messages before it and the generation prompt.

        Raises:
            DataError: If the template refuses them, or writes earlier messages otherwise when more
                follow, so that what a message adds is not known.
        """
        text, marked = self._render(messages, tools)
        answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if self.marks_turns:
            if len(marked) != len(answers):
                raise DataError(
                    f"the chat template marks {len(marked)} answers of {len(answers)} assistant"
                    " messages; put {% generation %} around each"
                )
            return Conversation(text=text, turns=marked, messages=answers)
        turns = []
        for i in answers:
            before = self._render(messages[:i], tools, prompt=True)[0] if i else ""
            after = self._render(messages[: i + 1], tools)[0]
            if not text.startswith(after) or not after.startswith(before):
                raise DataError(
                    f"the chat template writes the first {i + 1} messages otherwise when more"
                    " follow, so where the answer is cannot be told; put {% generation %} around"
                    " answers in the template, or set dataset.loss_on=all"
                )
            turns.append((len(before), max(len(before), len(after.rstrip()))))
        return Conversation(text=text, turns=turns, messages=answers)

    def _render(
        self, messages: Sequence[Message], tools: Any, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            made: str = self._template.render(
                **self.special_tokens,
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template can fail in any way
            reason = str(error).strip() or type(error).__name__
            raise DataError(f"the chat template refuses the messages ({reason})") from error
        return _unmarked(made)


def load_chat_template(config: TokenizerConfig) -> ChatTemplate | None:
    """Return the template that ``tokenizer.chat_template`` names or the tokenizer brings; else None.

    Raises:
        DataError: If the file is missing, or the template cannot be compiled.
    """
    folder = _folder(config.tokenizer_model)
    settings = _json(folder / "tokenizer_config.json") if folder else {}
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in settings.items()
        if name in _TOKENS and value is not None
    }
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        if not path.is_file():
            raise DataError(
                f"tokenizer.chat_template={config.chat_template} does not exist; name a file with"
                " a Jinja template"
            )
        return ChatTemplate(source=path.read_text(encoding="utf-8"), special_tokens=tokens)
    if folder and (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return ChatTemplate(source=source, special_tokens=tokens)
    own: Any = settings.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = next((entry["template"] for entry in own if entry["name"] == "default"), None)
    return ChatTemplate(source=own, special_tokens=tokens) if own else None


def _folder(model: str | None) -> Path | None:
    if model is None:
        return None
    path = Path(model).expanduser()
    return path if path.is_dir() else path.parent


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); correct it") from error
    return found


def _environment() -> Any:
    """Return what templates are compiled in; the same filters and tests as transformers offers."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012 as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return _OPEN + str(caller()) + _CLOSE

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005
    return environment


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes HTML, and no model was trained on that.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> str:
    import jinja2

    raise jinja2.TemplateError(message)


def _remake(source: str, special_tokens: dict[str, str]) -> ChatTemplate:
    return ChatTemplate(source=source, special_tokens=special_tokens)


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Return *text* without marks, and where they were."""
    if _OPEN not in text:
        return text, []
    head, *parts = text.split(_OPEN)
    spans, length, pieces = [], len(head), [head]
    for part in parts:
        inside, _, outside = part.partition(_CLOSE)
        spans.append((length, length + len(inside)))
        length += len(inside) + len(outside)
        pieces += [inside, outside]
    return "".join(pieces), spans
