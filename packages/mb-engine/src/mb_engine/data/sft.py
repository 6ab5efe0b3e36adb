# SPDX-License-Identifier: Apache-2.0
"""From a record of SFT data to its token ids and which of them are learnt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, field, frozen

from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config.sections import SFTDatasetConfig
    from numpy.typing import NDArray

    from mb_engine.data.chat import ChatTemplate, Conversation


@frozen(kw_only=True, eq=False)
class Sample:
    """A sample of SFT data.

    Attributes:
        ids: int32 ``[n]``; the model is given all but the last and learns to predict all but the
            first.
        learnt: bool ``[n]``: which ids count for the loss when they are predicted.
    """

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]


@define(kw_only=True)
class Counts:
    """What became of the records of one source.

    Attributes:
        records: Read, of this part of the split.
        bad: That could not be used.
        truncated: Samples that were cut.
        too_long: Samples left out for their length.
        nothing_learnt: Samples left out because no token of them counts.
        samples: Kept.
        tokens: Of these samples.
        loss_tokens: Of these, that count for the loss.
    """

    records: int = 0
    bad: int = 0
    truncated: int = 0
    too_long: int = 0
    nothing_learnt: int = 0
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0


@define(kw_only=True)
class SampleMaker:
    """Turns records into samples.

    Attributes:
        settings: Of the data set; its ``seq_length`` is resolved.
        tokenizer: See ``data.tokenizers``.
        template: For chats; None where there is none.
    """

    settings: SFTDatasetConfig
    tokenizer: Any
    template: ChatTemplate | None = field(default=None)

    def make(self, record: Mapping[str, Any]) -> Sample:
        """Return the sample of *record*, however long.

        Raises:
            DataError: If it lacks a field, or the chat template refuses it; gives the reason alone.
        """
        settings = self.settings
        if settings.messages_key in record:
            return self._chat(record[settings.messages_key], record.get(settings.tools_key))
        prompt, completion = (
            self._text(record, key) for key in (settings.prompt_key, settings.completion_key)
        )
        before = self.tokenizer.encode(prompt)
        after = self.tokenizer.encode(completion)
        if settings.append_eod:
            after = [*after, self.tokenizer.eod]
        learnt = np.ones(len(before) + len(after), dtype=bool)
        if settings.loss_on != "all":
            learnt[: len(before)] = False
        return Sample(ids=np.array([*before, *after], dtype=np.int32), learnt=learnt)

    def fit(self, sample: Sample, counts: Counts) -> Sample | None:
        """Return *sample* cut to ``seq_length``, None if it is left out; counts what happened.

        Raises:
            DataError: If it is too long and ``truncation`` is ``"error"``.
        """
        limit = int(self.settings.seq_length or 0) + 1
        size = len(sample.ids)
        if size > limit:
            how = self.settings.truncation
            if how == "error":
                raise DataError(
                    f"{size - 1} tokens are more than dataset.seq_length={limit - 1}, and"
                    " dataset.truncation=error"
                )
            if how == "skip":
                counts.too_long += 1
                return None
            kept = slice(0, limit) if how == "right" else slice(size - limit, size)
            sample = Sample(ids=sample.ids[kept], learnt=sample.learnt[kept])
        if not sample.learnt[1:].any():
            counts.nothing_learnt += 1
            return None
        counts.truncated += size > limit
        counts.samples += 1
        counts.tokens += len(sample.ids) - 1
        counts.loss_tokens += int(sample.learnt[1:].sum())
        return sample

    def _text(self, record: Mapping[str, Any], key: str) -> str:
        text = record.get(key)
        if not isinstance(text, str):
            found = "is missing" if key not in record else f"is a {type(text).__name__}, not text"
            names = ", ".join(map(str, record)) or "none"
            raise DataError(f"field {key!r} {found} (fields: {names})")
        return text

    def _chat(self, messages: Any, tools: Any) -> Sample:
        if self.template is None:
            raise DataError(
                "a chat, but the tokenizer has no chat template; give one in"
                " tokenizer.chat_template"
            )
        encode = getattr(self.tokenizer, "encode_with_offsets", None)
        if encode is None:
            raise DataError(
                f"a chat, but {type(self.tokenizer).__name__} has no encode_with_offsets, by which"
                " answers are found in it"
            )
        messages = _checked(messages)
        if isinstance(tools, str):
            tools = _tools(tools)
        if self.settings.loss_on == "all":
            ids, _ = encode(self.template.render(messages, tools=tools))
            return Sample(ids=np.array(ids, dtype=np.int32), learnt=np.ones(len(ids), dtype=bool))
        conversation = self.template.conversation(messages, tools=tools)
        ids, offsets = encode(conversation.text)
        learnt = np.zeros(len(ids), dtype=bool)
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        for start, end in self._learnt_turns(conversation, messages):
            # a token without characters of its own belongs to what begins where it stands
            last = np.maximum(places[:, 1], places[:, 0] + 1)
            learnt |= (places[:, 0] < end) & (last > start)
        return Sample(ids=np.array(ids, dtype=np.int32), learnt=learnt)

    def _learnt_turns(
        self, conversation: Conversation, messages: list[dict[str, Any]]
    ) -> list[tuple[int, int]]:
        turns = conversation.turns
        if self.settings.loss_on == "last_turn":
            return turns[-1:]
        if self.settings.loss_on == "completion":
            asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
            said = zip(conversation.messages, turns, strict=True)
            return [turn for i, turn in said if i > asked]
        return turns


def _tools(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise DataError(f"the tools are not JSON ({error})") from error


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError("the messages are not a list with at least one message")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {i} is not an object with a role")
        if not message.keys() & {"content", "tool_calls"}:
            raise DataError(f"message {i} has neither content nor tool_calls")
    return messages
