"""Model cards: what a README says of a model, its data, its training and its figures.

data      what is recorded while a model is made
dataset   statistics and samples of a dataset
emissions what training emitted
render    the card as markdown, from a template
promotion what it says of the evaluation that a model was promoted by
"""

from crossenc.card.data import CrossEncoderModelCardData, Evaluation, LogRow, ModelFacts
from crossenc.card.dataset import DatasetFacts, describe_dataset, describe_datasets
from crossenc.card.emissions import describe_emissions, measured_emissions
from crossenc.card.render import render_card, write_card

__all__ = [
    "CrossEncoderModelCardData",
    "DatasetFacts",
    "Evaluation",
    "LogRow",
    "ModelFacts",
    "describe_dataset",
    "describe_datasets",
    "describe_emissions",
    "measured_emissions",
    "render_card",
    "write_card",
]
