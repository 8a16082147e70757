"""`megatrain check CONFIG --nodes 4 --gpus-per-node 8`: finds all errors of a run before it starts.

Needs no GPU, takes seconds and changes nothing on disk.
"""

from __future__ import annotations

import argparse
import sys

from megatrain.cli.arguments import positive_int
from megatrain.config.issues import IssueCollector
from megatrain.config.loader import read
from megatrain.distributed import device
from megatrain.errors import UserError

GPU_MEMORY_GIB = {
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
    "L40S": 48,
    "A40": 48,
    "L4": 24,
    "A10G": 24,
    "T4": 16,
}
"""By GPU, the GB of the maker's data sheet, which are close to the GiB that the driver reports."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the YAML"
    )
    parser.add_argument(
        "--nodes", type=positive_int, default=1, metavar="N", help="machines (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=positive_int,
        metavar="G",
        help="ranks per machine, one per GPU (default: the ranks of one replica)",
    )
    parser.add_argument("--cpu", action="store_true", help="train on CPUs")
    parser.add_argument(
        "--gpu-memory",
        type=_gib,
        metavar="GIB",
        help=f"memory of a GPU, in GiB or by name: {', '.join(GPU_MEMORY_GIB)}",
    )
    parser.add_argument(
        "--verb",
        choices=["pretrain", "finetune"],
        help="command to check (default: finetune if the data or the task require it)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plan and all errors of a run; returns 1 if there is one."""
    issues = IssueCollector()
    config, errors = read(args.config, args.overrides)
    for error in errors:
        issues.add(error)
    if args.nodes > 1 and args.gpus_per_node is None:
        raise UserError("--nodes requires --gpus-per-node, the number of ranks per machine")
    ranks = args.gpus_per_node or config.local_world_size
    on_gpu = not args.cpu and (
        args.gpus_per_node is not None or args.gpu_memory is not None or device.has_gpu()
    )
    device.set_environment(1)
    # Imports torch, so it comes after the environment is set.
    from megatrain.planner.run_spec import Cluster
    from megatrain.training.run_plan import check_run
    from megatrain.training.select_task import select_command, select_task

    command = args.verb or select_command(config)
    cluster = Cluster(args.nodes, ranks, "cuda" if on_gpu else "cpu", args.gpu_memory)
    print(f"megatrain {command} {args.config}")
    for line in check_run(config, select_task(config, command), cluster, issues):
        print(line)
    return _report(issues, config.run_name)


def _report(issues: IssueCollector, run_name: str) -> int:
    sys.stdout.flush()  # before standard error, for readers of both
    for warning in issues.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for issue in issues.errors:
        print(f"error: {issue}", file=sys.stderr)
    count = len(issues.errors)
    if count:
        print(f"{run_name}: {count} error{'s' if count > 1 else ''}", file=sys.stderr)
        return 1
    print(f"{run_name}: no errors found")
    return 0


def _gib(text: str) -> float:
    if text.upper() in GPU_MEMORY_GIB:
        return GPU_MEMORY_GIB[text.upper()]
    try:
        size = float(text.lower().removesuffix("gib"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of GiB or one of {', '.join(GPU_MEMORY_GIB)}"
        )
    return size
