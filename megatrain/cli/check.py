"""`megatrain check CONFIG --nodes 4 --gpus-per-node 8`: whether a run can be started there, before the queue: no GPU, and seconds."""

from __future__ import annotations

import argparse
import sys

from megatrain.config.fixes import IssueCollector
from megatrain.config.loader import Config, read
from megatrain.distributed import device
from megatrain.errors import UserError

GPUS = {
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
"""GiB: what makers' data sheets call GB is nearly what their drivers show."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings laid over the YAML"
    )
    parser.add_argument(
        "--nodes", type=_positive, default=1, metavar="N", help="machines (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=_positive,
        metavar="G",
        help="ranks on each, one for a GPU (default: one replica's ranks)",
    )
    parser.add_argument("--cpu", action="store_true", help="the ranks train on CPUs")
    parser.add_argument(
        "--gpu-memory",
        type=_memory,
        metavar="GIB",
        help=f"of a GPU, in GiB or by its name: {', '.join(GPUS)}",
    )
    parser.add_argument(
        "--verb",
        choices=["pretrain", "finetune"],
        help="what is to be done with the config (default: finetune where its data or task are finetuning's)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, print, and return 1 where anything is wrong."""
    findings = IssueCollector()
    config, wrong = read(args.config, args.overrides)
    for error in wrong:
        findings.add(error)
    if args.nodes > 1 and args.gpus_per_node is None:
        raise UserError("--nodes needs --gpus-per-node: how many ranks each machine has")
    ranks = args.gpus_per_node or config.model_ranks * (config.parallel.data or 1)
    on_gpu = not args.cpu and (
        args.gpus_per_node is not None or args.gpu_memory is not None or device.has_gpu()
    )
    device.set_environment(1)
    # Imports torch, so it comes after the environment is set.
    from megatrain.training.loop import command_of, task_of
    from megatrain.training.preflight import preflight
    from megatrain.training.suggest import Cluster

    place, verb = (
        Cluster(args.nodes, ranks, "cuda" if on_gpu else "cpu", args.gpu_memory),
        args.verb or command_of(config),
    )
    print(f"megatrain {verb} {args.config}")
    for line in preflight(config, task_of(config, verb), place, findings):
        print(line)
    return _say(findings, config)


def _say(findings: IssueCollector, config: Config) -> int:
    sys.stdout.flush()  # before what goes to standard error
    for warning in findings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for finding in findings.errors:
        print(
            f"error: {finding.text}" + (f"\n  paste: {finding.paste}" if finding.paste else ""),
            file=sys.stderr,
        )
    count = len(findings.errors)
    if not count:
        print(f"{config.run_name}: nothing is wrong")
    else:
        print(f"{config.run_name}: {count} error{'s' if count > 1 else ''}", file=sys.stderr)
    return int(bool(count))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _memory(text: str) -> float:
    if text.upper() in GPUS:
        return GPUS[text.upper()]
    try:
        size = float(text.lower().removesuffix("gib"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of GiB nor one of {', '.join(GPUS)}"
        )
    return size
