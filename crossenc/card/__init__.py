"""Model cards: what a README says of a model, its data, its training and its figures.

data      what is recorded while a model is made
dataset   statistics and samples of a dataset
render    the card as markdown, from a template
"""

from crossenc.card.data import CrossEncoderModelCardData, Evaluation, LogRow, ModelFacts
from crossenc.card.dataset import DatasetFacts, describe_dataset
from crossenc.card.render import render_card, write_card

__all__ = [
    "CrossEncoderModelCardData",
    "DatasetFacts",
    "Evaluation",
    "LogRow",
    "ModelFacts",
    "describe_dataset",
    "render_card",
    "write_card",
]
