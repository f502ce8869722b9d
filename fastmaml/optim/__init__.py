"""Outer optimizers in C++: torch's Adam, AdamW and SGD, one call for all tensors.

Networks of meta-learning are small, so that an optimizer's time is all overhead. These
take torch's place under the same names: arguments, ``param_groups``, ``state_dict()``
and schedulers are torch's own, and a state saved by one loads into the other. Updates
agree with torch's to rounding.

They run where the native engine has a backend, in float32 and float64, on strided
tensors; everything else is an error that names the tensor and torch's class to use.
"""

from fastmaml.optim.adam import Adam, AdamW
from fastmaml.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
