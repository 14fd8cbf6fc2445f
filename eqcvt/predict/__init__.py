"""Class probabilities for images in files and folders, from one picture to a survey."""

from eqcvt.predict.images import ENDINGS, Images, find_images
from eqcvt.predict.model import Prediction, class_names, predict
from eqcvt.predict.read import FITS, fit_image
from eqcvt.predict.table import ENDINGS_OF_TABLES, Parts, write_predictions

__all__ = [
    "ENDINGS",
    "ENDINGS_OF_TABLES",
    "FITS",
    "Images",
    "Parts",
    "Prediction",
    "class_names",
    "find_images",
    "fit_image",
    "predict",
    "write_predictions",
]
