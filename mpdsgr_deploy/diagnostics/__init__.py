"""What a person looks at: statistics of every layer's membrane, warnings about them, pictures of them.

`statistics` imports no torch, `measure` does, `plots` needs matplotlib; so nothing is imported here.
"""
