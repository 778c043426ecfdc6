"""Recover a compressed model with LoRA alone: adapters of a few hundred kilobytes, nothing else is trained.

The recipe:

1. `compress_moe` makes the small model; save it. It is the base model of the adapter from now on.
2. `lora_config(model, r=8)` finds what to adapt: the linear layers of the attention (`target_modules`), each expert
   by a pair of its own (`target_parameters`, for experts that are 3-D parameters), and the routers, which are small
   and trained whole (`modules_to_save`).
3. Train `get_peft_model(model, config)` with any Trainer; here `DistillationTrainer`, with the uncompressed model as
   teacher and `freeze_routers=False`, because the routers are among what recovers.
4. `save_pretrained` writes the adapter. Load it on the compressed model with `PeftModel.from_pretrained`, or
   `merge_and_unload` it into one: still a mapped checkpoint, its expert map untouched.

LoRA needs a larger learning rate than training all weights does. `target_parameters` takes no dropout. Decomposed and
ragged experts are adapted too, see `hf_mcsmoe.training.lora`. With the model and text that ship with the package,
about three minutes on one CPU core:

    python examples/lora_on_compressed.py --output recovered
"""

import argparse
import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

import hf_mcsmoe
from hf_mcsmoe import compress_moe, load_calibration
from hf_mcsmoe.evaluation import evaluate_model
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer, lora_config

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"
SEQUENCE_LENGTH, BATCH_SIZE = 256, 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"))
    parser.add_argument("--train-data", default=str(ASSETS / "calibration.jsonl"))
    parser.add_argument("--eval-data", default=str(ASSETS / "evaluation.jsonl"))
    parser.add_argument("--output", type=Path, required=True, help="compressed model, adapter and merged model")
    parser.add_argument("--preset", default="m-smoe")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def rows_of(file: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Packed rows of training text."""
    size = {"num_samples": count, "sequence_length": SEQUENCE_LENGTH}
    data = load_calibration(file, tokenizer, **size, held_out_fraction=0)
    return [row for batch in data.batches for row in batch.inputs["input_ids"].tolist()]


def train(peft_model: PeftModel, teacher: PreTrainedModel, rows: list[list[int]], options: argparse.Namespace) -> None:
    """Adapters and routers follow the teacher; everything else is frozen."""
    training = DistillationArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        freeze_routers=False,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        dataloader_pin_memory=False,
    )
    trainer = DistillationTrainer(
        model=peft_model,
        args=training,
        teacher=teacher,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
    )
    trainer.train()


@torch.no_grad()
def check_and_merge(peft_model: PeftModel, folder: Path, batch: dict[str, Tensor]) -> PreTrainedModel:
    """Load compressed model and adapter from disk, compare, and make one model of them."""
    base = AutoModelForCausalLM.from_pretrained(folder / "compressed")
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    expected = peft_model.eval()(**batch).logits
    print("the same from disk:", torch.equal(loaded(**batch).logits, expected))
    merged = loaded.merge_and_unload()
    print(f"merged: largest difference of a logit {(merged(**batch).logits - expected).abs().max():.1e}")
    return merged


def main() -> None:
    options = arguments()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    full = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    size = {"num_samples": options.eval_rows, "sequence_length": SEQUENCE_LENGTH}
    held_out = load_calibration(options.eval_data, tokenizer, **size)

    def loss_of(model: PreTrainedModel) -> float:
        return evaluate_model(model, {"held out": held_out}, progress=False).overall.loss

    compressed, adapter, merged = (options.output / name for name in ("compressed", "adapter", "merged"))
    model = copy.deepcopy(full)
    how = {"tokenizer": tokenizer, "output_dir": compressed, "progress": False}
    model = compress_moe(model, options.preset, calibration=options.train_data, **how)
    print(f"full {loss_of(full):.4f}, compressed {loss_of(model):.4f} nats per token")

    peft_model = get_peft_model(model, lora_config(model, r=options.rank))
    peft_model.print_trainable_parameters()
    train(peft_model, full, rows_of(options.train_data, tokenizer, BATCH_SIZE * options.steps), options)
    print(f"recovered {loss_of(peft_model.get_base_model()):.4f} nats per token")

    peft_model.save_pretrained(adapter)
    batch = {"input_ids": held_out.batches[0].inputs["input_ids"][:2]}
    check_and_merge(peft_model, options.output, batch).save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    sizes = {path.name: sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (compressed, adapter)}
    print("bytes of weights:", sizes)


if __name__ == "__main__":
    main()
