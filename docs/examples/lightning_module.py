"""The histogram loss in a Lightning module; with several devices, over the batch of all of them.

pip install hloss lightning
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hloss import BalancedSampler, HistogramLoss, global_batch, recall_at_k


class Embedding(lightning.LightningModule):
    """A network that embeds images, trained with the histogram loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(32, 16)
        self.criterion = global_batch(HistogramLoss(n_bins=100))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = self.criterion(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


torch.manual_seed(0)
# Random data in place of yours: 8 of 32 dimensions tell 40 classes apart. The last 10 are unseen in training.
labels = torch.arange(40).repeat_interleave(10)
images = torch.cat([torch.randn(40, 8)[labels] + 0.3 * torch.randn(400, 8), 2 * torch.randn(400, 24)], dim=1)
seen = labels < 30

sampler = BalancedSampler(labels[seen], batch_size=64, images_per_class=4, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(images[seen], labels[seen]), batch_sampler=sampler)
trainer = lightning.Trainer(
    max_steps=100,  # The sampler never ends.
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    use_distributed_sampler=False,  # The sampler draws whole batches.
)
module = Embedding()
trainer.fit(module, loader)

recall = recall_at_k(module.network(images[~seen]).detach(), labels[~seen], k=(1,))[1]
print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}, Recall@1 of unseen classes {100 * recall:.0f} %")
