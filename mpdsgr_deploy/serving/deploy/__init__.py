"""Files from which other engines serve a bundle: a Triton model repository, KServe resources."""
