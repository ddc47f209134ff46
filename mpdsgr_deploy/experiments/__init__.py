"""Experiments: tables and studies of trained networks, the records of their results, and pages made from the records.

table     a TOML file in train/tables: recipes as rows, changes to all rows, and seeds
study     a TOML file in train/studies: settings and methods, each method compared with a baseline in each setting
record    the result of one row with one seed, a line of a JSON-lines file
"""
