"""Writes ten classes of CIFAR-100 as a folder of images, which small networks learn in minutes on a CPU.

    python benchmarks/ten_classes.py --root data --out runs/ten-classes
    mpdsgr train benchmarks/recipes/c100-at-sr.toml

Every tenth class in alphabetical order: 5,000 training and 1,000 test images. `data.image_size` of a recipe says to
what size they are brought.
"""

from pathlib import Path

import click
from PIL import Image
from torchvision.datasets import CIFAR100

EVERY = 10


@click.command()
@click.option("--root", default="data", show_default=True, help="Where CIFAR-100 lies.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/ten-classes", show_default=True)
def main(root: str, out: Path) -> None:
    """Write OUT/train/CLASS/NUMBER.png and OUT/test/CLASS/NUMBER.png."""
    for split in ("train", "test"):
        images = CIFAR100(root, train=split == "train")
        for number, (pixels, k) in enumerate(zip(images.data, images.targets, strict=True)):
            if k % EVERY == 0:
                file = out / split / images.classes[k] / f"{number:05}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


if __name__ == "__main__":
    main()
