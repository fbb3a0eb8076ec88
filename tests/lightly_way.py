"""SimCLR as lightly's documentation sets it up, to measure beside; runs in .venv-benchmark.

    python tests/lightly_way.py FOLDER ARCH SIZE BATCH WORKERS STEPS [FAST]

FOLDER: PNG slices. Prints views per second over STEPS steps, after those whose batches its loader had ready at the start.
FAST: with pretrain.py's precision and channels_last.
"""

import sys
import time

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform

folder, arch, size, batch, workers, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
fast = len(sys.argv) > 7
device = "cuda" if torch.cuda.is_available() else "cpu"
resnet = torchvision.models.get_model(arch, weights=None)
width = resnet.fc.in_features
resnet.fc = torch.nn.Identity()
model = torch.nn.Sequential(resnet, SimCLRProjectionHead(width, width, 128)).to(device)
if fast:
    model = model.to(memory_format=torch.channels_last)
    sys.path.insert(0, ".")
    from pretrain import bf16_pays

    fast = bf16_pays(torch.device(device))
dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=size))
loader = torch.utils.data.DataLoader(
    dataset, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
)
criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

ready = 1 + 2 * workers  # each process reads two batches ahead
step, started = 0, 0.0
while step < ready + steps:
    for (x0, x1), *_ in loader:
        if step == ready:
            started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            z0, z1 = model(x0.to(device)), model(x1.to(device))
        loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        step += 1
        if step == ready + steps:
            break
print(2 * batch * steps / (time.perf_counter() - started))
