"""Train a small Switch Transformer from scratch to tell languages by single names.

Encoder-decoder, 32 experts a sparse layer, top-1, on the names of the Unicode CLDR data that the package Babel
carries (see `mc_smoe/language_names.py`; `pip install Babel`). One seed takes about ten minutes on one CPU core:

    python examples/train_switch_classifier.py --output switch-0 --seed 0

`mc_smoe_switch.py` compresses the result. The numbers of the training go to `training.json` beside the weights:
accuracy and loss on the held-out test items, and how the tokens spread over the experts of each layer.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mc_smoe.language_names import Collator, encode, majority_share, read_splits, train_tokenizer
from mc_smoe.scores import expert_usage, score
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

VOCAB_SIZE = 1024
BALANCE_WEIGHT = 0.01  # of the load-balancing loss, as in Switch Transformers (https://arxiv.org/abs/2101.03961)


class SwitchTrainer(Trainer):
    """`Trainer` that balances the load of the experts of each layer over the real tokens of a batch.

    The model's own auxiliary loss joins the tokens of all layers, and padding, before it measures the balance: a
    layer that uses a few experts and another that uses the rest look balanced to it.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor | tuple[Tensor, Any]:
        outputs = model(**inputs, output_router_logits=True)
        real, targets = inputs["attention_mask"].bool(), inputs["labels"] != -100
        balance = [balance_loss(logits[real]) for logits in outputs.encoder_router_logits]
        balance += [balance_loss(logits[targets]) for logits in outputs.decoder_router_logits]
        # The model is built with weights of zero for its own auxiliary losses.
        loss = outputs.loss + BALANCE_WEIGHT * torch.stack(balance).sum()
        return (loss, outputs) if return_outputs else loss


def balance_loss(logits: Tensor) -> Tensor:
    """N times the sum over experts of (share of tokens) * (mean probability); 1 for an even load. `logits` (T, N)."""
    num_experts = logits.shape[-1]
    share = torch.bincount(logits.argmax(-1), minlength=num_experts) / len(logits)
    return num_experts * (share * logits.softmax(-1).mean(0)).sum()


def build_model(tokenizer: PreTrainedTokenizerFast) -> SwitchTransformersForConditionalGeneration:
    """Every second layer is sparse, as in switch-base-32; widths are a twelfth of its."""
    config = SwitchTransformersConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        d_ff=256,
        d_kv=16,
        num_heads=4,
        num_layers=6,
        num_decoder_layers=6,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=3,
        num_experts=32,
        expert_capacity=64,  # names are shorter, so no token is beyond the capacity
        dropout_rate=0.0,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return SwitchTransformersForConditionalGeneration(config)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    set_seed(options.seed)
    splits = read_splits()
    tokenizer = train_tokenizer(splits["train"], VOCAB_SIZE)
    rows = {split: encode(entries, tokenizer) for split, entries in splits.items()}
    model = build_model(tokenizer)
    training = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 25,
        weight_decay=0.01,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        dataloader_pin_memory=False,
    )
    trainer = SwitchTrainer(
        model=model, args=training, train_dataset=rows["train"], data_collator=Collator(tokenizer.pad_token_id)
    )
    trainer.train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    numbers = {
        "seed": options.seed,
        "steps": options.steps,
        "parameters": model.num_parameters(),
        "examples": {split: len(part) for split, part in rows.items()},
        "majority_accuracy": majority_share(splits["test"]),
        **{split: asdict(score(model, rows[split])) for split in ("validation", "test")},
        "expert_usage": expert_usage(model, rows["validation"]),
    }
    (options.output / "training.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(f"test accuracy {numbers['test']['accuracy']:.3f}, loss {numbers['test']['loss']:.3f}")
    for name, usage in numbers["expert_usage"].items():
        effective = torch.tensor(usage).square().sum().reciprocal()
        print(f"{name}: {sum(share > 0 for share in usage)} experts in use, {effective:.1f} effective")


if __name__ == "__main__":
    main()
