import json

import pytest
import torch
from test_evaluation import VOCABULARY, WordTokenizer, batch_of

from hf_mcsmoe.calibration import Calibration
from hf_mcsmoe.evaluation import data as evaluation_data
from hf_mcsmoe.evaluation import load_evaluation_data


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_file_are_grouped_by_their_domain(tmp_path):
    rows = [{"domain": d, "text": t} for d, t in (("code", "5 6 7"), ("prose", "8 9"), ("code", "10 11 12 13"))]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    data = load_evaluation_data(path, WordTokenizer(), sequence_length=3, vocab_size=VOCABULARY)
    assert list(data) == ["code", "prose"]
    assert not any(batch.held_out for part in data.values() for batch in part.batches)
    batch = data["code"].batches[0]
    code = [row[mask].tolist() for row, mask in zip(batch.inputs["input_ids"], batch.token_mask, strict=True)]
    assert code == [[5, 6, 7], [2, 10, 11], [12, 13]]  # all of the text, joined by the end-of-text token
    assert data["code"].source.startswith("file mixed.jsonl") and data["code"].source.endswith("domain code")
    assert load_evaluation_data(str(path), WordTokenizer(), sequence_length=3, num_samples=1)["code"].num_rows == 1

    write_rows(path, [*rows, {"text": "8 9"}])
    with pytest.raises(ValueError, match=r"Row 3 of the file mixed.jsonl .* has the domain None"):
        load_evaluation_data(path, WordTokenizer())


def test_other_sources_are_one_domain(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(str(3 + i % 100) for i in range(600)))
    data = load_evaluation_data(path, WordTokenizer())
    assert list(data) == ["book"]
    assert data["book"].num_tokens == 600 and data["book"].batches[0].token_mask.shape == (3, 256)

    tokens = torch.randint(3, VOCABULARY, (300, 5))
    assert load_evaluation_data(tokens, None)["data"].num_tokens == 1500
    assert load_evaluation_data(["5 6 7", "8 9"], WordTokenizer())["data"].num_tokens == 6
    kept = Calibration((batch_of([[1, 2]]),), "")
    assert load_evaluation_data(kept, None)["data"] is kept

    monkeypatch.setattr(evaluation_data, "EVALUATION_TEXT", path)
    assert list(load_evaluation_data(None, WordTokenizer())) == ["book"]
