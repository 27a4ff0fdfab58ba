"""How good a ranking is, and whether a difference between two rankings is more than chance.

`metrics` turns rankings and judgements into a value per query; `significance` compares two such columns of
values. Neither knows a model, a file format or a cluster.
"""
