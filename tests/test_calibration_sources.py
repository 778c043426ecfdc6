"""Every refusal of a calibration source: the message says what is wrong, what is allowed and what to do."""

import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.calibration import Calibration, CalibrationBatch, load_calibration

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "w5": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


IDS = torch.tensor([[5, 6, 7]])
NO_ROLE = [[{"speaker": "user", "content": "w5"}]]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ([], {}, ValueError, "source is empty .list of 0 rows"),
        (iter([]), {}, ValueError, "source is empty .stream"),
        (["", "  \n"], {}, ValueError, "no real token"),
        ({"input_ids": IDS, "attention_mask": IDS * 0}, {}, ValueError, "no real token.*attention mask"),
        ([[]], {}, ValueError, "no real token"),
        ([[5, 6], [64]], {"vocab_size": 64}, ValueError, "token id 64.*64 tokens .ids 0 to 63.*wrong tokenizer"),
        ([[5, -100]], {}, ValueError, "negative token id -100"),
        (
            {"input_ids": IDS, "decoder_input_ids": IDS + 9},
            {"vocab_size": 9},
            ValueError,
            "decoder_input_ids has .* 16",
        ),
        (["w5"], {"tokenizer": None}, ValueError, "list of 1 text. is text, but there is no tokenizer"),
        ("calib.csv", {}, ValueError, "There is no calibration file 'calib.csv'.*give text as a list"),
        ("w5 " * 9999, {}, ValueError, "There is no calibration file"),
        (__file__, {}, ValueError, "has the ending '.py', allowed are .txt, .jsonl, .parquet, .npy"),
        ([{"text": "w5"}], {"text_column": "txt"}, ValueError, "no column 'txt'.*'text'.*Did you mean 'text'"),
        ([{"body": "w5"}], {}, ValueError, "columns .'body'., but none of .*text_column"),
        ([{"text": "w5"}, {"body": "w5"}], {}, ValueError, "row 1 has no column 'text', it has .'body'"),
        (["w5"], {"text_column": "text"}, ValueError, "list of 1 text has no columns"),
        (NO_ROLE, {}, ValueError, "Chat 0 has a message without 'role', its keys are .'speaker', 'content'"),
        (DataLoader([{"pixels": IDS}]), {}, ValueError, "batch 0 has no 'input_ids', its keys are .'pixels'"),
        (datasets.DatasetDict(train=None), {}, ValueError, "no 'input_ids'.*'train'.*give one split"),
        (["w5", [5, 6]], {}, TypeError, "item 1 is of kind 'tokens', but the first one is of kind 'text'"),
        (iter([[5], "w5"]), {}, TypeError, "item 1 is of kind 'text', but the first one is of kind 'tokens'"),
        (["w5", None], {}, TypeError, "item 1 is of type NoneType"),
        ([5, 6], {}, TypeError, "first calibration item is of type int.*list: .ids"),
        ([{"text": {"en": "w5"}}], {}, TypeError, "first calibration item is of type dict"),
        (7, {}, TypeError, "calibration cannot be int"),
        (IDS[0], {}, ValueError, r"shape .rows, tokens., got .3,"),
        ({"input_ids": IDS[None]}, {}, ValueError, r"batch 0 must be .rows, tokens., got shape .1, 1, 3"),
        ([{"input_ids": [5], "text": ""}, {"input_ids": IDS[0, 0]}], {}, TypeError, "item 1 is of type Tensor"),
        (IDS.float(), {}, TypeError, "row 0 must be integers, got torch.float32"),
        ([[5, 6.5]], {}, TypeError, "row 0 must be integers, got float64"),
        ([[True, False]], {}, TypeError, "row 0 must be integers, got bool"),
        ({"input_ids": IDS.float()}, {}, TypeError, "batch 0 must be integers"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}, {}, ValueError, r"\(1, 1, 3, 3\).*4-D masks"),
        ({"input_ids": IDS, "attention_mask": IDS}, {}, ValueError, "batch 0 has values besides 0 and 1"),
        (
            [{"input_ids": [5, 6], "attention_mask": [1]}],
            {},
            ValueError,
            r"row 0 has shape \(1,\), but input_ids \(2,\)",
        ),
        (IDS, {"num_samples": 0}, ValueError, "num_samples must be an integer of at least 1, got 0"),
        (IDS, {"sequence_length": -1}, ValueError, "sequence_length must be an integer of at least 1, got -1"),
        (IDS, {"batch_size": 1.5}, ValueError, "batch_size must be an integer of at least 1, got 1.5"),
        (IDS, {"held_out_fraction": 1.0}, ValueError, r"held_out_fraction must be in \[0, 1\), got 1.0"),
        (IDS, {"held_out_fraction": float("nan")}, ValueError, "held_out_fraction must be in"),
    ],
)
def test_refusals_say_what_is_wrong(tokenizer, source, options, error, message):
    with pytest.raises(error, match=message):
        load_calibration(source, **{"tokenizer": tokenizer, **options})


def test_files_that_cannot_be_read_are_refused(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "calib.jsonl").write_text('{"text": "w5"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"Line 2 of calib.jsonl is not JSON"):
        load_calibration(tmp_path / "calib.jsonl", tokenizer)
    (tmp_path / "calib.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"source is empty .file calib.txt"):
        load_calibration(tmp_path / "calib.txt", tokenizer)
    np.save(tmp_path / "calib.npy", np.array([[5, None]]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"calib.npy is not an array of token ids: .* Write one with numpy.save"):
        load_calibration(tmp_path / "calib.npy")
    (tmp_path / "calib.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install hf-mcsmoe\[data\]"):
        load_calibration(tmp_path / "calib.parquet")


def test_chats_need_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_calibration([[{"role": "user", "content": "w5"}]], tokenizer)


def test_values_check_themselves():
    with pytest.raises(ValueError, match=r"token_mask must be a bool tensor of shape \(1, 3\)"):
        CalibrationBatch({"input_ids": IDS}, IDS, held_out=False)
    with pytest.raises(ValueError, match="no real token"):
        Calibration((CalibrationBatch({"input_ids": IDS}, IDS > 0, held_out=True),), "by hand")
