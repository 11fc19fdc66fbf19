"""The histogram loss in a trainer of pytorch-metric-learning, with a miner and a memory of earlier batches.

pip install 'hloss[pml]'
"""

import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import nn
from torch.utils.data import TensorDataset

from hloss import recall_at_k
from hloss.integrations.pytorch_metric_learning import CrossBatchMemory, HistogramLoss

torch.manual_seed(0)
# Random data in place of yours: 8 of 32 dimensions tell 40 classes apart. The last 10 are unseen in training.
labels = torch.arange(40).repeat_interleave(10)
images = torch.cat([torch.randn(40, 8)[labels] + 0.3 * torch.randn(400, 8), 2 * torch.randn(400, 24)], dim=1)
seen = labels < 30

network = nn.Linear(32, 16)
criterion = CrossBatchMemory(HistogramLoss(n_bins=100), embedding_size=16, memory_size=256)
losses = []
trainer = MetricLossOnly(
    models={"trunk": network},
    optimizers={"trunk_optimizer": torch.optim.Adam(network.parameters(), lr=0.01)},
    batch_size=64,
    loss_funcs={"metric_loss": criterion},
    mining_funcs={"tuple_miner": MultiSimilarityMiner()},  # Its pairs join those of the batch with the memory.
    dataset=TensorDataset(images[seen], labels[seen]),
    sampler=MPerClassSampler(labels[seen], m=4, batch_size=64, length_before_new_iter=6400),
    dataloader_num_workers=0,
    end_of_iteration_hook=lambda trainer: losses.append(trainer.losses["total_loss"].item()),
)
trainer.train(num_epochs=1)

recall = recall_at_k(network(images[~seen]).detach(), labels[~seen], k=(1,))[1]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, Recall@1 of unseen classes {100 * recall:.0f} %")
