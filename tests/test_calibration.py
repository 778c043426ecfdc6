"""Every kind of source, the sampling, the packing, the masks, the fingerprint."""

import copy
import json
import re
from itertools import chain, count, islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.calibration import load_calibration, sources
from hf_mcsmoe.calibration import rows as reading

datasets = pytest.importorskip("datasets")

EOS, PAD, VOCABULARY = 0, 1, 64
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<eos>", "<pad>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(5, VOCABULARY))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=10
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def words(num_texts, seed=0, longest=30):
    """Texts of 1..longest words, and the token ids they must give."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_texts,), generator=generator).tolist()
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(f"w{i}" for i in row) for row in ids], ids


def rows_of(calibration, held_out=(False, True)):
    """Real token ids of each row, in the order of the batches."""
    return [
        ids[mask].tolist()
        for batch in calibration.batches
        if batch.held_out in held_out
        for ids, mask in zip(batch.inputs["input_ids"], batch.token_mask, strict=True)
    ]


def endless(item):
    while True:
        yield item


# --- sampling, packing, padding


@pytest.mark.parametrize("ends_with_eos", [False, True])
def test_packed_rows_are_the_documents_in_order_joined_by_eos(tokenizer, ends_with_eos):
    texts, ids = words(20)
    if ends_with_eos:
        texts[3], ids[3] = texts[3] + " <eos>", [*ids[3], EOS]
    calibration = load_calibration(["", *texts], tokenizer, sequence_length=7, batch_size=4, held_out_fraction=0)
    expected = []
    for document, row in enumerate(ids):
        if document > 0 and expected[-1] != EOS:
            expected.append(EOS)
        for token in row:
            expected.append(token)
    if len(expected) % 7 == 1:  # a last row of one token has nothing to predict
        expected.pop()
    rows = rows_of(calibration)
    assert list(chain(*rows)) == expected
    assert [len(row) for row in rows[:-1]] == [7] * (len(rows) - 1)


def test_last_packed_row_is_dropped_only_if_it_is_a_single_token(tokenizer):
    assert rows_of(load_calibration(["w5 w6 w7 w8"], tokenizer, sequence_length=3)) == [[5, 6, 7]]
    short = load_calibration(["w5 w6 w7 w8 w9"], tokenizer, sequence_length=3, held_out_fraction=0)
    assert rows_of(short) == [[5, 6, 7], [8, 9]]
    assert short.batches[0].inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, PAD]]
    assert short.batches[0].inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert rows_of(load_calibration(["w5 w6"], tokenizer, sequence_length=1, held_out_fraction=0)) == [[5], [6]]
    for seed in range(9):  # a document that ends with eos needs no other one after it, wherever it is drawn
        texts = ["w5", "w6 w7", "w8 <eos>"]
        assert load_calibration(texts, tokenizer, num_samples=4, sequence_length=1, seed=seed).num_rows <= 4


def test_unpacked_texts_are_one_truncated_row_each_padded_to_the_longest_of_the_batch(tokenizer):
    texts = ["w5 w6 w7 w8 w9", "w10", "w11 w12", "w13 w14 w15"]
    calibration = load_calibration(
        texts, tokenizer, sequence_length=4, packing=False, batch_size=2, held_out_fraction=0
    )
    assert rows_of(calibration) == [[5, 6, 7, 8], [11, 12], [13, 14, 15]]
    assert [tuple(batch.token_mask.shape) for batch in calibration.batches] == [(2, 4), (1, 3)]
    assert calibration.num_tokens == 9 and calibration.num_rows == 3


def test_small_samples_cover_many_documents_and_keep_their_order(tokenizer):
    texts, ids = words(200)
    calibration = load_calibration(texts, tokenizer, num_samples=6, sequence_length=32, held_out_fraction=0)
    assert [len(row) for row in rows_of(calibration)] == [32] * 6
    tokens = list(chain(*rows_of(calibration)))
    pieces = [list(map(int, piece.split())) for piece in " ".join(map(str, tokens)).split(f" {EOS} ")]
    places = [next(i for i, row in enumerate(ids) if row[: len(piece)] == piece) for piece in pieces]
    assert places == sorted(places) and len(places) > 6 and places[-1] > 100


@pytest.mark.parametrize("kind", ["texts", "unpacked", "one long text", "rows", "tensor", "batches"])
def test_seed_chooses_the_rows(tokenizer, kind):
    texts, ids = words(60)
    matrix = torch.arange(5, 45)[:, None].expand(40, 3)
    source = {
        "texts": texts,
        "unpacked": texts,
        "one long text": ["\n".join(texts)],
        "rows": ids,
        "tensor": matrix,
        "batches": [{"input_ids": part, "number": part[:, 0]} for part in matrix.split(7)],
    }[kind]
    options = {"num_samples": 5, "sequence_length": 8, "packing": kind != "unpacked"}
    first, again, other = (rows_of(load_calibration(source, tokenizer, seed=s, **options)) for s in (0, 0, 1))
    assert first == again != other
    assert len(first) == len(other) == 5


def test_long_texts_are_cut_into_passages_at_line_ends(tokenizer):
    text = "abc\ndefgh\nijklmnopqrst"
    assert list(reading._passages(text, 8)) == ["abc\n", "defgh\n", "ijklmnop", "qrst"]
    lines = [f"w{i} w{i} w{i} w{i}\n" for i in range(10, 60)]  # 16 characters, 4 tokens each
    rows = rows_of(load_calibration(["".join(lines)], tokenizer, num_samples=4, sequence_length=9, seed=3))
    numbers = [token for token in chain(*rows) if token != EOS]
    assert numbers[::4] == sorted(numbers[::4]) and numbers[3::4] == numbers[: len(numbers[3::4]) * 4 : 4]
    assert max(numbers) - min(numbers) > 15  # whole lines in their order, and not just the first nine


def test_long_documents_share_a_small_sample(tokenizer):
    texts = [f"w{i}\n" * 200 + "w63\n" * 200 for i in range(10, 50)]
    calibration = load_calibration(texts, tokenizer, num_samples=8, sequence_length=32, held_out_fraction=0)
    tokens = list(chain(*rows_of(calibration)))
    assert len(tokens) == 8 * 32
    pieces = [piece.split() for piece in " ".join(map(str, tokens)).split(f" {EOS} ")]
    assert len(pieces) >= 8  # 32 tokens, at 4 characters each, from every document drawn
    assert 0 < sum(piece[0] == "63" for piece in pieces) < len(pieces)  # and not always its beginning


def test_streams_are_read_only_as_far_as_needed(tokenizer):
    texts = (f"w{5 + i % 50} w5" for i in count())
    assert rows_of(load_calibration(texts, tokenizer, num_samples=2, sequence_length=5, held_out_fraction=0)) == [
        [5, 5, EOS, 6, 5],
        [EOS, 7, 5, EOS, 8],
    ]
    assert len(list(islice(texts, 3))) == 3
    assert rows_of(load_calibration(endless([5, 6]), num_samples=3)) == [[5, 6]] * 3
    batches = endless({"input_ids": torch.tensor([[5, 6], [7, 8]])})
    assert rows_of(load_calibration(batches, num_samples=3, held_out_fraction=0)) == [[5, 6], [7, 8], [5, 6]]


def test_tokens_and_batches_stay_as_they_are_unless_bounded():
    tokens = torch.arange(5, 605).reshape(300, 2)
    assert rows_of(load_calibration(tokens, held_out_fraction=0)) == tokens.tolist()
    assert rows_of(load_calibration(tokens, sequence_length=1, held_out_fraction=0)) == tokens[:, :1].tolist()
    left = {
        "input_ids": torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]),
    }
    calibration = load_calibration(left, sequence_length=3, held_out_fraction=0)
    assert rows_of(calibration) == [[5, 6], [8, 9, 10]]
    assert calibration.batches[0].inputs["token_type_ids"].tolist() == [[0, 1, 2], [4, 5, 6]]
    right = {name: tensor.flip(1) for name, tensor in left.items()}
    assert rows_of(load_calibration(right, sequence_length=3, held_out_fraction=0)) == [[6, 5], [10, 9, 8]]


def test_held_out_rows_are_evenly_spaced_and_in_batches_of_their_own():
    tokens = torch.arange(5, 45)[:, None].expand(40, 2)
    calibration = load_calibration(tokens, held_out_fraction=1 / 8, batch_size=3)
    assert [row[0] - 5 for row in rows_of(calibration, held_out=(True,))] == [4, 12, 20, 28, 36]
    assert len(rows_of(calibration, held_out=(False,))) == 35
    assert (calibration.num_tokens, calibration.num_held_out_tokens, calibration.num_rows) == (70, 10, 40)
    for num_rows, fraction, expected in [(1, 0.5, 0), (2, 1 / 16, 1), (40, 0, 0), (40, 0.99, 20)]:
        assert len(rows_of(load_calibration(tokens[:num_rows], held_out_fraction=fraction), (True,))) == expected


# --- kinds of sources


def source_of(kind, texts, folder):
    records = [{"text": text, "number": i} for i, text in enumerate(texts)]
    if kind.startswith("jsonl"):
        path = folder / "calib.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
        return str(path) if kind == "jsonl str" else path
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(folder / "calib.parquet")
        return folder / "calib.parquet"
    return {
        "list": texts,
        "tuple": tuple(texts),
        "generator": (text for text in texts),
        "records": records,
        "Dataset": datasets.Dataset.from_list(records),
        "IterableDataset": datasets.Dataset.from_list(records).to_iterable_dataset(),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["list", "tuple", "generator", "records", "jsonl", "jsonl str", "parquet", "Dataset", "IterableDataset"],
)
def test_the_same_texts_give_the_same_rows_from_every_source(tokenizer, tmp_path, kind):
    texts, _ = words(30)
    source = source_of(kind, texts, tmp_path)
    calibration = load_calibration(source, tokenizer, sequence_length=11)
    assert (
        calibration.fingerprint()["sha256"]
        == load_calibration(texts, tokenizer, sequence_length=11).fingerprint()["sha256"]
    )


def test_the_same_tokens_give_the_same_rows_from_every_source(tmp_path):
    tokens = torch.randint(5, VOCABULARY, (9, 6), generator=torch.Generator().manual_seed(0))
    ids, mask = tokens.tolist(), torch.ones_like(tokens)
    records = [{"input_ids": row, "attention_mask": [1] * 6, "text": "ignored"} for row in ids]
    np.save(tmp_path / "calib.npy", tokens.numpy().astype(np.uint16))
    sources = [
        tokens.int(),
        tokens.numpy(),
        tmp_path / "calib.npy",
        list(tokens),
        iter(ids),
        records,
        datasets.Dataset.from_list(records),
        datasets.Dataset.from_list(records).with_format("torch"),
        DataLoader(records, batch_size=4, collate_fn=lambda rows: {"input_ids": [row["input_ids"] for row in rows]}),
        DataLoader(tokens, batch_size=4),
        {"input_ids": tokens, "attention_mask": mask},
        {"input_ids": ids},
        [{"input_ids": tokens.numpy()[:5]}, {"input_ids": ids[5:], "attention_mask": mask[5:].tolist()}],
    ]
    expected = rows_of(load_calibration(ids))
    assert sorted(expected) == sorted(ids)
    for source in sources:
        assert rows_of(load_calibration(source)) == expected


def test_a_text_file_is_one_document_with_its_blank_lines(tokenizer, tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text("w5 w6\n\nw7\n", encoding="utf-8-sig")
    calibration = load_calibration(path, tokenizer)
    assert rows_of(calibration) == [[5, 6, 7]]
    assert calibration.source.startswith("file calib.txt (sha256 ")


def test_text_column_chooses_the_column():
    records = datasets.Dataset.from_list([{"input_ids": [9, 9], "body": [5, 6]}])
    assert rows_of(load_calibration(records)) == [[9, 9]]
    assert rows_of(load_calibration(records, text_column="body")) == [[5, 6]]


@pytest.mark.parametrize("column", ["messages", "conversations", None])
def test_chats_go_through_the_chat_template(tokenizer, column):
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    if column == "conversations":  # ShareGPT's way to write it
        chat = [{"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7"}]
    source = [chat, chat] if column is None else datasets.Dataset.from_list([{column: chat}] * 2)
    rows = rows_of(load_calibration(source, tokenizer, held_out_fraction=0))
    assert rows == [[3, 5, 6, 4, 7, EOS, 3, 5, 6, 4, 7]]


def test_texts_get_the_special_tokens_of_the_tokenizer_and_chats_those_of_their_template(tokenizer):
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<unk> $A", special_tokens=[("<unk>", 2)]
    )
    assert rows_of(load_calibration(["w5 w6", "w7"], starting, held_out_fraction=0)) == [[2, 5, 6, EOS, 2, 7]]
    assert rows_of(load_calibration([[{"role": "user", "content": "w5"}]], starting)) == [[3, 5]]


def test_loader_batches_keep_other_tensors_and_lose_labels_and_strings():
    rows = [{"input_ids": torch.full((3,), 5 + i), "pixel_values": torch.full((2, 2), float(i))} for i in range(7)]
    rows = [
        {**row, "labels": row["input_ids"], "name": "x", "attention_mask": torch.tensor([0, 1, 1])} for row in rows
    ]
    calibration = load_calibration(DataLoader(rows, batch_size=4), batch_size=3, held_out_fraction=1 / 4)
    assert [batch.token_mask.shape[0] for batch in calibration.batches] == [3, 2, 1, 1]
    for batch in calibration.batches:
        assert set(batch.inputs) == {"input_ids", "attention_mask", "pixel_values"}
        assert torch.equal(batch.inputs["pixel_values"][:, 0, 0] + 5, batch.inputs["input_ids"][:, 1].float())
        assert torch.equal(batch.token_mask, torch.tensor([False, True, True]).expand(len(batch.token_mask), 3))


def test_batches_with_tensors_that_are_not_one_entry_a_row_stay_whole():
    batches = [{"input_ids": torch.full((2, 3), 5 + i), "pixel_values": torch.full((9, 4), i / 8)} for i in range(5)]
    calibration = load_calibration(batches, batch_size=1, held_out_fraction=1 / 4)
    assert [batch.inputs["input_ids"][0, 0].item() - 5 for batch in calibration.batches] == [0, 1, 3, 4, 2]
    assert all(batch.inputs["pixel_values"].shape == (9, 4) for batch in calibration.batches)


def test_rows_of_other_lengths_are_padded_and_padding_given_is_recognised():
    source = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [1, 1, 8], "attention_mask": [0, 0, 1]},
        {"input_ids": [1, 1], "attention_mask": [0, 0]},
    ]
    (batch,) = load_calibration(source, held_out_fraction=0).batches
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]  # no tokenizer: padded with 0
    assert batch.token_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.inputs["input_ids"].dtype == batch.inputs["attention_mask"].dtype == torch.int64


def test_a_pad_token_outside_the_vocabulary_is_not_used(tokenizer):
    (batch,) = load_calibration([[0, 0], [0]], tokenizer, vocab_size=1, held_out_fraction=0).batches
    assert batch.inputs["input_ids"].tolist() == [[0, 0], [0, 0]]


def test_no_source_means_the_shipped_text_and_a_warning(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "calibration.jsonl").write_text('{"domain": "code", "text": "w5\u2028w6"}\n')
    warnings = []
    monkeypatch.setattr(sources, "files", lambda package: {"hf_mcsmoe": tmp_path}[package])
    monkeypatch.setattr(sources.logger, "warning", warnings.append)
    calibration = load_calibration(None, tokenizer)
    assert rows_of(calibration) == [[5, 6]] and calibration.source == "hf_mcsmoe default text"
    assert len(warnings) == 1 and "technical English prose and Python code" in warnings[0]


@pytest.mark.parametrize(
    ("source", "description"),
    [
        (["w5 w6", "w7"], "list of 2 texts"),
        ([[5, 6]], "list of 1 token row"),
        (torch.ones(2, 3, dtype=torch.int64), r"token tensor \(2, 3\)"),
        ({"input_ids": [[5, 6]]}, "single batch"),
        ([{"input_ids": [[5, 6]]}] * 2, "list of 2 batches"),
        (DataLoader([{"input_ids": torch.tensor([5, 6])}]), "DataLoader"),
        (iter([[5, 6]]), r"stream \(list_iterator\)"),
        (datasets.Dataset.from_dict({"text": ["w5 w6"]}), r"dataset \w+ \(1 rows\)"),
    ],
)
def test_sources_are_described(tokenizer, source, description):
    assert re.fullmatch(description, load_calibration(source, tokenizer).source)


# --- fingerprint


def test_fingerprint_is_json_and_does_not_depend_on_the_batch_size(tokenizer):
    texts, _ = words(50)
    batch = {"input_ids": torch.arange(5, 26).reshape(7, 3), "pixel_values": torch.rand(7, 2).bfloat16()}
    for source, packing in [(texts, True), (texts, False), (batch, True)]:
        prints = [
            load_calibration(source, tokenizer, sequence_length=16, packing=packing, batch_size=size).fingerprint()
            for size in (1, 3, 8)
        ]
        assert prints[0] == prints[1] == prints[2] == json.loads(json.dumps(prints[0]))
        assert set(prints[0]) == {"sha256", "tokens", "held_out_tokens", "rows", "source"}


@pytest.mark.parametrize("num_patches", [2, 9])
def test_fingerprint_changes_with_other_tensors(num_patches):
    batch = {"input_ids": torch.full((2, 3), 5), "pixel_values": torch.zeros(num_patches, 4)}
    other = {**batch, "pixel_values": torch.eye(num_patches, 4)}
    assert load_calibration(batch).fingerprint()["sha256"] != load_calibration(other).fingerprint()["sha256"]


def test_fingerprint_changes_with_a_token_a_mask_or_what_is_held_out():
    def print_of(ids, mask, fraction=1 / 3):
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return load_calibration(batch, held_out_fraction=fraction).fingerprint()["sha256"]

    ids, mask = [[5, 0, 6], [7, 8, 1], [9, 9, 9]], [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    original = print_of(ids, mask)
    assert print_of([[5, 0, 6], [7, 8, 63], [9, 2, 9]], mask) == original  # ids under the mask do not matter
    changed = [
        print_of([[5, 0, 6], [7, 9, 1], [9, 9, 9]], mask),
        print_of(ids, [[1, 1, 0], [1, 1, 0], [1, 0, 1]]),
        print_of(ids, [[1, 0, 1], [1, 1, 0], [1, 0, 1]]),
        print_of(ids, mask, fraction=0),
        print_of(ids, mask, fraction=1 / 5),
    ]
    assert len({original, *changed}) == 6


def test_a_calibration_is_returned_as_it_is():
    calibration = load_calibration([[5, 6]])
    assert load_calibration(calibration, vocab_size=7) is calibration
    with pytest.raises(ValueError, match="token id 6, but the model's vocabulary has 6 tokens"):
        load_calibration(calibration, vocab_size=6)
