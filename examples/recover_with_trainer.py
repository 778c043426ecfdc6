"""Compress a MoE model to half of its experts, and recover it with the original as its teacher. Minutes on a CPU.

python examples/recover_with_trainer.py                          # the tiny model that ships, offline
python examples/recover_with_trainer.py --model Qwen/Qwen3-30B-A3B --data texts.jsonl --output out
"""

import argparse
import tempfile
from pathlib import Path

import hf_mcsmoe
from hf_mcsmoe import MergedSparseMoeConfig, compress_moe
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.loading import load_model, load_tokenizer
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer
from hf_mcsmoe.training.recovery_data import RowCollator, load_recovery_data

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"), help="folder or Hub id")
    parser.add_argument("--data", default=str(ASSETS / "calibration.jsonl"), help="text to compress and train with")
    parser.add_argument("--evaluation", default=str(ASSETS / "evaluation.jsonl"), help="text for the losses")
    parser.add_argument("--evaluation-rows", type=int, default=32, help="rows of 256 tokens, for each domain")
    parser.add_argument("--output", help="folder of the result; default: a temporary one")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop the training early")
    parser.add_argument("--distillation-weight", type=float, default=1.0)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    teacher = load_model(args.model, dtype="float32")
    student = load_model(args.model, dtype="float32")
    config = MergedSparseMoeConfig.from_preset("m-smoe", keep=0.5)
    student = compress_moe(student, config, calibration=args.data, tokenizer=tokenizer, num_samples=64)

    rows = load_evaluation_data(args.evaluation, tokenizer, num_samples=args.evaluation_rows)
    before = evaluate_model(student, rows, baseline=teacher).overall
    print(f"original: loss {before.baseline_loss:.4f}")
    print(f"compressed: loss {before.loss:.4f}, KL to the original {before.kl:.4f}")

    data = load_recovery_data(args.data, tokenizer, "causal", sequence_length=256)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = DistillationArguments(
            output_dir=args.output or temporary,
            num_train_epochs=1,
            max_steps=args.max_steps,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.98,
            per_device_train_batch_size=8,
            distillation_weight=args.distillation_weight,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        )
        trainer = DistillationTrainer(
            student,
            arguments,
            teacher=teacher,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=RowCollator(tokenizer.pad_token_id or 0, "causal"),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()

    after = evaluate_model(student, rows, baseline=teacher).overall
    print(f"recovered: loss {after.loss:.4f}, KL to the original {after.kl:.4f}")


if __name__ == "__main__":
    main()
