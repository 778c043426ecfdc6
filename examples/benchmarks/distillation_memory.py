"""Peak memory and time of the loss of distillation, chunked, beside the textbook formula, each in a process.

The logits of student and teacher and the gradient are in the numbers of both; what differs are the float32 copies.

python examples/benchmarks/distillation_memory.py --tokens 4096 --vocabulary 32768
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional

from hf_mcsmoe.training.token_losses import token_losses

KINDS = ("nothing", "textbook", "chunked")
TEMPERATURE = 2.0


def textbook(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student = logits.float()
    task = functional.cross_entropy(student, targets, reduction="sum")
    log_q = functional.log_softmax(student / TEMPERATURE, -1)
    p = functional.softmax(teacher.float() / TEMPERATURE, -1)
    return task + TEMPERATURE**2 * functional.kl_div(log_q, p, reduction="sum")


def chunked(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    task, kl = token_losses(logits, targets, teacher, temperature=TEMPERATURE)
    return task.sum() + TEMPERATURE**2 * kl.sum()


def measure(kind: str, tokens: int, vocabulary: int, dtype: str) -> None:
    """Print peak memory in bytes, seconds, the loss and the sum of the gradient's absolute values."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        made = torch.empty(tokens, vocabulary, dtype=getattr(torch, dtype))
        for row in made:  # without a float32 copy of it all
            row.copy_(torch.randn(vocabulary, generator=generator))
        return made

    logits, teacher = draw().requires_grad_(), draw()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    start, loss, size = time.perf_counter(), 0.0, 0.0
    if kind != "nothing":
        value = {"textbook": textbook, "chunked": chunked}[kind](logits, targets, teacher) / tokens
        value.backward()
        seconds, loss = time.perf_counter() - start, value.item()
        size = sum(row.float().abs().sum().item() for row in logits.grad)
    else:
        logits.grad = torch.ones_like(logits)
        seconds = time.perf_counter() - start
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds, loss, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kind", choices=KINDS, help="measure this one here")
    args = parser.parse_args()
    if args.kind:
        measure(args.kind, args.tokens, args.vocabulary, args.dtype)
        return
    options = ["--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary), "--dtype", args.dtype]
    rows = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[kind] = [float(word) for word in output.split()]
    size = args.tokens * args.vocabulary * torch.empty(0, dtype=getattr(torch, args.dtype)).element_size()
    print(
        f"{args.tokens} tokens, {args.vocabulary} tokens in the vocabulary, {args.dtype}: logits {size / 1e6:.0f} MB"
    )
    print("| loss | peak above logits and gradient | seconds | value | gradient |")
    print("|---|---:|---:|---:|---:|")
    for kind in KINDS[1:]:
        peak, seconds, loss, gradient = rows[kind]
        print(f"| {kind} | {(peak - rows['nothing'][0]) / 1e6:.0f} MB | {seconds:.1f} | {loss:.6f} | {gradient:.4f} |")


if __name__ == "__main__":
    main()
