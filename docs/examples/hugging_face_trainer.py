"""The histogram loss in the Trainer of Hugging Face, for an image encoder.

pip install hloss 'transformers[torch]'
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTConfig, ViTModel

from hloss import HistogramLoss, recall_at_k


class MetricTrainer(Trainer):
    """A Trainer that minimises the histogram loss of the first token's embeddings."""

    criterion = HistogramLoss(n_bins=100, on_degenerate="zero")

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch, and the outputs of the model if they are asked for."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.criterion(outputs.last_hidden_state[:, 0], inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Images(Dataset[dict[str, Tensor]]):
    """Random images in place of yours: each of 8 classes is a pattern in much noise."""

    def __init__(self, per_class: int) -> None:
        self.labels = torch.arange(8).repeat_interleave(per_class)
        patterns = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.pixels = patterns[self.labels] + torch.randn(len(self.labels), 3, 8, 8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


torch.manual_seed(0)
# A tiny model with random weights in place of a pretrained one: ViTModel.from_pretrained(...).
config = ViTConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=8,
    patch_size=4,
)
model = ViTModel(config, add_pooling_layer=False)
train, test = Images(per_class=40), Images(per_class=10)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=64,
        max_steps=60,
        remove_unused_columns=False,  # They are chosen by the arguments of the model, which takes no labels.
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = MetricTrainer(model=model, args=arguments, train_dataset=train)
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
model.eval()
with torch.no_grad():
    embeddings = model(pixel_values=test.pixels).last_hidden_state[:, 0]
recall = recall_at_k(embeddings, test.labels, k=(1,))[1]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, Recall@1 of new images {100 * recall:.0f} %")
