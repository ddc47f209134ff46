"""mpdsgr-deploy: train robust spiking networks, export them, and prove the exported artefact is still robust."""

__version__ = "0.1.0"
