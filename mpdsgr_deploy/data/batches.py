"""Batches of images that are stored on the device as uint8, and shuffled, augmented and scaled to [0, 1] there.

All randomness comes from generators that are derived from (seed, purpose, counters), so an epoch is the same on every
device, whether or not the run was interrupted and resumed before it.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mpdsgr_deploy.data.images import Images


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the purpose (names, epoch, step, rank)."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_device(images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [N, C, H, W] and classes [N] on the device, or both in host memory if they do not fit."""
    pixels, classes = torch.from_numpy(images.pixels), torch.from_numpy(images.classes)
    return (pixels.to(device), classes.to(device)) if fits(pixels.nbytes, device) else (pixels, classes)


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes fit into half of a GPU's free memory (the rest is for training); True for a CPU."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] / 2


def shuffled_batches(count: int, batch_size: int, shuffle: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices [batch_size] of each batch of an epoch over `count` images in random order.

    Images that do not fill a last batch are left out.
    """
    yield from torch.randperm(count, generator=shuffle)[: count // batch_size * batch_size].split(batch_size)


def take(data: tuple[Tensor, Tensor], index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [B, C, H, W] and classes [B] of the images `index` [B], on the device.

    data: the result of `to_device`.
    """
    batch = tuple(tensor[index.to(tensor.device)] for tensor in data)
    if data[0].device.type == "cpu" != device.type:  # a copy from pinned memory is asynchronous
        batch = tuple(tensor.pin_memory() for tensor in batch)
    pixels, classes = (tensor.to(device, non_blocking=True) for tensor in batch)
    return pixels, classes


def to_unit(pixels: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1]."""
    return pixels.float() / 255


def augment(pixels: Tensor, *, padding: int, flip: bool, draw: torch.Generator) -> Tensor:
    """Return randomly shifted and flipped images [B, C, H, W].

    Each image is padded by `padding` zeros on every side and cropped at a random place and, with `flip`, mirrored left
    to right with probability 1/2.
    """
    count, channels, height, width = pixels.shape
    device = pixels.device
    padded = F.pad(pixels, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=draw).to(device)
    columns = torch.arange(width).expand(count, -1)
    if flip:
        mirrored = torch.rand(count, generator=draw) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + columns.to(device)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
