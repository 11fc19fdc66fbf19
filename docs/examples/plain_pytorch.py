"""The histogram loss in a plain PyTorch loop.

pip install hloss
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hloss import BalancedSampler, HistogramLoss, recall_at_k

torch.manual_seed(0)
# Random data in place of yours: 8 of 32 dimensions tell 40 classes apart. The last 10 are unseen in training.
labels = torch.arange(40).repeat_interleave(10)
images = torch.cat([torch.randn(40, 8)[labels] + 0.3 * torch.randn(400, 8), 2 * torch.randn(400, 24)], dim=1)
seen = labels < 30

network = nn.Linear(32, 16)
criterion = HistogramLoss(n_bins=100)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
sampler = BalancedSampler(labels[seen], batch_size=64, images_per_class=4, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(images[seen], labels[seen]), batch_sampler=sampler)

losses = []
for step, (batch, classes) in enumerate(loader):  # The sampler never ends.
    if step == 100:
        break
    loss = criterion(network(batch), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

recall = recall_at_k(network(images[~seen]).detach(), labels[~seen], k=(1,))[1]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, Recall@1 of unseen classes {100 * recall:.0f} %")
