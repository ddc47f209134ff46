"""Train the slim VGG11 in SpikingJelly as its users do: all T steps from the first epoch, SGD, a cosine schedule.

    python train.py DATA WIDTH T EPOCHS BATCH SEED

DATA is an .npz with images [N, 3, 32, 32] in bytes and classes, for training and validation. Prints a line of JSON an
epoch: processor seconds so far and the validation accuracy.
"""

import json
import sys
import time

import numpy as np
import torch
from peers import PLAN
from spikingjelly_vgg11 import Network

LR, MOMENTUM, WEIGHT_DECAY, PADDING = 0.1, 0.9, 5e-4, 4  # the recipe's


def crop_flip(images: torch.Tensor) -> torch.Tensor:
    """A random crop of each image [B, C, H, W] with padding, and a random left-right flip."""
    padded, size = torch.nn.functional.pad(images, [PADDING] * 4), images.shape[-1]
    offsets = torch.randint(2 * PADDING + 1, (len(images), 2)).tolist()
    crops = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)]
    return torch.stack([crop.flip(-1) if torch.rand(()) < 0.5 else crop for crop in crops])


def main(data: str, width: float, T: int, epochs: int, batch: int, seed: int) -> None:
    """Train, and validate after every epoch."""
    torch.manual_seed(seed)
    arrays = {name: torch.from_numpy(values) for name, values in np.load(data).items()}
    mean, std = (s.float().view(3, 1, 1) for s in torch.std_mean(arrays["train"] / 255, (0, 2, 3))[::-1])
    network = Network(width, T, (*PLAN, "P"), ())
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(arrays["train"]) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network((pixels / 255 - mean) / std).float()

    begun = time.process_time()
    for _ in range(epochs):
        network.train()
        order = torch.randperm(len(arrays["train"]))
        for chosen in order[: len(order) // batch * batch].split(batch):
            loss = torch.nn.functional.cross_entropy(
                logits(crop_flip(arrays["train"][chosen])), arrays["train_classes"][chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            found = torch.cat([logits(part).argmax(1) for part in arrays["validation"].split(batch)])
        accuracy = (found == arrays["validation_classes"]).float().mean().item()
        print(json.dumps({"cpu_seconds": time.process_time() - begun, "accuracy": accuracy}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:7]))
