"""Starts a run from the weights of a Hugging Face folder.

Every tensor of the folder must be used and every parameter be loaded; anything else is an error.
Each rank reads only the slices that it holds. Weights are loaded before DeepSpeed takes them over.
If they are rounded to the run's dtype, the fp32 masters are loaded from the files afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.distributed.reshard import intervals_of, make_flat_shard
from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.errors import CheckpointError
from megatrain.models.config import TransformerConfig, differences, load_hf_config
from megatrain.models.init import initialize_parameter
from megatrain.models.lora import PREFIX as ADAPTER_PREFIX
from megatrain.optim.zero import ZeroOptimizer
from megatrain.optim.zero_state import Fragment
from megatrain.text import join_names

BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Masks and rotary frequencies that old versions of transformers saved; the config implies them."""

_CLASSIFIER_FIELDS = ("id2label", "label2id", "num_labels", "problem_type", "pad_token_id")
"""Fields of a config in which a classifier differs from its language model."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_MAX_LISTED = 8
"""Names of tensors in one error."""


class Pretrained:
    """The tensors of a Hugging Face folder, under the names of a model's parameters.

    Args:
        folder: the folder.
        architecture: the model to load.
        setting: the setting or argument that names the folder, for errors.

    Attributes:
        tensors: the folder's tensors; `bytes_read` counts what this rank has read.
    """

    def __init__(
        self,
        folder: Path | str,
        architecture: TransformerConfig,
        *,
        setting: str = "train.init_from",
    ) -> None:
        self.folder, self.tensors = folder, HFFolder(folder)
        self._tied = architecture.tied
        self._embedding, self._head = (
            f"{architecture.names[role].name}.weight" for role in ("embedding", "head")
        )
        self._classifier, self._setting = architecture.classifier, setting
        self._architecture = architecture

    def check(self, expected: Mapping[str, tuple[int, ...]], *, new_head: bool = True) -> None:
        """Raises CheckpointError unless the folder contains exactly the expected tensors.

        Reads no tensors except those of a tied head. With `new_head` a classifier may start from a
        language model, whose head is not used and which has no classification head.
        """
        name_map = self._name_map(expected)
        used = {name_map[name][0] for name in expected if name in name_map}
        if self._tied:
            used |= set(name_map.get(self._head, [])) & set(self.tensors.names())
        duplicates = sorted(other for name in expected for other in name_map.get(name, [])[1:])
        if self._classifier is not None and new_head:
            used |= {self._head} & set(self.tensors.names())  # the language model's head
        missing = [
            name
            for name in expected
            if name not in name_map and not (new_head and self._is_new(name))
        ]
        unexpected = [
            name
            for name in sorted(self.tensors.names())
            if name not in used and name not in duplicates and not BUFFERS.search(name)
        ]
        not_floats = [name for name in sorted(used) if self.tensors.dtype(name) not in _FLOATS]
        problems = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("both with and without the prefix", duplicates),
            _listed("of another shape", self._wrong_shapes(name_map, expected)),
            _listed("not floating point", not_floats),
        ]
        if any(problems):
            text = "; ".join(problem for problem in problems if problem)
            fix = {}
            if [name for name in expected if name not in name_map] == [self._head]:
                fix = {"model.tie_word_embeddings": True}
                text += "; a tied head requires model.tie_word_embeddings=true"
            raise CheckpointError(
                f"{self._setting}={self.folder} does not fit the model: {text}", fix=fix
            )
        self._check_tied(name_map)

    def describe_differences(self, config: Mapping[str, Any]) -> list[str]:
        """Returns a sentence on each field in which the run's model differs from the folder's."""
        if not (Path(self.folder) / "config.json").is_file():
            return []
        stored = json.loads(json.dumps(load_hf_config(str(self.folder)).to_dict(), default=str))
        return [
            f"model.{name} is {new} and {self._setting} was saved with {old}"
            for name, old, new in differences(stored, dict(config))
            if name not in _CLASSIFIER_FIELDS
        ]

    def load_weights(self, stage: nn.Module, seed: int) -> None:
        """Loads the stage's parameters; parameters that the folder lacks are initialised."""
        with torch.no_grad():
            for spec, parameter in parameters(stage):
                self.load_parameter(spec, parameter, seed)

    def load_parameter(self, spec: ShardSpec, parameter: nn.Parameter, seed: int) -> None:
        """Loads one parameter, or initialises it if the folder lacks it; call without gradients."""
        name = self._name_of(spec.name)
        if name is None:
            initialize_parameter(spec, parameter, seed)
            return
        parameter.zero_()
        part = spec.local_view(parameter)
        for region in spec.slices():
            self.tensors.copy(name, region.full, to=part[region.shard])

    def load_master_weights(self, optimizer: ZeroOptimizer) -> None:
        """Loads the bits of masters that rounding the weights lost; all ranks call it together."""
        if optimizer.dtype == torch.float32:
            return
        with torch.no_grad():
            for fragment in optimizer.state.fragments():
                name = self._name_of(fragment.sharding.name)
                if name is not None and self.tensors.dtype(name) != optimizer.dtype:
                    self._load_master(fragment, name)
        optimizer.state.copy_masters_to_weights()

    def _load_master(self, fragment: Fragment, name: str) -> None:
        """Copies intervals of full rows in the parameter's orientation."""
        spec, master = fragment.sharding, fragment.tensors["master"]
        full = self.tensors.view(name)
        full = full.t() if spec.transposed else full
        row = full[0].numel()
        piece = make_flat_shard(spec, fragment.shape, fragment.start, master.numel())
        for start, local, length in zip(*intervals_of(piece), strict=True):
            first = start // row
            rows = full[first : -(-(start + length) // row)].reshape(-1)
            offset = start - first * row
            master[local : local + length].copy_(rows[offset : offset + length])
            self.tensors.bytes_read += int(length) * full.element_size()
        self.tensors.release(name)

    def _name_map(self, expected: Iterable[str]) -> dict[str, list[str]]:
        """Returns the folder's names of each parameter; see `stored_names`."""
        name_map: dict[str, list[str]] = {}
        for name in {*expected, self._head}:
            base = name.removeprefix(ADAPTER_PREFIX)  # of a classifier trained beside adapters
            if found := stored_names(base, self._architecture, self.tensors):
                name_map[name] = found
        if self._tied and self._embedding not in name_map and self._head in name_map:
            name_map[self._embedding] = name_map[self._head]
        return name_map

    def _name_of(self, name: str) -> str | None:
        """Returns the folder's name of a parameter; None if the folder lacks it."""
        return next(iter(self._name_map([name]).get(name, [])), None)

    def _is_new(self, name: str) -> bool:
        """Returns True for a parameter of the classification head."""
        return self._classifier is not None and name.rpartition(".")[0] == self._classifier.name

    def _wrong_shapes(
        self, name_map: dict[str, list[str]], expected: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        found = {
            name: self.tensors.shape(name_map[name][0]) for name in expected if name in name_map
        }
        return [
            f"{name} ({_shape(shape)} in the folder, {_shape(expected[name])} by the config)"
            for name, shape in found.items()
            if shape != expected[name]
        ]

    def _check_tied(self, name_map: dict[str, list[str]]) -> None:
        """Raises CheckpointError if a tied head is stored and differs from the embedding."""
        if not self._tied or self._head not in name_map:
            return
        if name_map[self._head] == name_map[self._embedding]:
            return
        names = [name_map[name][0] for name in (self._head, self._embedding)]
        head, embedding = (self.tensors.view(name) for name in names)
        # Blocks of rows bound the memory.
        is_equal = head.shape == embedding.shape and all(
            torch.equal(a, b) for a, b in zip(head.split(4096), embedding.split(4096), strict=True)
        )
        for name in names:
            self.tensors.release(name)
        if not is_equal:
            raise CheckpointError(
                f"{self._setting}={self.folder} does not fit the model, which ties {self._head} to "
                f"{self._embedding}: the folder's differ; set model.tie_word_embeddings=false to "
                "train both",
                fix={"model.tie_word_embeddings": False},
            )


def stored_names(
    name: str, architecture: TransformerConfig, stored: Container[str] | HFFolder
) -> list[str]:
    """Returns the names under which a folder has a tensor of the model, more than one if ambiguous.

    Candidates are the tensor's name, the name without the base model's prefix, and a former name.
    """
    prefix = architecture.names["embedding"].name.partition(".")[0] + "."
    former = {new: old for old, new in architecture.renamed_weights.items()}
    candidates = (name, name.removeprefix(prefix), former.get(name, name))
    return [candidate for candidate in dict.fromkeys(candidates) if candidate in stored]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _listed(kind: str, names: list[str]) -> str:
    return f"{kind}: {join_names(names, limit=_MAX_LISTED)}" if names else ""
