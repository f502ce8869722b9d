"""Image data sets for few-shot classification: packed once, cached, split by name."""

from fastmaml.tasks.datasets.data import FewShotData as FewShotData
from fastmaml.tasks.datasets.mini_imagenet import mini_imagenet as mini_imagenet
from fastmaml.tasks.datasets.omniglot import omniglot as omniglot
