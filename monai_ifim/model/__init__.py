# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A network, what its outputs mean and how it is called, in one object."""

from monai_ifim.model.batching import Batches, FewerImages, MemoryWarning, default_batch_size, is_out_of_memory
from monai_ifim.model.channels import check_channel_mask, restricted, varied, varied_channels
from monai_ifim.model.inputs import PerImage, checked_images, input_values, inputs_of_rows, plain_tensor
from monai_ifim.model.linearisation import Linearisation
from monai_ifim.model.model import Model
from monai_ifim.model.state import parameter_dtype, preserve_state, unwrap
from monai_ifim.model.trial import differing, forget_verdicts
from monai_ifim.model.windows import Windowed

__all__ = [
    "Batches",
    "FewerImages",
    "Linearisation",
    "MemoryWarning",
    "Model",
    "PerImage",
    "Windowed",
    "check_channel_mask",
    "checked_images",
    "default_batch_size",
    "differing",
    "forget_verdicts",
    "input_values",
    "inputs_of_rows",
    "is_out_of_memory",
    "parameter_dtype",
    "plain_tensor",
    "preserve_state",
    "restricted",
    "unwrap",
    "varied",
    "varied_channels",
]
