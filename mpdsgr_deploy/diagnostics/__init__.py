"""Diagnostics: statistics of every layer's membrane potentials, warnings, plots, and where precisions flip spikes.

Some modules need torch or matplotlib and others work without them, so this package imports none of them.
"""
