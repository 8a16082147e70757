"""Preference pairs: a prompt with a chosen and a rejected answer, as conversations and as samples.

| `chosen` and `rejected`          | `prompt`                                             |
|----------------------------------|------------------------------------------------------|
| text, or an assistant's messages | text or messages that both answer                    |
| full conversations               | ignored: they must be equal up to their last message |

A pair takes two consecutive positions, the chosen answer first. A microbatch of even size therefore
never splits a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatrain.data.chat_format import BadSample, Conversation, read_conversation
from megatrain.data.gpt_dataset import Sample
from megatrain.data.sft_dataset import SFTDataset
from megatrain.data.shuffle import Shuffle


def read_pair(record: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """Returns the conversations that end with the chosen and with the rejected answer.

    Raises:
        BadSample: the record is not valid, or the answers are equal or to different prompts.
    """
    present = {name for name, value in record.items() if value is not None}
    if not {"chosen", "rejected"} <= present:
        raise BadSample(
            f"missing fields: it has {', '.join(record) or 'none'}; "
            "required: prompt, chosen and rejected"
        )
    chosen, rejected = _side(record, "chosen"), _side(record, "rejected")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise BadSample(
            "chosen and rejected differ before their last message, so they do not answer the same "
            "prompt"
        )
    if chosen.messages[-1] == rejected.messages[-1]:
        raise BadSample("chosen and rejected are the same answer")
    return chosen, rejected


def _side(record: Mapping[str, Any], name: str) -> Conversation:
    value, tools = record[name], record.get("tools")
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and first.get("role") != "assistant":
        return _read(name, {"messages": value, "tools": tools})
    if record.get("prompt") is None:
        raise BadSample(
            f"missing fields: it has {', '.join(record)}; "
            f'"{name}" without a prompt must be a full conversation'
        )
    fields = {"prompt": record["prompt"], "completion": value, "system": record.get("system")}
    return _read(name, {**fields, "tools": tools})


def _read(name: str, record: dict[str, Any]) -> Conversation:
    try:
        return read_conversation(record)
    except BadSample as error:
        raise BadSample(f'"{name}": {str(error).replace("completion", name)}') from None


class PreferenceDataset(SFTDataset):
    """Sequences of pairs, chats 2i and 2i + 1 of a prepared dataset. Epochs shuffle the pairs."""

    def fetch(self, position: int) -> Sample:
        """Returns the sequence at `position`: the chosen answer of a pair if it is even."""
        if self.limit is not None and position >= self.limit:
            return self._make_sample([])
        epoch, within = divmod(position, self.samples_per_epoch)
        pair, side = self._order(epoch)(within // 2), within % 2
        return self._make_sample([self.chat(2 * pair + side)])

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch // 2, key=("pairs", self._seed, epoch))
