"""Attack some validation images after an epoch, to show how robustness changes during training."""

import torch

from mpdsgr_deploy.checkpoint import VALIDATION_PGD
from mpdsgr_deploy.data.batches import generator
from mpdsgr_deploy.defences.adversarial import AdversarialSettings, AdversarialTraining, deployed
from mpdsgr_deploy.training.epoch import Data, Learner, validation_batches


def attack_epoch(learner: Learner, data: Data, epoch: int) -> dict[str, float]:
    """Return {VALIDATION_PGD: accuracy in [0, 1]} on the first `training.attacked_images` validation images under PGD.

    Without such images the result is {}. The attack is the PGD of the recipe's [attack], through the surrogate of
    training and with a random start, on the network that is saved. The gradient of a stochastic network is that of one
    draw of its noise, not the mean over `attack.draws`, so this accuracy is higher than under `mpdsgr validate`, and
    only the latter measures robustness.
    """
    fabric, recipe = learner.fabric, learner.recipe
    count, attack = min(recipe.training.attacked_images, len(data[1])), recipe.attack
    if not count:
        return {}
    attacker = AdversarialTraining(AdversarialSettings(eps=attack.eps, steps=attack.steps, step=attack.step))
    correct = torch.zeros((), device=fabric.device)
    for number, clean, y in validation_batches(learner, data, count):
        draw = generator(recipe.training.seed, "attacked validation", epoch, number)
        with fabric.autocast():
            attacked = attacker.examples(learner.judged, clean, y, draw)
            with deployed(learner.judged, draw) as network, torch.no_grad():
                correct += (network(attacked).argmax(1) == y).sum()
    return {VALIDATION_PGD: float(torch.as_tensor(fabric.all_reduce(correct, reduce_op="sum"))) / count}
