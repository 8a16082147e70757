"""Access to masters and moments that DeepSpeed's ZeRO optimizer holds, by tensor name and slice.

Uses private parts of DeepSpeed 0.19; tests/optim/test_zero.py compares them with plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatrain.distributed.sharding import ShardSpec, shard_spec
from megatrain.optim.param_groups import STATES


class Fragment(NamedTuple):
    """Consecutive elements of one parameter whose optimizer state this rank holds.

    Attributes:
        sharding: declaration of the parameter.
        parameter: the parameter.
        shape: its shape on this rank, padding included; under ZeRO 3 the parameter itself is empty.
        start: position of the first element in the flattened parameter.
        tensors: writable views, each fp32 [n]: `master` and the moments of the update rule.
    """

    sharding: ShardSpec
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]


class ZeroState:
    """The masters and moments of this rank.

    Args:
        optimizer: DeepSpeed's optimizer.
        rule: name of the update rule.
        zero_stage: 0 to 3.
        trained: the parameters that are trained.
        data_rank: this rank's index among the replicas.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        rule: str,
        zero_stage: int,
        trained: Sequence[nn.Parameter],
        data_rank: int,
    ) -> None:
        self._optimizer = optimizer
        self._zero_stage = zero_stage
        self._trained = trained
        self._data_rank = data_rank
        self._moments = STATES[rule]
        self._create_moments(counts_steps=rule in ("adam", "adamw"))

    def _create_moments(self, *, counts_steps: bool) -> None:
        """Creates the moments before the first step, so that saving and loading find them."""
        inner = self._optimizer.optimizer
        if self._zero_stage == 3:
            masters = self._optimizer.fp32_partitioned_groups_flat
        else:
            masters = [flat for group in inner.param_groups for flat in group["params"]]
        for flat in masters:
            for name in self._moments:
                inner.state[flat][name] = torch.zeros_like(flat.detach())
            if counts_steps:
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                inner.state[flat]["step"] = step

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of `Fragment.tensors`."""
        return ("master", *self._moments)

    @property
    def updates(self) -> int:
        """Updates applied so far, as the update rule's bias correction counts them."""
        states = self._optimizer.optimizer.state.values()
        return int(max((float(state["step"]) for state in states if "step" in state), default=0))

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(count))

    def fragments(self) -> Iterator[Fragment]:
        """Yields this rank's fragments in the order of the parameters."""
        if self._zero_stage == 3:
            yield from self._zero3_fragments()
            return
        has_bf16_groups = hasattr(self._optimizer, "bf16_groups")
        half_groups = (
            self._optimizer.bf16_groups if has_bf16_groups else self._optimizer.bit16_groups
        )
        inner = self._optimizer.optimizer
        for half_group, group in zip(half_groups, inner.param_groups, strict=True):
            (flat,) = group["params"]
            moments = {n: inner.state[flat][n] for n in self._moments if n in inner.state[flat]}
            for parameter in half_group:
                mapping = parameter._hp_mapping
                if mapping is None or not shard_spec(parameter).name:
                    continue
                address = mapping.hp_fragment_address
                tensors = {
                    name: tensor.narrow(0, address.start, address.numel)
                    for name, tensor in ({"master": flat.detach()} | moments).items()
                }
                start = mapping.lp_fragment_address.start
                shape = tuple(parameter.shape)
                yield Fragment(shard_spec(parameter), parameter, shape, start, tensors)

    def _zero3_fragments(self) -> Iterator[Fragment]:
        keys = {"master": None, **{name: name for name in self._moments}}
        view = self._optimizer._get_fp32_opt_state_partition
        parameter: Any
        for parameter in self._trained:
            size = parameter.ds_tensor.ds_numel
            start = self._data_rank * size
            count = max(0, min(size, parameter.ds_numel - start))
            if count:
                tensors = {
                    name: view(parameter, True, key)[0].detach().view(-1)[:count]
                    for name, key in keys.items()
                }
                shape = tuple(parameter.ds_shape)
                yield Fragment(shard_spec(parameter), parameter, shape, start, tensors)

    def copy_masters_to_weights(self) -> None:
        """Rounds the masters to the model's weights on all replicas; needed after loading."""
        if self._zero_stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self._optimizer.update_lp_params()

    def full_weights(self, parameter: nn.Parameter) -> Tensor:
        """Returns this tensor rank's weights; under ZeRO 3 a collective of the replicas."""
        if self._zero_stage != 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
