# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import logging

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.engines import EnsembleEvaluator, PrepareBatch, PrepareBatchExtraInput, SupervisedEvaluator
from torch import nn

from monai_ifim import Bernoulli, input_fisher
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.handlers import IFIMHandler, IFIMMetric
from tests import handlers as common
from tests.handlers import CNN, COUPLINGS, CPU, KLS, ROUTES, SCALARS, TASK, details, direct, evaluator, items, logged

pytestmark = pytest.mark.parametrize("route", ROUTES)
once = pytest.mark.parametrize("route", ["metric"])


def run(*args, **options):
    """The evaluator after one evaluation."""
    engine = evaluator(*args, **options)
    engine.run()
    return engine


def spectrum(network, images, *arguments, **keyword_arguments):
    """The greatest eigenvalue of each image, one image at a time, from the definition ``J^T (diag p - p p^T) J``."""
    network.eval()
    found = []
    for index, image in enumerate(images):
        further = [value[index : index + 1] for value in arguments]
        named = {key: value[index : index + 1] for key, value in keyword_arguments.items()}

        def logits(image, further=further, named=named):
            return network(image[None], *further, **named)[0]

        p = torch.softmax(logits(image).detach(), -1)
        jacobian = torch.func.jacrev(logits)(image).detach().flatten(1)
        eigenvalues = torch.linalg.eigvalsh(jacobian @ jacobian.T @ (torch.diag(p) - torch.outer(p, p)).T)
        root = torch.linalg.cholesky(jacobian @ jacobian.T + 0 * eigenvalues.sum())
        found.append(torch.linalg.eigvalsh(root.T @ (torch.diag(p) - torch.outer(p, p)) @ root)[-1])
    return torch.stack(found).numpy()
