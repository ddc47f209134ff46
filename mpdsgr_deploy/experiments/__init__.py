"""Experiments: tables and studies of trained networks, their result records, and the pages rendered from these.

table      a TOML file of train/tables: recipes as rows, what all rows change, and the seeds
study      a TOML file of train/studies: settings times methods, each method compared with a baseline
records    what one row measured with one seed, a line of a JSON-lines file
"""
