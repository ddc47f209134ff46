"""Train in stages of different numbers of time steps: the first epochs at few steps, the last ones at encoding.T.

A network of LIF neurons has the same weights at every T (`models.time_steps`), so each stage starts from the weights of
the stage before. tdBN's running statistics are joint over time; with momentum 0.1 they adapt to the new T within the
first tens of batches of a stage.
"""

from mpdsgr_deploy.defences import make_defences
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.recipe import Recipe

ANY_LENGTH = ("direct", "poisson", "sqe", "rsc")  # encodings whose steps all show the same image


def check_stages(recipe: Recipe) -> None:
    """Raise InputError for a recipe with stages whose encoding or neurons work only at one number of time steps."""
    if not recipe.training.stages:
        return
    if recipe.encoding.name not in ANY_LENGTH:
        raise InputError(
            f"training.stages need an encoding whose steps are alike ({', '.join(ANY_LENGTH)}), not "
            f"{recipe.encoding.name!r}; leave stages out"
        )
    if not all(defence.time_invariant for defence in make_defences(recipe)):
        raise InputError(
            f"training.stages cannot change the time steps of neurons that learn one value for each "
            f"({', '.join(recipe.defence)}); leave stages out"
        )


def recipe_at(recipe: Recipe, epoch: int) -> Recipe:
    """Return the recipe with the time steps of `epoch`, counted from 0, as its encoding.T."""
    for stage in recipe.training.stages:
        if epoch < stage.epochs:
            return recipe.model_copy(update={"encoding": recipe.encoding.model_copy(update={"T": stage.T})})
        epoch -= stage.epochs
    return recipe
