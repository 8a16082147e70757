"""Starts a run from a Hugging Face folder: every tensor of it is used and every parameter filled, or the run stops.

Each rank reads the slices that it holds and no more. Weights are filled before DeepSpeed takes them over; where they are then
rounded to the run's dtype, the fp32 masters are filled once more from what the file holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.distributed.reshard import intervals_of, make_flat_shard
from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig, differences, load_hf_config
from megatrain.models.init import initialize_parameter
from megatrain.models.lora import PREFIX as ADAPTED
from megatrain.ops.dtypes import DTYPES
from megatrain.optim.zero import Fragment, ZeroOptimizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""What old versions of transformers saved beside the weights: masks and rotary frequencies, which follow from the config."""

_OF_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "pad_token_id")
"""What a classifier made of a language model has of its own."""

_SHOWN = 8
"""Names of tensors in one error."""


class Pretrained:
    """The tensors of a folder under the names that the model gives them.

    Attributes:
        tensors: the folder; its `bytes_read` counts what this rank has read.
    """

    def __init__(
        self,
        folder: Path | str,
        architecture: TransformerConfig,
        *,
        called: str = "train.init_from",
    ) -> None:
        self.folder, self.tensors = folder, HFFolder(folder)
        self._tied = architecture.tied
        self._embedding, self._head = (
            f"{architecture.names[role].name}.weight" for role in ("embedding", "head")
        )
        self._classifier, self._called = architecture.classifier, called
        self._architecture = architecture

    def check(self, wanted: Mapping[str, tuple[int, ...]], *, new_head: bool = True) -> None:
        """Refuse the folder unless it holds exactly these tensors in these shapes. Reads no tensor but those of a tied head.

        With `new_head` a classifier may be made from a language model, whose head is not used and which has no classifier's.
        """
        homes = self._homes(wanted)
        used = {theirs for ours in wanted for theirs in homes.get(ours, [])[:1]}
        if self._tied:
            used |= set(homes.get(self._head, [])) & set(self.tensors.names())
        twice = sorted(theirs for ours in wanted for theirs in homes.get(ours, [])[1:])
        if self._classifier is not None and new_head:
            used |= {self._head} & set(
                self.tensors.names()
            )  # of the language model that the classifier is made from
        problems = [
            _listed(
                "missing",
                (
                    name
                    for name in wanted
                    if name not in homes and not (new_head and self._is_new(name))
                ),
            ),
            _listed(
                "unexpected",
                (
                    n
                    for n in sorted(self.tensors.names())
                    if n not in used and n not in twice and not BUFFERS.search(n)
                ),
            ),
            _listed("there twice, with the prefix and without", twice),
            _listed("of another shape", self._misshapen(homes, wanted)),
            _listed(
                "not of floating point",
                (n for n in sorted(used) if self.tensors.dtype(n) not in _FLOATS),
            ),
        ]
        words = "; ".join(problem for problem in problems if problem)
        if words:
            raise CheckpointError(
                f"{self._called}={self.folder} does not fit the model: {words}{self._hint(homes, wanted)}"
            )
        self._check_tied(homes)

    def notes(self, config: PreTrainedConfig) -> list[str]:
        """In which fields a run's own `model` is not the folder's, in words for the user; tensors alone do not tell."""
        if not (Path(self.folder) / "config.json").is_file():
            return []
        there = json.loads(json.dumps(load_hf_config(str(self.folder)).to_dict(), default=str))
        return [
            f"model.{name} is {here} and {self._called} was saved with {theirs}"
            for name, theirs, here in differences(there, config)
            if name not in _OF_LABELS
        ]

    def load_weights(self, stage: nn.Module, seed: int) -> None:
        """Fill each parameter with its part of the folder's tensor; one that the folder does not name is initialised."""
        with torch.no_grad():
            for declaration, parameter in parameters(stage):
                self.load_parameter(declaration, parameter, seed)

    def load_parameter(self, declaration: ShardSpec, parameter: nn.Parameter, seed: int) -> None:
        """The same of one parameter; without gradients."""
        home = self._home(declaration.name)
        if home is None:
            initialize_parameter(declaration, parameter, seed)
        else:
            parameter.zero_()
            self._fill_part(declaration, parameter, home)

    def load_master_weights(self, zero: ZeroOptimizer) -> None:
        """Give the masters what the weights lost when they were rounded; all ranks call it together."""
        dtype = DTYPES[zero.config.train.dtype]
        if dtype == torch.float32:
            return
        with torch.no_grad():
            for fragment in zero.fragments():
                home = self._home(fragment.sharding.name)
                if home is not None and self.tensors.dtype(home) != dtype:
                    self._fill_master(fragment, home)
        zero.copy_masters_to_weights()

    def _fill_part(self, declaration: ShardSpec, parameter: Tensor, home: str) -> None:
        part = declaration.part_of(parameter)
        for region in declaration.regions():
            self.tensors.copy(home, region.whole, to=part[region.part])

    def _fill_master(self, fragment: Fragment, home: str) -> None:
        """Row by row in the parameter's orientation, whole rows in one go where they are neighbours."""
        s, master = fragment.sharding, fragment.tensors["master"]
        whole = self.tensors.view(home)
        whole = whole.t() if s.transposed else whole
        row = whole[0].numel()
        for start, local, length in zip(
            *intervals_of(make_flat_shard(s, fragment.shape, fragment.start, master.numel())),
            strict=True,
        ):
            first = start // row
            rows = whole[first : -(-(start + length) // row)].reshape(-1)
            master[local : local + length].copy_(
                rows[start - first * row : start - first * row + length]
            )
            self.tensors.bytes_read += int(length) * whole.element_size()

    def _homes(self, wanted: Iterable[str]) -> dict[str, list[str]]:
        """The names in the folder of each tensor of the model: as it is called, without the base model's prefix, or as it was called."""
        homes: dict[str, list[str]] = {}
        for ours in {*wanted, self._head}:
            bare = ours.removeprefix(ADAPTED)  # of a classifier that is trained beside adapters
            if found := stored_names(bare, self._architecture, self.tensors):
                homes[ours] = found
        if self._tied and self._embedding not in homes and self._head in homes:
            homes[self._embedding] = homes[self._head]
        return homes

    def _is_new(self, name: str) -> bool:
        """Whether a tensor is a classifier's own, which starts as it is initialised where the folder has none."""
        return self._classifier is not None and name.rpartition(".")[0] == self._classifier.name

    def _home(self, ours: str) -> str | None:
        return next(iter(self._homes([ours]).get(ours, [])), None)

    def _misshapen(
        self, homes: dict[str, list[str]], wanted: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        there = {ours: self.tensors.shape(homes[ours][0]) for ours in wanted if ours in homes}
        return [
            f"{ours} ({_times(shape)} there, {_times(wanted[ours])} by the config)"
            for ours, shape in there.items()
            if shape != wanted[ours]
        ]

    def _hint(self, homes: dict[str, list[str]], wanted: Mapping[str, tuple[int, ...]]) -> str:
        if [name for name in wanted if name not in homes] == [self._head]:
            return "; a head that is the embedding wants model.tie_word_embeddings=true"
        return ""

    def _check_tied(self, homes: dict[str, list[str]]) -> None:
        """A head saved beside the embedding that it is tied to has to be the same; compared a slab of rows at a time."""
        if not self._tied or self._head not in homes or homes[self._head] == homes[self._embedding]:
            return
        head, embedding = (
            self.tensors.view(homes[name][0]) for name in (self._head, self._embedding)
        )
        if head.shape != embedding.shape or not all(
            torch.equal(a, b) for a, b in zip(head.split(4096), embedding.split(4096), strict=True)
        ):
            raise CheckpointError(
                f"{self._called}={self.folder} does not fit the model: its {self._head} is not its {self._embedding}, and the "
                "model ties them; set model.tie_word_embeddings=false to train both"
            )


def stored_names(
    name: str, architecture: TransformerConfig, stored: Container[str] | HFFolder
) -> list[str]:
    """Returns the names under which a folder has a tensor of the model, more than one if ambiguous.

    Candidates are the tensor's name, the name without the base model's prefix, and a former name.
    """
    prefix = architecture.names["embedding"].name.partition(".")[0] + "."
    former = {new: old for old, new in architecture.former_names.items()}
    candidates = (name, name.removeprefix(prefix), former.get(name, name))
    return [candidate for candidate in dict.fromkeys(candidates) if candidate in stored]


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _listed(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{what}: {', '.join(found[:_SHOWN])}{more}" if found else ""
