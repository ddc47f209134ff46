"""Diagnostics for people: statistics of every layer's membrane, warnings, and plots.

`layer_statistics` imports no torch, `distribution` does, `plots` needs matplotlib; so nothing is imported here.
"""
