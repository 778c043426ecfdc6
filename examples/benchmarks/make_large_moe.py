"""Write a random Qwen3-MoE-like checkpoint of any size, in bfloat16, sharded, tensor by tensor.

Memory: one tensor and 64 MB of random numbers, of which each tensor is a passage. Time: that of the disk. Experts are
stored one by one, as on the Hub.

    python examples/benchmarks/make_large_moe.py --output /tmp/large --gigabytes 12
"""

import argparse
import json
import struct
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

BYTES_PER_NUMBER = 2
POOL = 2**24  # random numbers; more than a tensor of an expert has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="decides the number of layers")
    parser.add_argument("--layers", type=int, help="instead of --gigabytes")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384, help="of one expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--shard-gigabytes", type=float, default=0.2)
    args = parser.parse_args()
    config = configuration(args)
    args.output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.output)
    total = write_shards(shapes(config), args.output, int(args.shard_gigabytes * 1e9))
    print(f"{total / 1e9:.2f} GB in {args.output}: {config.num_hidden_layers} layers")


def configuration(args: argparse.Namespace) -> Qwen3MoeConfig:
    """With as many layers as the size asks for."""
    per_layer = 3 * args.experts * args.hidden_size * args.width * BYTES_PER_NUMBER
    layers = args.layers or max(1, round(args.gigabytes * 1e9 / per_layer))
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=args.vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        moe_intermediate_size=args.width,
        num_hidden_layers=layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 256),
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=min(8, args.experts // 2),
        tie_word_embeddings=False,
    )


def shapes(config: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the format of the Hub, in the order of the layers."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def write_shards(shapes: dict[str, tuple[int, ...]], folder: Path, shard_bytes: int) -> int:
    """Write random tensors; returns their bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * BYTES_PER_NUMBER
        if size + num_bytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(folder / file, {name: shapes[name] for name in names}, pool, generator)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: torch.Tensor, generator: torch.Generator) -> int:
    """One safetensors file, its tensors taken from random places of `pool`, one at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * BYTES_PER_NUMBER
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                scale = 1.0 if "embed" in name else shape[-1] ** -0.5
                count = torch.Size(shape).numel()
                start = int(torch.randint(POOL - min(count, POOL) + 1, (1,), generator=generator))
                numbers = pool if count <= POOL else pool.repeat(-(-count // POOL))
                tensor = (numbers[start : start + count] * scale).to(torch.bfloat16).reshape(shape)
            file.write(tensor.view(torch.uint8).numpy().tobytes())
    return end


if __name__ == "__main__":
    main()
