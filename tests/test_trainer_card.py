from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments
from transformers import trainer as trainer_module

from hf_mcsmoe.publishing import CompressedModelCard, keep_model_card, read_report


class OwnTrainer(Trainer):
    """Somebody's subclass."""

    pushed = "README.md"


@pytest.fixture
def uploaded(monkeypatch):
    """What the card was whenever Trainer uploaded its folder; nothing is sent."""
    cards = []

    def upload(folder_path, **_):
        cards.append(ModelCard.load(Path(folder_path) / "README.md"))

    monkeypatch.setattr(trainer_module, "hf_api", lambda: SimpleNamespace(upload_folder=upload))
    return cards


def trainer_of(model, folder, kind=Trainer):
    args = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, hub_model_id="me/half")
    trainer = kind(model, args)
    trainer.hub_model_id = "me/half"  # without a server there is nothing to make
    return trainer


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("kind", [Trainer, OwnTrainer])
def test_a_trainer_that_exists_keeps_the_card(compress, layout, kind, tmp_path, uploaded):
    model = compress("qwen3_moe", layout=layout)
    trainer = trainer_of(model, tmp_path, kind)
    kept = keep_model_card(trainer)
    own = type(kept)
    assert kept is trainer and isinstance(kept, kind) and own.__name__ == kind.__name__
    assert type(keep_model_card(trainer)) is own  # once is enough
    trainer.push_to_hub(tags=["mine"], license="mit")
    (card,) = uploaded
    assert 'from_pretrained("me/half"' in card.text and "mine" in card.data.tags and card.data.license == "mit"
    assert "generated_from_trainer" not in card.data.tags
    assert read_report(tmp_path)["layers"] and (tmp_path / "recipe.yaml").is_file()


def test_a_plain_trainer_writes_its_draft(compress, tmp_path, uploaded):
    """What the model alone cannot prevent; where this fails, `keep_model_card` is not needed any more."""
    trainer_of(compress("qwen3_moe"), tmp_path).push_to_hub()
    assert "generated_from_trainer" in uploaded[0].data.tags


def test_original_models_get_the_draft_of_their_trainer(original, tmp_path, uploaded):
    trainer = keep_model_card(trainer_of(original("qwen3_moe"), tmp_path))
    assert isinstance(trainer, CompressedModelCard)
    trainer.push_to_hub()
    assert "generated_from_trainer" in uploaded[0].data.tags
