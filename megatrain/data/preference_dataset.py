"""Records with a prompt, a chosen and a rejected answer to pairs of conversations, and pairs to training samples.

| `chosen` and `rejected`            | `prompt`                                                                        |
|------------------------------------|---------------------------------------------------------------------------------|
| text, or an assistant's messages   | text or messages; what both answer                                              |
| whole conversations                | not needed, and not read: they are alike up to their last message               |

A pair takes two neighbouring positions, chosen first, so that a microbatch of even size never splits one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatrain.data.chat_format import BadSample, Conversation, read_conversation
from megatrain.data.gpt_dataset import Sample
from megatrain.data.sft_dataset import SFTDataset
from megatrain.data.shuffle import Shuffle


def read_pair(record: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """Return the conversations that end with the chosen and with the rejected answer; raises BadSample."""
    given = {name for name, value in record.items() if value is not None}
    if not {"chosen", "rejected"} <= given:
        raise BadSample(
            f"missing fields: it has {', '.join(record) or 'none'}, and prompt, chosen and rejected are needed"
        )
    chosen, rejected = _side(record, "chosen"), _side(record, "rejected")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise BadSample(
            "chosen and rejected differ before their last message: they do not answer the same prompt"
        )
    if chosen.messages[-1] == rejected.messages[-1]:
        raise BadSample("chosen and rejected are the same answer, and there is nothing to prefer")
    return chosen, rejected


def _side(record: Mapping[str, Any], name: str) -> Conversation:
    value, tools = record[name], record.get("tools")
    if (
        isinstance(value, list)
        and value
        and isinstance(value[0], dict)
        and value[0].get("role") != "assistant"
    ):
        return _named(name, {"messages": value, "tools": tools})
    if record.get("prompt") is None:
        raise BadSample(
            f'missing fields: it has {", ".join(record)}, and "{name}" without a prompt must be a whole conversation'
        )
    return _named(
        name,
        {
            "prompt": record["prompt"],
            "completion": value,
            "system": record.get("system"),
            "tools": tools,
        },
    )


def _named(name: str, record: dict[str, Any]) -> Conversation:
    try:
        return read_conversation(record)
    except BadSample as error:
        raise BadSample(f'"{name}": {str(error).replace("completion", name)}') from None


class PreferenceDataset(SFTDataset):
    """The sequences of pairs, chats 2i and 2i + 1 of a prepared data set; epochs order the pairs."""

    def fetch(self, position: int) -> Sample:
        """Return the sequence at `position`: of a pair the chosen answer where it is even."""
        if self.limit is not None and position >= self.limit:
            return self._sample([])
        epoch, within = divmod(position, self.samples_per_epoch)
        pair, side = self._order(epoch)(within // 2), within % 2
        return self._sample([self.chat(2 * pair + side)])

    def _make_order(self, epoch: int) -> Shuffle:
        return Shuffle(self.samples_per_epoch // 2, key=("pairs", self._seed, epoch))
