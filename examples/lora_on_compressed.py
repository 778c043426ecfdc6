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
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

import hf_mcsmoe
from hf_mcsmoe import compress_moe, load_calibration
from hf_mcsmoe.evaluation import evaluate_model
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer, lora_config

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"
SEQUENCE_LENGTH = 256


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


def main() -> None:
    options = arguments()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    full = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    held_out = load_calibration(
        options.eval_data, tokenizer, num_samples=options.eval_rows, sequence_length=SEQUENCE_LENGTH
    )

    def loss_of(model) -> float:
        return evaluate_model(model, {"held out": held_out}, progress=False).overall.loss

    compressed, adapter, merged = (options.output / name for name in ("compressed", "adapter", "merged"))
    model = compress_moe(
        copy.deepcopy(full), options.preset, calibration=options.train_data, tokenizer=tokenizer, output_dir=compressed
    )
    print(f"full {loss_of(full):.4f}, compressed {loss_of(model):.4f} nats per token")

    peft_model = get_peft_model(model, lora_config(model, r=options.rank))
    peft_model.print_trainable_parameters()
    data = load_calibration(
        options.train_data,
        tokenizer,
        num_samples=8 * options.steps,
        sequence_length=SEQUENCE_LENGTH,
        held_out_fraction=0,
    )
    rows = [row for batch in data.batches for row in batch.inputs["input_ids"].tolist()]
    training = DistillationArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        warmup_steps=10,
        freeze_routers=False,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
    )
    trainer = DistillationTrainer(
        model=peft_model,
        args=training,
        teacher=full,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
    )
    trainer.train()
    print(f"recovered {loss_of(peft_model.get_base_model()):.4f} nats per token")

    peft_model.save_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(compressed)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    batch = {"input_ids": held_out.batches[0].inputs["input_ids"][:2]}
    with torch.no_grad():
        expected = peft_model.eval()(**batch).logits
        print("the same from disk:", torch.equal(loaded(**batch).logits, expected))
        result = loaded.merge_and_unload()
        print(f"merged: largest difference of a logit {(result(**batch).logits - expected).abs().max():.1e}")
    result.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    sizes = {path.name: sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (compressed, adapter)}
    print("bytes of weights:", sizes)


if __name__ == "__main__":
    main()
