"""What a person looks at: statistics of every layer's membrane, warnings about them, pictures of them.

`layer_statistics` imports no torch, `distribution` does, `plots` needs matplotlib; so nothing is imported here.
"""
