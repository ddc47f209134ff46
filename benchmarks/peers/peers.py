"""What all implementations of VGG11 have in common. The paper's network: tdBN is BN there, and costs the same."""

SHAPE, CLASSES = (3, 32, 32), 10
PLAN: tuple[int | str, ...] = (64, "P", 128, 256, "P", 512, 512, 512, "P", 512, 512)
HIDDEN = (4096, 4096)
EPS, ALPHA, STEPS = 8 / 255, 0.01, 7  # of PGD
