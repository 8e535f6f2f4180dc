"""Triton Inference Server's Python backend around a c2al artifact. Not run in this project's tests."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import triton_python_backend_utils as pb_utils

from c2al.errors import C2ALError
from c2al.serving.predict import Predictor


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"] / "artifact"
        self.predictor = Predictor(folder)
        self.inputs = [i["name"] for i in json.loads(args["model_config"])["input"]]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        columns = {}
        for name in self.inputs:
            values = pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0]
            # Strings arrive as bytes.
            columns[name] = [v.decode() for v in values] if values.dtype == np.object_ else values
        try:
            prediction = self.predictor.predict(pa.table(columns), "request")
        except (C2ALError, UnicodeDecodeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("prediction", prediction[:, None])])
