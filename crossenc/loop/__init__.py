"""A training loop in parts, for any number of workers: what a job on a cluster puts together.

lists      lists of tokenised pairs with labels
order      which lists make which batch: a function of seed and epoch
network    the forward pass in training, packed where it is exact
optimizer  parameter groups, the learning rate's course, state without pickle
learner    one step of the optimizer
validation measures on lists that are not learned from
"""
