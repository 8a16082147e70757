"""Compares training steps with a plain transformers loop, and layouts with one process.

    python benchmarks/step.py one  [--dtype bf16] [--laps 7]
    python benchmarks/step.py two  [--dtype fp32] [--laps 5]

`one` compares in one process ours and the plain loop, each eager and compiled, and the GEMMs alone.
`two` compares 2 ranks of 1 thread with our own process of 2 threads.

Contenders run side by side and take turns, one lap each, so that other load affects all alike.
Ratios are medians of the laps' ratios. A lap is one optimizer step with clipping at 1. "share of
GEMM" is the model's FLOP/s over those of its matrix products alone, in the same run, dtype and
threads. On a GPU the model has a billion weights.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import traceback

MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
MODEL_ON_GPU = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
MICRO_BATCH = 4


def length(model):
    return model["max_position_embeddings"]


def random_tokens(model, count, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, model["vocab_size"], (MICRO_BATCH, length(model) + 1), generator=generator)
        for _ in range(count)
    ]


# -- contenders: each returns a function that runs one lap ----------------------------------------


def ours(model, dtype, accumulations, rank=0, world_size=1, compiled=False, **parallel):
    import torch

    from megatrain.config import loader as configuration
    from megatrain.data.dataloader import Batch
    from megatrain.distributed.mesh import make_mesh
    from megatrain.models.config import load_hf_config, read_config
    from megatrain.training.step_runner import StepRunner

    config = configuration.from_dict(
        {
            "model": model,
            "parallel": parallel,
            "data": {"sequence_length": length(model)},
            "train": {
                "steps": 10**6,
                "micro_batch_size": MICRO_BATCH,
                "global_batch_size": MICRO_BATCH * accumulations,
                "dtype": dtype,
                "compile": compiled,
            },
            "lr_schedule": {"name": "constant"},
            "optimizer": {"grad_clip": 1.0, "lr": 1e-4},
        }
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = make_mesh(
        rank,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=config.data_size(world_size),
    )
    runner = StepRunner(config, read_config(load_hf_config(model)), mesh, device)
    rows = random_tokens(model, accumulations, 0)[mesh.data.rank :: mesh.data.size]
    positions = torch.arange(length(model)).expand(MICRO_BATCH, -1)
    batches = [Batch(r[:, :-1], r[:, 1:], positions, torch.zeros_like(positions)) for r in rows]
    step = iter(range(1, 10**6))
    return lambda: runner.train_step(next(step), batches)


def bare(model, dtype, accumulations, compiled=False):
    """Makes a handwritten loop: the model in `dtype`, fused AdamW, clipping."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatrain.models.config import load_hf_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_config(load_hf_config(model)).to(
        device, torch.bfloat16 if dtype == "bf16" else torch.float32
    )
    network.train()
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    rows = [row.to(device) for row in random_tokens(model, accumulations, 0)]

    def lap():
        for row in rows:
            (forward(row[:, :-1], labels=row[:, :-1]).loss / accumulations).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lap


def gemms(model, dtype, accumulations):
    """Makes the matrix products of forward and backward of a microbatch; see `gemm_flops`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tokens = MICRO_BATCH * length(model)
    work = []
    for inn, out, times in shapes(model):
        x, w, g = (
            torch.randn(s, device=device, dtype=kind)
            for s in ((tokens, inn), (out, inn), (tokens, out))
        )
        work.append((x, w, g, times))

    def lap():
        for x, w, g, times in work:
            for _ in range(times):
                x @ w.t()
                g @ w
                g.t() @ x

    return lap


def shapes(model):
    """Returns (inputs, outputs, number) of the model's matrices."""
    hidden, inner, layers = (
        model["hidden_size"],
        model["intermediate_size"],
        model["num_hidden_layers"],
    )
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    return [
        (hidden, hidden, 2 * layers),
        (hidden, kv, 2 * layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
        (hidden, model["vocab_size"], 1),
    ]


def gemm_flops(model):
    return (
        6.0
        * MICRO_BATCH
        * length(model)
        * sum(inn * out * times for inn, out, times in shapes(model))
    )


# -- processes of contenders ----------------------------------------------------------------------


def serve(pipe, store, threads, rank, world_size, make, arguments):
    import torch
    import torch.distributed as dist

    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(threads)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        from megatrain.distributed.device import (
            disable_jit_extensions,
            free_memory,
            has_gpu,
            use_huge_pages,
        )

        if not has_gpu():
            os.environ["DS_ACCELERATOR"] = "cpu"
        disable_jit_extensions()
        if make is ours:
            if not has_gpu():  # as in every rank of a run
                use_huge_pages(free_memory(torch.device("cpu"), world_size))
            dist.init_process_group(
                "nccl" if has_gpu() else "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
            )
            arguments = {**arguments, "rank": rank, "world_size": world_size}
        lap = make(**arguments)
        pipe.send("ready")
        with contextlib.suppress(EOFError):
            laps(pipe, lap)
    except BaseException:
        pipe.send(traceback.format_exc())


def laps(pipe, lap):
    """Runs a lap for each message of the parent, until the parent has exited."""
    import torch

    from megatrain.distributed.device import has_gpu

    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        lap()
        if has_gpu():
            torch.cuda.synchronize()
        memory = (
            torch.cuda.max_memory_allocated()
            if has_gpu()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, memory))


