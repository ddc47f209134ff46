"""Serving: a bundle behind the Open Inference Protocol, and what measures such a server."""
