"""Make the tiny trained MoE of `hf_mcsmoe/assets`: tokenizer, model, calibration and evaluation text.

Everything comes from the Python installation that runs this script: the sources of the standard
library ("code") and its docstrings and language reference ("prose"). No download. About 75 minutes
on one CPU core:

    python examples/train_tiny_moe.py --output hf_mcsmoe/assets
"""

import argparse
import ast
import hashlib
import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings", "lib2to3"}
SPLITS = {0: "evaluation", 1: "calibration"}  # 1 document in 20 each; the other 18 are trained on
ASSET_CHARACTERS = {"evaluation": 150_000, "calibration": 250_000}  # shipped text per domain


def docstrings_of(source: str) -> str:
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    return "\n\n".join(text for text in map(ast.get_docstring, nodes) if text)


def read_documents() -> list[dict]:
    """All documents as {"split", "domain", "text"}; a file's code and docstrings share a split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []

    def add(name: str, **texts: str) -> None:
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
        split = SPLITS.get(bucket, "train")
        documents.extend({"split": split, "domain": d, "text": t} for d, t in texts.items() if len(t) > 200)

    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            add(name.as_posix(), code=source, prose=docstrings_of(source))
    for name, text in sorted(topics.items()):
        add(f"topic {name}", prose=text)
    return documents


def train_tokenizer(documents: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d["text"] for d in documents if d["split"] == "train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def packed_rows(documents: list[dict], tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> torch.Tensor:
    """Training documents in random order, joined by the end-of-text token, cut into (rows, length)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = []
    for i in order:
        stream += tokenizer(documents[i]["text"])["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.output_router_logits = True  # adds the load-balancing loss while training
    return Qwen3MoeForCausalLM(config)


def write_text(documents: list[dict], output: Path) -> None:
    for split, limit in ASSET_CHARACTERS.items():
        with open(output / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for domain in ("code", "prose"):
                left = limit
                for d in (d for d in documents if d["split"] == split and d["domain"] == domain):
                    text = d["text"][: min(left, 20_000)]  # no single document dominates
                    left -= len(text)
                    if len(text) > 200:
                        file.write(json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to try the script out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    documents = read_documents()
    tokenizer = train_tokenizer(documents, args.vocab_size)
    rows = packed_rows([d for d in documents if d["split"] == "train"], tokenizer, length=256, seed=args.seed)
    print(f"{len(documents)} documents, {rows.numel():,} training tokens")
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    training = TrainingArguments(
        output_dir=str(args.output / "training"),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.05,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=training, train_dataset=dataset).train()
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.output / "tiny-qwen3-moe")
    tokenizer.save_pretrained(args.output / "tiny-qwen3-moe")
    write_text(documents, args.output)


if __name__ == "__main__":
    main()
