"""Tasks: meta-batches, samplers and data sets."""

from fastmaml.tasks.batch import TaskBatch as TaskBatch
from fastmaml.tasks.datasets import FewShotData as FewShotData
from fastmaml.tasks.datasets import mini_imagenet as mini_imagenet
from fastmaml.tasks.datasets import omniglot as omniglot
from fastmaml.tasks.few_shot import FewShotImages as FewShotImages
from fastmaml.tasks.glyphs import glyph_splits as glyph_splits
from fastmaml.tasks.glyphs import glyphs as glyphs
from fastmaml.tasks.sampler import TaskSampler as TaskSampler
from fastmaml.tasks.sinusoid import Sinusoid as Sinusoid
