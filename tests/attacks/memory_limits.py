"""Calls in a process that may take only so much more memory: each gives the right result or a Python exception.

"auto" may raise only where plain PyTorch would with 8 MiB less, which is what the kernels work in.

Every round is a process with an address space of its own size, forked from one that has loaded everything. It packs no
weight of the round before the limit is set, calls "auto" and "cpu", forward and backward, several times over, and
compares with what plain PyTorch gave before the limit.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys

from attacks.attack import TESTS, Counts, death_of

NAME = "memory-limits"
TITLE = "the operator and a layer under many limits of the address space"
SHORT, LONG = 4, 500

MEBIBYTE = 1 << 20

PARENT = """
import json, mmap, os, resource, sys, tempfile

import torch

from peftkernels import lora_linear
from peftkernels.nn import LoRALinear


# What the kernels work in beside results and packs, which plain PyTorch does without.
WORKING = 8 << 20


def attack(extra, n, k, rows, threads, seed, dtype):
    torch.manual_seed(seed)
    dtype = getattr(torch, dtype)
    torch.set_num_threads(threads)
    x, grad = torch.randn(rows, k).to(dtype).requires_grad_(), torch.randn(rows, n).to(dtype)
    layer = LoRALinear(torch.nn.Linear(k, n, dtype=dtype), r=4, lora_alpha=8, impl="eager")
    torch.nn.init.normal_(layer.lora_B.weight)
    weight, bias = layer.base_layer.weight, layer.bias
    lora_A, lora_B = layer.lora_A.weight, layer.lora_B.weight

    def operator(impl):
        y = lora_linear(x, weight, lora_A, lora_B, bias=bias, scaling=2.0, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), grad)]

    def in_layer(impl):
        layer.impl = impl
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), grad)]

    def eager_serves(call):
        try:
            with mmap.mmap(-1, WORKING):
                call("eager")
        except (RuntimeError, MemoryError, OSError):
            return False
        return True

    exact = operator("eager")
    # Threads are there before the limit is set: that there is no memory for a thread ends a process of OpenMP.
    lora_linear(torch.randn(300, 64), torch.randn(512, 64), torch.randn(2, 64), torch.randn(512, 2), impl="cpu")
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    counts, faults = {"right": 0, "refused": 0}, []
    for turn in range(6):
        for call, impl in ((operator, "auto"), (operator, "cpu"), (in_layer, "auto"), (in_layer, "cpu")):
            resource.setrlimit(resource.RLIMIT_AS, (taken + extra, resource.RLIM_INFINITY))
            try:
                found = call(impl)
            except (RuntimeError, MemoryError) as error:
                counts["refused"] += 1
                if impl == "auto" and eager_serves(call):
                    faults.append(f"{call.__name__}, turn {turn}: auto raises where eager serves: {error}")
                continue
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            tolerance = 1e-3 if dtype is torch.float32 else 0.05
            scales = [max(float(right.abs().max()), 1e-6) for right in exact]
            worst = max(float((a.float() - b.float()).abs().max()) / s for a, b, s in zip(found, exact, scales))
            counts["right"] += worst <= tolerance
            if not worst <= tolerance:
                faults.append(f"{call.__name__}, {impl}, turn {turn}: off by {worst:.2g}")
    return counts, faults


for case in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            json.dump(attack(*case), answer)
            answer.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer.seek(0)
        print(json.dumps([status, json.loads(answer.read()) if status == 0 else None]), flush=True)
"""


def _case(dice: random.Random) -> tuple[int, int, int, int, int, int, str]:
    n, k = dice.choice(((1024, 1024), (3000, 1100), (512, 4096)))
    # From less than a call's results take to more than both packs.
    extra = int(dice.choice((0.01, 0.1, 0.4, 0.9, 1.1, 1.6, 2.2, 4.0)) * 4 * n * k) + dice.randrange(MEBIBYTE)
    rows, threads = dice.choice((1, 40, 300)), dice.choice((1, 2))
    return extra, n, k, rows, threads, dice.randrange(2**31), dice.choice(("float32", "bfloat16"))


def run(rounds: int, seed: int) -> Counts:
    """See the top of this module."""
    counts = Counts()
    dice = random.Random(seed)
    cases = [_case(dice) for _ in range(rounds)]
    command = [sys.executable, "-c", PARENT, json.dumps(cases)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=60 + 60 * rounds, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) < rounds:
        counts.faults.append(f"seed {seed}: {len(answers)} of {rounds} rounds were run: {done.stderr[-500:]}")
    for turn, ((status, found), case) in enumerate(zip(answers, cases, strict=False)):
        repeat = f"round {turn} of seed {seed}, (extra, n, k, rows, threads, seed, dtype) = {case}"
        counts.tried["processes"] += 1
        if found is None:
            counts.faults.append(f"{repeat}: {death_of(status) or f'exit code {status}'}: {done.stderr[-300:]}")
            continue
        kinds, faults = found
        counts.tried.update({f"calls {kind}": number for kind, number in kinds.items()})
        counts.faults += [f"{repeat}: {fault}" for fault in faults]
    return counts
