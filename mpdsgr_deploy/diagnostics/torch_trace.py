"""Record potentials and spikes of a torch network, as `trace.Recorder` does for an exported one."""

import numpy as np
import torch
from numpy.typing import NDArray

from mpdsgr_deploy.diagnostics.trace import Recording, Steps
from mpdsgr_deploy.models import SpikingNet
from mpdsgr_deploy.runtime import NoiseSource
from mpdsgr_deploy.runtime.torch_model import noise_inputs
from mpdsgr_deploy.snn import Trace


class TorchRecorder:
    """Records a network in eval mode on the CPU, for images of `shape` (C, H, W).

    A stochastic network draws the noise that its exported form would draw with this seed.
    """

    def __init__(self, model: SpikingNet, shape: tuple[int, int, int], seed: int) -> None:
        self._model, self._draws = model, noise_inputs(model, shape)
        self._noise = NoiseSource(self._draws, seed)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.float32]) -> Recording:
        """Run the network on images [B, C, H, W] in [0, 1]."""
        potentials: Steps = {}
        spikes: Steps = {}

        def observe(trace: Trace) -> None:
            for t, state in enumerate(trace.states):
                potentials[f"{trace.layer}/{t}"] = state.u.numpy()
                spikes[f"{trace.layer}/{t}"] = state.spikes.numpy()

        noise = self._noise(images)
        draws = [torch.from_numpy(noise[entry.name]) for entry in self._draws]
        logits: NDArray[np.float32] = self._model(torch.from_numpy(images), observe, draws).numpy()
        return Recording(logits, potentials, spikes)
