"""The generated card in place of the one that Trainer writes."""

from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..local_paths import without_paths
from .card import local_licence, write_card
from .hub import report_of, statistics_of
from .page import write_pages
from .published import add_tags
from .report import write_report
from .statistics_file import write_statistics

TrainerClass = TypeVar("TrainerClass")
TRAINING_ARGS = "training_args.bin"  # what Trainer calls its pickled arguments; importing it from there takes seconds


class CompressedModelCard:
    """For a subclass of Trainer, before it: `class MyTrainer(CompressedModelCard, Trainer)`; pushes keep the card.

    Trainer writes its own draft over README.md whenever it pushes, from nothing but itself: neither the model nor a
    callback is asked (transformers 5.23: `push_to_hub` calls the callbacks' `on_push_begin`, saves the model, then
    writes the draft and uploads). So the model cannot keep its card alone, and the trainer must be told: with this
    class, or by `keep_model_card(trainer)` for one that exists. Then a compressed model gets its report, its recipe
    and the generated card there. An adapter of PEFT, or a model without a report, gets Trainer's.

    Uploads while the training runs (`hub_strategy` other than "end") stay as Trainer makes them: without a card, and
    with its pickled arguments. Log in or set HF_TOKEN then, because a `hub_token` among the arguments is in there.
    """

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write report, recipe and card into the output folder, on the first process.

        The card says that the weights were trained after the compression. Scores from before are not those of this
        model and left out. Trainer's pickled arguments, which hold `hub_token` in clear, are deleted there, because
        the whole folder is pushed next; those in the checkpoints of the training stay.

        Args:
            args: Of `Trainer.create_model_card`, for a model that gets Trainer's card.
            options: Likewise; `license` and `tags` count for the generated card too.
        """
        model = self.accelerator.unwrap_model(self.model)
        values = report_of(model) if isinstance(model, PreTrainedModel) else None
        if values is None:
            super().create_model_card(*args, **options)
            return
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        (folder / TRAINING_ARGS).unlink(missing_ok=True)
        if self.state.global_step > 0:
            values.pop("evaluation", None)
            values["warnings"] = [*values["warnings"], trained_after(self.state.global_step)]
        licence = options.get("license") or local_licence(values["base_model"])
        write_report(without_paths(values), folder)
        write_statistics(statistics_of(model), folder)
        write_pages(folder)
        card = write_card(folder, repo_name=self.hub_model_id or folder.resolve().name, base_license=licence)
        tags = options.get("tags") or []
        if tags:
            add_tags(ModelCard.load(card), [tags] if isinstance(tags, str) else tags).save(card)


def keep_model_card(trainer: TrainerClass) -> TrainerClass:
    """Let any trainer that exists keep the generated card of a compressed model, as `CompressedModelCard` does.

    Args:
        trainer: A `Trainer` or of a subclass, TRL's included. It becomes an instance of a subclass of its own class
            with `CompressedModelCard` before it, and stays the same object otherwise.

    Returns:
        The trainer.
    """
    own = type(trainer)
    if not issubclass(own, CompressedModelCard):
        trainer.__class__ = type(own.__name__, (CompressedModelCard, own), {"__module__": own.__module__})
    return trainer


def trained_after(steps: int) -> str:
    """What report and card say of a model that was trained on."""
    return (
        f"The weights were trained for {steps} optimizer steps after the compression. The output errors of the layers "
        "were measured before; the trained model was not evaluated for this card."
    )
