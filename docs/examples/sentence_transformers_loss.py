"""The histogram loss for sentence-transformers: sentences with class labels.

pip install hloss 'sentence-transformers[train]>=6'
"""

import random
import tempfile
from collections.abc import Iterable

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from hloss import HistogramLoss, recall_at_k


class SentenceHistogramLoss(nn.Module):
    """The histogram loss of a batch of labelled sentences."""

    def __init__(self, model: SentenceTransformer, n_bins: int = 100) -> None:
        super().__init__()
        self.model, self.criterion = model, HistogramLoss(n_bins=n_bins, on_degenerate="zero")

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the loss of the only column of sentences."""
        (features,) = sentence_features
        return self.criterion(self.model(features)["sentence_embedding"], labels)


torch.manual_seed(0)
random.seed(0)
# Random sentences in place of yours: each of 20 classes has 10 words of its own, between words that all classes share.
words = [f"word{i}" for i in range(300)]
labels = [label for label in range(20) for _ in range(20)]
sentences = [" ".join(random.sample(words[10 * y : 10 * y + 10], 3) + random.sample(words[200:], 6)) for y in labels]

# A tiny model with random weights in place of a pretrained one: SentenceTransformer("all-MiniLM-L6-v2"), for example.
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")

with tempfile.TemporaryDirectory() as folder:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=64,
        num_train_epochs=10,
        learning_rate=0.05,
        batch_sampler=BatchSamplers.GROUP_BY_LABEL,  # Every batch has several sentences of its classes.
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"sentence": sentences, "label": labels}),
        loss=SentenceHistogramLoss(model),
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
recall = recall_at_k(model.encode(sentences, convert_to_tensor=True), torch.tensor(labels), k=(1,))[1]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, Recall@1 of the training sentences {100 * recall:.0f} %")