class Contender:
    def __init__(self, name, make, folder, *, ranks=1, threads=2, tokens, **arguments):
        self.name, self.tokens, self.laps = name, tokens, []
        context = multiprocessing.get_context("spawn")
        store = os.path.join(folder, f"store-{name}".replace(" ", "-"))
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=serve,
                args=(there, store, threads, rank, ranks, make, arguments),
                daemon=True,
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        for pipe in self.pipes:
            self._take(pipe)

    def _take(self, pipe):
        answer = pipe.recv()
        if isinstance(answer, str) and answer != "ready":
            raise SystemExit(f"{self.name}:\n{answer}")
        return answer

    def lap(self, keep=True):
        for pipe in self.pipes:
            pipe.send(True)
        answers = [self._take(pipe) for pipe in self.pipes]
        if keep:
            self.laps.append(
                (max(a[0] for a in answers), sum(a[1] for a in answers), sum(a[2] for a in answers))
            )

    def median(self, index):
        return statistics.median(lap[index] for lap in self.laps)

    @property
    def rate(self):
        return self.tokens / self.median(0)


def race(contenders, laps):
    for contender in contenders:
        contender.lap(keep=False)
    for number in range(laps):
        for contender in contenders:
            contender.lap()
        print(
            f"lap {number + 1}/{laps}  "
            + "  ".join(f"{c.name} {c.tokens / c.laps[-1][0]:.0f}" for c in contenders),
            flush=True,
        )


def ratio(a, b, index=0):
    """Returns the throughput of a over that of b: median over laps."""
    return statistics.median(
        (a.tokens / x[index]) / (b.tokens / y[index]) for x, y in zip(a.laps, b.laps, strict=True)
    )


def table(contenders, base, gemm=None, model=None):
    from megatrain.models.config import load_hf_config
    from megatrain.models.counts import flops_per_token

    per_token = flops_per_token(load_hf_config(model), sequence_length=length(model))
    print(
        f"\n{'':24}{'tokens/s':>10}{'ratio':>8}{'ratio per CPU-s':>17}{'CPU-ms/token':>14}"
        f"{'share of GEMM':>15}{'peak GB':>9}"
    )
    for c in contenders:
        share = f"{c.rate * per_token / (gemm_flops(model) / gemm.median(0)):.2f}" if gemm else "-"
        print(
            f"{c.name:24}{c.rate:>10.0f}{ratio(c, base):>8.2f}{ratio(c, base, 1):>17.2f}"
            f"{c.median(1) / c.tokens * 1e3:>14.3f}"
            f"{share:>15}{c.median(2) / 1e9:>9.2f}"
        )
    if gemm:
        print(f"{'GEMMs alone':24}{gemm_flops(model) / gemm.median(0) / 1e9:>10.0f} GFLOP/s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["one", "two"])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled contenders")
    args = parser.parse_args()
    import torch

    model = MODEL_ON_GPU if torch.cuda.is_available() else MODEL
    common = {"model": model, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "one":
            tokens = 4 * MICRO_BATCH * length(model)
            plain = Contender(
                "bare transformers", bare, folder, tokens=tokens, accumulations=4, **common
            )
            mine = Contender("megatrain", ours, folder, tokens=tokens, accumulations=4, **common)
            gemm = Contender("GEMMs", gemms, folder, tokens=tokens, accumulations=4, **common)
            racers = [mine, plain]
            if not args.no_compile:
                both = {"tokens": tokens, "accumulations": 4, "compiled": True}
                racers.append(Contender("megatrain, train.compile", ours, folder, **both, **common))
                racers.append(Contender("bare, torch.compile", bare, folder, **both, **common))
            race([*racers, gemm], args.laps)
            table(racers, plain, gemm, model)
            if not args.no_compile:
                _, _, mine_compiled, bare_compiled = racers
                print(
                    f"megatrain / bare compiled: {ratio(mine, bare_compiled):.2f}; both "
                    f"compiled: {ratio(mine_compiled, bare_compiled):.2f}"
                )
        else:
            tokens = 16 * MICRO_BATCH * length(model)
            layouts = {
                "pipeline 2": {"pipeline": 2},
                "tensor 2": {"tensor": 2},
                "data 2, ZeRO 1": {"zero": 1},
            }
            one = Contender("one process", ours, folder, tokens=tokens, accumulations=16, **common)
            racers = [one] + [
                Contender(
                    name,
                    ours,
                    folder,
                    ranks=2,
                    threads=1,
                    tokens=tokens,
                    accumulations=16,
                    **common,
                    **settings,
                )
                for name, settings in layouts.items()
            ]
            race(racers, args.laps)
            table(racers, one, None, model)


if __name__ == "__main__":
    main()
